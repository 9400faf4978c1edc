"""Search made-up aisles' vectors on one device: build time, recall@100, queries/s, p50 of one."""

from __future__ import annotations

import json
import statistics
import sys
from time import perf_counter

import numpy as np
import torch
from aisles import vectors

from recsys.evaluation import device_search
from recsys.evaluation.device_search import searcher

QUERIES, K = 1_000, 100


def timed(search: device_search.Searcher, queries: np.ndarray) -> float:
    started = perf_counter()
    search.search(queries, K)
    return perf_counter() - started


def main() -> None:
    given = json.loads(sys.argv[1])
    items_ND = vectors(np.arange(1, given["items"] + 1), given["dim"])
    rng = np.random.default_rng(1)
    queries_QD = items_ND[rng.integers(0, len(items_ND), QUERIES)]
    queries_QD = queries_QD + 0.01 * rng.normal(size=queries_QD.shape).astype(np.float32)
    if given["kind"] == "torch":
        given["kind"] = "flat"
        device_search.faiss_gpus = lambda: 0
    if given["device"] == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device")
    started = perf_counter()
    search = searcher(items_ND, given["device"], given["kind"])
    built = perf_counter() - started
    found = search.search(queries_QD, K).rows_QK
    wanted = found if search.exact else searcher(items_ND).search(queries_QD, K).rows_QK
    both = [np.isin(f, w).mean() for f, w in zip(found, wanted, strict=True)]
    one = [timed(search, queries_QD[[row]]) for row in range(30)]
    figures = {
        "by": search.by,
        "build_seconds": round(built, 2),
        "recall@100": round(float(np.mean(both)), 4),
        "queries_per_second": round(QUERIES / timed(search, queries_QD), 1),
        "one_p50_ms": round(1e3 * statistics.median(one), 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
