"""Nearest items on whatever device there is, behind one call: FAISS on a GPU, torch, or the CPU.

For recall against exact search and for benchmarks; a server searches with `recsys.index`.
Shapes: N items, D dim, Q queries, K answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from recsys.schema import InputError, suggestion

Kind = Literal["flat", "ivf_flat", "cagra"]
CHUNK = 1 << 20
"""Items whose vectors lie on the device at a time, where they may not all."""
FREE = 0.8
"""Share of a device's free memory that vectors may take, to stay there between searches."""
QUERIES = 1024
"""Queries scored at a time: their scores take 4 bytes for each item of a chunk."""

Vectors = NDArray[np.float32]


class Nearest(NamedTuple):
    """Scores and rows [Q, K], best first."""

    scores_QK: Vectors
    rows_QK: NDArray[np.int64]


@dataclass(frozen=True)
class Searcher:
    """A search over fixed vectors: `by` says with what, and `exact` whether it misses nothing."""

    by: str
    exact: bool
    search: Callable[[Vectors, int], Nearest]


def searcher(
    vectors_ND: Vectors,
    device: torch.device | str = "cpu",
    kind: Kind = "flat",
    *,
    nprobe: int = 32,
) -> Searcher:
    """Return a search of the largest inner products on `device`.

    On a GPU that is FAISS's `kind` (flat, ivf_flat, or CAGRA's graph) where faiss-gpu-cuvs is
    installed, and else exact search through torch, which has no other kind. On the CPU it is FAISS.
    Raises InputError for a kind that there is not on the device.

    >>> searcher(np.eye(3, dtype=np.float32)).search(np.ones((1, 3), np.float32), 3).rows_QK.shape
    (1, 3)
    """
    if kind not in get_args(Kind):
        raise InputError(
            f"kind={kind!r}: expected one of {', '.join(get_args(Kind))}"
            + suggestion(str(kind), get_args(Kind))
        )
    device = torch.device(device)
    if device.type == "cuda" and faiss_gpus():
        return _on_gpu(vectors_ND, device.index or 0, kind, nprobe)
    if kind != "flat":
        raise InputError(
            f"kind={kind} on {device} needs faiss-gpu-cuvs, which sees {faiss_gpus()} GPUs here; "
            "pip install 'recsys[gpu]' on a machine with one, or take kind=flat"
        )
    return _on_cpu(vectors_ND) if device.type == "cpu" else _through_torch(vectors_ND, device)


def faiss_gpus() -> int:
    """Return how many GPUs FAISS can use: none where it was built without."""
    import faiss

    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _on_cpu(vectors_ND: Vectors) -> Searcher:
    import faiss

    def search(queries_QD: Vectors, k: int) -> Nearest:
        k = min(k, len(vectors_ND))
        return Nearest(*faiss.knn(queries_QD, vectors_ND, k, metric=faiss.METRIC_INNER_PRODUCT))

    return Searcher("FAISS, CPU, flat", True, search)


def _through_torch(vectors_ND: Vectors, device: torch.device) -> Searcher:
    """Search exactly by matrix products, the vectors on the device where they fit there."""
    chunks = [vectors_ND[start : start + CHUNK] for start in range(0, len(vectors_ND), CHUNK)]
    parts: list[Any] = chunks
    if _fits(vectors_ND.nbytes, device):
        parts = [_moved(chunk, device) for chunk in chunks]

    def search(queries_QD: Vectors, k: int) -> Nearest:
        k = min(k, len(vectors_ND))
        some = [queries_QD[at : at + QUERIES] for at in range(0, len(queries_QD), QUERIES)]
        found = [_best(_moved(queries, device), parts, k) for queries in some]
        return Nearest(*(torch.cat(part).cpu().numpy() for part in zip(*found, strict=True)))

    return Searcher(f"torch, {device}, exact", True, search)


@torch.no_grad()
def _best(queries_QD: torch.Tensor, parts: list[Any], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best scores and rows over parts of the vectors, merged one by one."""
    scores_QK = queries_QD.new_full((len(queries_QD), k), -torch.inf)
    rows_QK = torch.zeros(scores_QK.shape, dtype=torch.int64, device=queries_QD.device)
    start = 0
    for part in parts:
        vectors_CD = part if isinstance(part, torch.Tensor) else _moved(part, queries_QD.device)
        values, rows = (queries_QD @ vectors_CD.T).topk(min(k, len(vectors_CD)), dim=1)
        scores_QK, places = torch.cat([scores_QK, values], dim=1).topk(k, dim=1)
        rows_QK = torch.cat([rows_QK, rows + start], dim=1).gather(1, places)
        start += len(vectors_CD)
    return scores_QK, rows_QK


def _moved(array: Vectors, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32)).to(device)


def _fits(size: int, device: torch.device) -> bool:
    return device.type != "cuda" or size < FREE * torch.cuda.mem_get_info(device)[0]


def _on_gpu(vectors_ND: Vectors, number: int, kind: Kind, nprobe: int) -> Searcher:
    import faiss

    resources, dim = faiss.StandardGpuResources(), vectors_ND.shape[1]
    metric = faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        index = faiss.GpuIndexFlat(
            resources, dim, metric, _config(faiss.GpuIndexFlatConfig, number)
        )
        index.add(vectors_ND)
    elif kind == "ivf_flat":
        lists = max(1, round(4 * len(vectors_ND) ** 0.5))
        config = _config(faiss.GpuIndexIVFFlatConfig, number)
        index = faiss.GpuIndexIVFFlat(resources, dim, lists, metric, config)
        index.train(vectors_ND)
        index.add(vectors_ND)
        index.nprobe = min(nprobe, lists)
    else:
        config = _config(faiss.GpuIndexCagraConfig, number)
        index = faiss.GpuIndexCagra(resources, dim, metric, config)
        index.train(vectors_ND)

    def search(queries_QD: Vectors, k: int) -> Nearest:
        assert resources  # kept as long as its index
        return Nearest(*index.search(queries_QD, min(k, len(vectors_ND))))

    return Searcher(f"FAISS, GPU {number}, {kind}", kind == "flat", search)


def _config(of: Any, number: int) -> Any:
    config = of()
    config.device = number
    return config
