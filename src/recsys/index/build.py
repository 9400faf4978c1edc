"""Build a FAISS index over item vectors and tune it on real query vectors to a stated recall.

Shapes: N items, D dim, Q queries. All indexes answer by inner product; id = item index - 1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recsys.schema import InputError, suggestion

if TYPE_CHECKING:
    import faiss

log = logging.getLogger(__name__)

KINDS = ("auto", "flat", "ivf_flat", "hnsw", "ivf_sq8")
OPTIONS: dict[str, tuple[str, ...]] = {
    "auto": ("exact_up_to", "target_recall", "nlist"),
    "flat": (),
    "ivf_flat": ("target_recall", "nlist"),
    "hnsw": ("target_recall", "neighbours", "ef_construction"),
    "ivf_sq8": ("target_recall", "nlist"),
}
"""Settings that have an effect with each kind; any other is refused."""
RECALL_AT = 100
TIMED_QUERIES = 200
POINTS_PER_LIST = 39
"""FAISS's least number of vectors to train one inverted list on."""

Effort = int
"""How far a search goes: `nprobe` of an IVF index, `ef_search` of an HNSW one."""


@dataclass(frozen=True)
class IndexSettings:
    """How to build the index; mirrors `configs/index/*.yaml`.

    kind: `auto` is exact up to `exact_up_to` items and ivf_flat above. target_recall: recall@100
    against exact search to tune for. nlist: inverted lists (4 √N where not given). neighbours,
    ef_construction: HNSW's links an item and width of its build.
    """

    kind: str = "auto"
    exact_up_to: int = 20_000
    target_recall: float = 0.99
    nlist: int | None = None
    neighbours: int = 32
    ef_construction: int = 200

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"index.kind={self.kind!r} is not one of {', '.join(KINDS)}"
                + suggestion(str(self.kind), KINDS)
            )
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in OPTIONS[self.kind]:
                raise InputError(
                    f"index.{field.name}={value} has no effect with index.kind={self.kind}; "
                    "leave it out, or choose another index.kind"
                )
            if value is not None and not value > 0:
                raise InputError(f"index.{field.name}={value} must be above 0")
        if self.target_recall > 1:
            raise InputError(f"index.target_recall={self.target_recall} must be at most 1")

    @classmethod
    def of(cls, settings: IndexSettings | Mapping[str, Any] | None) -> IndexSettings:
        """Read settings from a resolved config group; an unknown name is an error.

        >>> IndexSettings.of({"kind": "hnsw"}).neighbours
        32
        """
        if isinstance(settings, IndexSettings):
            return settings
        given = {str(k): v for k, v in (settings or {}).items() if k != "_target_"}
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise InputError(
                    f"unknown setting index.{name}; expected one of {', '.join(known)}"
                    + suggestion(name, known)
                )
        return cls(**given)

    def resolve(self, num_items: int) -> str:
        """Return the kind to build for this many items.

        >>> IndexSettings().resolve(20_000), IndexSettings().resolve(20_001)
        ('flat', 'ivf_flat')
        """
        if self.kind != "auto":
            return self.kind
        return "flat" if num_items <= self.exact_up_to else "ivf_flat"


@dataclass(frozen=True)
class BuiltIndex:
    """A FAISS index and what the manifest says of it."""

    index: faiss.Index
    facts: dict[str, Any]


