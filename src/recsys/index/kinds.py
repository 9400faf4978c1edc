"""The kinds of FAISS index: how each is made in bounded memory, searched, and read from disk.

Shapes: N items, D dim. All answer by inner product; id = item index - 1. Vectors may be a memory
map: they are read a part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recsys.schema import InputError

if TYPE_CHECKING:
    import faiss

    from recsys.index.build import IndexSettings

POINTS_PER_LIST = 39
"""FAISS's least number of vectors to train one inverted list on."""
TRAINED_ON = 64
"""Vectors a list that lists and codes are learnt from; FAISS would take 256."""
CODEBOOK = 256
"""Centroids of a product quantiser's part: what one byte can name."""
CHUNK_BYTES = 64 << 20
"""So much of the vectors is added at a time."""
REFINES = (2, 4, 8, 16, 32, 64, 128)
"""Candidates for each answer that may be scored exactly, where the index holds codes alone."""

Effort = int
"""How far a search goes: `nprobe` of an IVF index, `ef_search` of an HNSW one."""
Vectors = NDArray[np.float32]


def flat(vectors_ND: Vectors, settings: IndexSettings) -> faiss.Index:
    """Return exact search, without vectors yet."""
    import faiss

    return faiss.IndexFlatIP(vectors_ND.shape[1])


def ivf_flat(vectors_ND: Vectors, settings: IndexSettings) -> faiss.Index:
    """Return inverted lists of whole vectors."""
    import faiss

    dim, lists = vectors_ND.shape[1], list_count(len(vectors_ND), settings.nlist)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    return _trained(index, vectors_ND)


def ivf_sq8(vectors_ND: Vectors, settings: IndexSettings) -> faiss.Index:
    """Return inverted lists of vectors in one byte a dimension: a quarter of the memory."""
    import faiss

    dim = vectors_ND.shape[1]
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim),
        dim,
        list_count(len(vectors_ND), settings.nlist),
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
    )
    return _trained(index, vectors_ND)


def ivf_pq(vectors_ND: Vectors, settings: IndexSettings) -> faiss.Index:
    """Return inverted lists of product-quantised vectors, some bytes each.

    Source: Jégou, Douze and Schmid 2011, Product Quantization for Nearest Neighbor Search.
    """
    import faiss

    dim = vectors_ND.shape[1]
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(dim),
        dim,
        list_count(len(vectors_ND), settings.nlist),
        code_bytes(dim, settings.code_bytes),
        8,
        faiss.METRIC_INNER_PRODUCT,
    )
    # FAISS would take four times the vectors and 25 rounds, for no recall that refining leaves.
    index.pq.cp.min_points_per_centroid, index.pq.cp.max_points_per_centroid = 1, TRAINED_ON
    index.pq.cp.niter = index.cp.niter
    return _trained(index, vectors_ND)


def hnsw(vectors_ND: Vectors, settings: IndexSettings) -> faiss.Index:
    """Return a navigable small-world graph: a vector and about 8 × `neighbours` bytes an item.

    Source: Malkov and Yashunin, https://arxiv.org/abs/1603.09320.
    """
    import faiss

    dim = vectors_ND.shape[1]
    index = faiss.IndexHNSWFlat(dim, settings.neighbours, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = settings.ef_construction
    return index


MAKERS: dict[str, Callable[[Vectors, IndexSettings], Any]] = {
    "flat": flat,
    "ivf_flat": ivf_flat,
    "hnsw": hnsw,
    "ivf_sq8": ivf_sq8,
    "ivf_pq": ivf_pq,
}
CODED = ("ivf_sq8", "ivf_pq")
"""Kinds that do not hold whole vectors: their candidates are scored again, exactly."""


def list_count(num_items: int, wanted: int | None) -> int:
    """Return how many inverted lists to make: 4 √N, each with enough vectors to train on.

    >>> list_count(100_000, None), list_count(50, None), list_count(1_000_000, 4096)
    (1265, 1, 4096)
    """
    if wanted is not None and wanted > num_items:
        raise InputError(
            f"index.nlist={wanted} is more than the {num_items} items; lower it or leave it out"
        )
    return wanted or max(1, min(round(4 * num_items**0.5), num_items // POINTS_PER_LIST))


def code_bytes(dim: int, wanted: int | None) -> int:
    """Return the bytes of a product-quantised vector: two dimensions a byte where not given.

    Raises InputError where they do not divide the dimensions.

    >>> code_bytes(64, None), code_bytes(7, None), code_bytes(64, 16)
    (32, 7, 16)
    """
    if wanted is None:
        return dim // 2 if dim % 2 == 0 else dim
    if dim % wanted:
        fitting = [str(count) for count in range(1, dim + 1) if dim % count == 0]
        raise InputError(
            f"index.code_bytes={wanted} does not divide the {dim} dimensions of the item vectors; "
            f"expected one of {', '.join(fitting)}"
        )
    return wanted


def search_parameters(kind: str, effort: Effort, selector: Any = None) -> Any:
    """Return FAISS parameters of one search: safe to use from several threads at once."""
    import faiss

    if kind == "flat":
        return faiss.SearchParameters(sel=selector)
    if kind == "hnsw":
        return faiss.SearchParametersHNSW(efSearch=effort, sel=selector)
    return faiss.SearchParametersIVF(nprobe=effort, sel=selector)


def chunks(vectors_ND: Vectors) -> Iterator[slice]:
    """Yield the rows in parts of `CHUNK_BYTES`.

    >>> list(chunks(np.zeros((3, 2), np.float32)))
    [slice(0, 3, None)]
    """
    rows = max(1, CHUNK_BYTES // (vectors_ND.itemsize * vectors_ND.shape[1]))
    for start in range(0, len(vectors_ND), rows):
        yield slice(start, min(start + rows, len(vectors_ND)))


def read(file: Path) -> faiss.Index:
    """Read an index file; its codes, vectors and links stay on the disk, mapped.

    All processes that read it share these pages. Raises InputError where it is no index.
    """
    import faiss

    try:
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise InputError(f"{file}: not a FAISS index; export the bundle again") from error


def write(index: faiss.Index, file: Path) -> None:
    """Write an index file; an OSError (a full disk) passes through."""
    import faiss

    # Through Python, not straight to a path: only so is a full disk told from other errors.
    with file.open("wb") as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))


def _trained(index: faiss.IndexIVF, vectors_ND: Vectors) -> faiss.IndexIVF:
    # A list may be asked for that FAISS would warn about on its own standard error.
    index.cp.min_points_per_centroid = 1
    some = sample(vectors_ND, TRAINED_ON * max(index.nlist, CODEBOOK))
    # A codebook takes so many rows at least: those of a tiny catalogue are taken in turn.
    index.train(np.resize(some, (max(len(some), CODEBOOK), some.shape[1])))
    return index


def sample(vectors_ND: Vectors, count: int) -> Vectors:
    """Return some rows, drawn evenly and always the same, in their order."""
    if count >= len(vectors_ND):
        return vectors_ND
    chosen = np.random.default_rng(0).permutation(len(vectors_ND))[:count]
    return np.ascontiguousarray(vectors_ND[np.sort(chosen)])
