"""How far an index must search for a stated recall against exact search, measured at build.

Shapes: N items, D dim, Q queries, K answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recsys.index.kinds import CODED, REFINES, Effort, chunks, search_parameters
from recsys.schema import InputError

log = logging.getLogger(__name__)

RECALL_AT = 100
TIMED_QUERIES = 200
SAMPLE = 1000
"""Queries that recall is measured on."""

Rows = NDArray[np.int64]
Vectors = NDArray[np.float32]


class Searchable(Protocol):
    """A FAISS index, or several that are searched as one."""

    @property
    def ntotal(self) -> int:
        """How many vectors it holds."""

    def search(self, queries_QD: Vectors, k: int, *, params: Any = None) -> tuple[Vectors, Rows]:
        """Return scores and rows, best first."""


def tune(
    index: Searchable,
    kind: str,
    vectors_ND: Vectors,
    queries_QD: Vectors,
    target: float,
    nlist: int = 0,
) -> dict[str, Any]:
    """Find the least effort that reaches `target` recall@100, and record the curve up to it.

    Where an index holds codes alone, it is the recall after `refine` candidates for each answer
    were scored exactly, and the least `refine` for it is found too. Where no effort reaches the
    target, the least that comes within 0.001 of the best is taken, with a warning.
    """
    if kind == "flat":
        point = {"recall@100": 1.0, "p50_ms": _p50_ms(index, kind, 0, 1, queries_QD)}
        return {"recall": 1.0, "curve": [point]}
    name = "ef_search" if kind == "hnsw" else "nprobe"
    wanted_QK = exact_top(vectors_ND, queries_QD, RECALL_AT)
    curve: list[dict[str, Any]] = []
    for effort in _efforts(kind, index.ntotal, nlist):
        point = _measured(index, kind, effort, queries_QD, wanted_QK, target)
        curve.append({name: effort, **point})
        if point["recall@100"] >= target:
            break
    best = curve[-1]
    if best["recall@100"] < target:
        near = max(point["recall@100"] for point in curve) - 0.001
        best = next(point for point in curve if point["recall@100"] >= near)
        log.warning("%s index: recall@100 is %s, below %s", kind, best["recall@100"], target)
    chosen = {key: best[key] for key in (name, "refine") if key in best}
    return {**chosen, "target_recall": target, "recall": best["recall@100"], "curve": curve}


def _measured(
    index: Searchable,
    kind: str,
    effort: Effort,
    queries_QD: Vectors,
    wanted_QK: Rows,
    target: float,
) -> dict[str, Any]:
    """Return recall and latency at one effort, of codes with the least refinement that serves."""
    k = wanted_QK.shape[1]
    refines = REFINES if kind == "ivf_pq" else (2,) if kind in CODED else (1,)
    fetched = min(refines[-1] * k, index.ntotal)
    found = index.search(queries_QD, fetched, params=search_parameters(kind, effort))[1]
    # What is scored exactly is in its right order: only what was not fetched is missing.
    recalls = {refine: round(overlap(found[:, : refine * k], wanted_QK), 4) for refine in refines}
    enough = min(target, recalls[refines[-1]])
    refine = next(refine for refine in refines if recalls[refine] >= enough)
    p50_ms = _p50_ms(index, kind, effort, refine, queries_QD)
    point = {"recall@100": recalls[refine], "p50_ms": p50_ms}
    return {"refine": refine, **point} if kind in CODED else point


def exact_top(vectors_ND: Vectors, queries_QD: Vectors, k: int) -> Rows:
    """Return the `k` rows of largest inner product with each query, exactly: int64 [Q, K].

    The vectors are read a part at a time, so that they may be larger than memory.
    """
    import faiss

    k = min(k, len(vectors_ND))
    best_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
    rows_QK = np.full(best_QK.shape, -1, np.int64)
    for part in chunks(vectors_ND):
        some = np.asarray(vectors_ND[part])
        scores, rows = faiss.knn(
            queries_QD, some, min(k, len(some)), metric=faiss.METRIC_INNER_PRODUCT
        )
        scores = np.concatenate([best_QK, scores], axis=1)
        rows = np.concatenate([rows_QK, rows + part.start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_QK[:] = np.take_along_axis(scores, order, axis=1)
        rows_QK[:] = np.take_along_axis(rows, order, axis=1)
    return rows_QK


def overlap(found_QK: Rows, wanted_QK: Rows) -> float:
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


def queries_of(queries: Vectors | None, vectors_ND: Vectors) -> Vectors:
    """Return up to 1,000 of the queries, or of the items themselves where there are none."""
    source = vectors_ND if queries is None else queries
    if source.shape[1] != vectors_ND.shape[1]:
        raise InputError(
            f"query vectors have {source.shape[1]} dimensions, item vectors {vectors_ND.shape[1]}"
        )
    chosen = np.random.default_rng(0).permutation(len(source))[:SAMPLE]
    return np.ascontiguousarray(source[np.sort(chosen)], np.float32)


def _efforts(kind: str, num_items: int, nlist: int) -> list[Effort]:
    first, last = (RECALL_AT, max(RECALL_AT, num_items)) if kind == "hnsw" else (1, nlist)
    steps = (first * 2**power * half // 2 for power in range(32) for half in (2, 3))
    return sorted({min(step, last) for step in steps})


def _p50_ms(
    index: Searchable, kind: str, effort: Effort, refine: int, queries_QD: Vectors
) -> float:
    parameters = search_parameters(kind, effort)
    k = min(refine * RECALL_AT, index.ntotal)
    seconds = []
    with one_thread():
        for query_D in queries_QD[:TIMED_QUERIES]:
            started = time.perf_counter()
            index.search(query_D[None], k, params=parameters)
            seconds.append(time.perf_counter() - started)
    return round(float(np.median(seconds)) * 1e3, 4)