def build(
    vectors_ND: NDArray[np.float32],
    settings: IndexSettings | Mapping[str, Any] | None = None,
    queries: NDArray[np.float32] | None = None,
) -> BuiltIndex:
    """Build an index over item vectors and tune its search effort on `queries` [Q, D].

    Without queries it is tuned on a sample of the items themselves. The facts hold kind, nlist,
    nprobe or ef_search, the recall@100 reached and the whole curve against p50 latency on one
    thread. Raises InputError on NaN, infinite or no vectors.

    >>> build(np.eye(3, dtype=np.float32)).facts["kind"]
    'flat'
    """
    chosen = IndexSettings.of(settings)
    vectors_ND = check_vectors(vectors_ND, "item vectors")
    kind = chosen.resolve(len(vectors_ND))
    started = time.perf_counter()
    index = MAKERS[kind](vectors_ND, chosen)
    facts = {"kind": kind, **_shape_facts(kind, index)}
    facts["build_seconds"] = round(time.perf_counter() - started, 3)
    facts |= tune(index, kind, vectors_ND, _sample(queries, vectors_ND), chosen.target_recall)
    facts["tuned_on"] = "items" if queries is None else "queries"
    return BuiltIndex(index, facts)


def check_vectors(vectors: NDArray[np.floating], what: str) -> NDArray[np.float32]:
    """Return a contiguous float32 matrix, or raise InputError naming the first bad row."""
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise InputError(f"{what}: expected a non-empty matrix, found shape {vectors.shape}")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise InputError(
            f"{what}: {len(bad)} of {len(vectors)} rows hold NaN or infinite values, the first is "
            f"row {bad[0]}; the training diverged: train again with a lower learning rate"
        )
    return np.ascontiguousarray(vectors, np.float32)


def flat(vectors_ND: NDArray[np.float32], settings: IndexSettings) -> faiss.Index:
    """Build exact search."""
    import faiss

    index = faiss.IndexFlatIP(vectors_ND.shape[1])
    index.add(vectors_ND)
    return index


def ivf_flat(vectors_ND: NDArray[np.float32], settings: IndexSettings) -> faiss.Index:
    """Build inverted lists of whole vectors."""
    import faiss

    dim = vectors_ND.shape[1]
    lists = list_count(len(vectors_ND), settings.nlist)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    return _trained(index, vectors_ND)


def ivf_sq8(vectors_ND: NDArray[np.float32], settings: IndexSettings) -> faiss.Index:
    """Build inverted lists of vectors in one byte a dimension: a quarter of the memory."""
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


def hnsw(vectors_ND: NDArray[np.float32], settings: IndexSettings) -> faiss.Index:
    """Build a navigable small-world graph.

    Source: Malkov and Yashunin, https://arxiv.org/abs/1603.09320.
    """
    import faiss

    dim = vectors_ND.shape[1]
    index = faiss.IndexHNSWFlat(dim, settings.neighbours, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = settings.ef_construction
    index.add(vectors_ND)
    return index


MAKERS = {"flat": flat, "ivf_flat": ivf_flat, "hnsw": hnsw, "ivf_sq8": ivf_sq8}


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


def search_parameters(kind: str, effort: Effort, selector: Any = None) -> Any:
    """Return FAISS parameters of one search: safe to use from several threads at once."""
    import faiss

    if kind == "flat":
        return faiss.SearchParameters(sel=selector)
    if kind == "hnsw":
        return faiss.SearchParametersHNSW(efSearch=effort, sel=selector)
    return faiss.SearchParametersIVF(nprobe=effort, sel=selector)


def fetch_count(kind: str, k: int) -> int:
    """Return how many candidates to fetch for `k` answers: quantised scores need a second look."""
    return 2 * k if kind == "ivf_sq8" else k


def tune(
    index: faiss.Index,
    kind: str,
    vectors_ND: NDArray[np.float32],
    queries_QD: NDArray[np.float32],
    target: float,
) -> dict[str, Any]:
    """Find the least effort that reaches `target` recall@100, and record the curve up to it.

    Where none does, the least that comes within 0.001 of the best is taken, with a warning.
    """
    if kind == "flat":
        point = {"recall@100": 1.0, "p50_ms": _p50_ms(index, kind, 0, queries_QD)}
        return {"recall": 1.0, "curve": [point]}
    name = "ef_search" if kind == "hnsw" else "nprobe"
    wanted = exact_top(vectors_ND, queries_QD, RECALL_AT)
    curve: list[dict[str, Any]] = []
    for effort in _efforts(index, kind):
        fetched = min(fetch_count(kind, wanted.shape[1]), index.ntotal)
        found = index.search(queries_QD, fetched, params=search_parameters(kind, effort))[1]
        recall = round(overlap(found, wanted), 4)
        p50_ms = _p50_ms(index, kind, effort, queries_QD)
        curve.append({name: effort, "recall@100": recall, "p50_ms": p50_ms})
        if recall >= target:
            break
    best = curve[-1]
    if best["recall@100"] < target:
        near = max(point["recall@100"] for point in curve) - 0.001
        best = next(point for point in curve if point["recall@100"] >= near)
        log.warning("%s index: recall@100 is %s, below %s", kind, best["recall@100"], target)
    return {
        name: best[name],
        "target_recall": target,
        "recall": best["recall@100"],
        "curve": curve,
    }


def exact_top(
    vectors_ND: NDArray[np.float32], queries_QD: NDArray[np.float32], k: int
) -> NDArray[np.int64]:
    """Return the `k` rows of largest inner product with each query, exactly: int64 [Q, K]."""
    import faiss

    k = min(k, len(vectors_ND))
    return faiss.knn(queries_QD, vectors_ND, k, metric=faiss.METRIC_INNER_PRODUCT)[1]


def overlap(found_QK: NDArray[np.int64], wanted_QK: NDArray[np.int64]) -> float:
    """Return the mean share of wanted ids that were found.

    >>> overlap(np.array([[1, 2]]), np.array([[2, 3]]))
    0.5
    """
    both = [np.intersect1d(f, w).size for f, w in zip(found_QK, wanted_QK, strict=True)]
    return float(np.mean(both) / wanted_QK.shape[1])


@contextmanager
def one_thread() -> Iterator[None]:
    """Let FAISS use one thread within the block."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _trained(index: faiss.IndexIVF, vectors_ND: NDArray[np.float32]) -> faiss.IndexIVF:
    # A list may be asked for that FAISS would warn about on its own standard error.
    index.cp.min_points_per_centroid = 1
    index.train(vectors_ND)
    index.add(vectors_ND)
    return index


def _shape_facts(kind: str, index: faiss.Index) -> dict[str, Any]:
    if kind == "hnsw":
        return {
            "neighbours": index.hnsw.nb_neighbors(1),
            "ef_construction": index.hnsw.efConstruction,
        }
    return {} if kind == "flat" else {"nlist": index.nlist}


def _efforts(index: faiss.Index, kind: str) -> list[Effort]:
    first, last = (RECALL_AT, max(RECALL_AT, index.ntotal)) if kind == "hnsw" else (1, index.nlist)
    steps = (first * 2**power * half // 2 for power in range(32) for half in (2, 3))
    return sorted({min(step, last) for step in steps})


def _sample(
    queries: NDArray[np.float32] | None, vectors_ND: NDArray[np.float32], count: int = 1000
) -> NDArray[np.float32]:
    source = vectors_ND if queries is None else check_vectors(queries, "query vectors")
    if source.shape[1] != vectors_ND.shape[1]:
        raise InputError(
            f"query vectors have {source.shape[1]} dimensions, item vectors {vectors_ND.shape[1]}"
        )
    chosen = np.random.default_rng(0).permutation(len(source))[:count]
    return source[np.sort(chosen)]


def _p50_ms(
    index: faiss.Index, kind: str, effort: Effort, queries_QD: NDArray[np.float32]
) -> float:
    parameters = search_parameters(kind, effort)
    k = min(RECALL_AT, index.ntotal)
    seconds = []
    with one_thread():
        for query_D in queries_QD[:TIMED_QUERIES]:
            started = time.perf_counter()
            index.search(query_D[None], k, params=parameters)
            seconds.append(time.perf_counter() - started)
    return round(float(np.median(seconds)) * 1e3, 4)
