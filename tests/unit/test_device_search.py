"""Search on a device finds what brute force finds, in parts and with fewer items than asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recsys.evaluation import device_search
from recsys.evaluation.device_search import searcher
from recsys.schema import InputError

VECTORS_ND = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
QUERIES_QD = np.random.default_rng(1).normal(size=(7, 8)).astype(np.float32)


def through_torch(vectors_ND: np.ndarray) -> device_search.Searcher:
    """The way of a GPU without faiss-gpu, rehearsed on the CPU."""
    return device_search._through_torch(vectors_ND, torch.device("cpu"))


@pytest.mark.parametrize("make", [searcher, through_torch])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_it_finds_the_largest_products(make, k, monkeypatch):
    monkeypatch.setattr(device_search, "CHUNK", 70)
    monkeypatch.setattr(device_search, "QUERIES", 3)
    found = make(VECTORS_ND).search(QUERIES_QD, k)
    scores_QN = QUERIES_QD @ VECTORS_ND.T
    wanted = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.rows_QK, wanted)
    np.testing.assert_allclose(
        found.scores_QK, np.take_along_axis(scores_QN, wanted, axis=1), atol=1e-5
    )


def test_vectors_that_do_not_fit_are_moved_in_parts(monkeypatch):
    monkeypatch.setattr(device_search, "CHUNK", 70)
    monkeypatch.setattr(device_search, "_fits", lambda *_: False)
    rows = through_torch(VECTORS_ND).search(QUERIES_QD, 9).rows_QK
    np.testing.assert_array_equal(rows, searcher(VECTORS_ND).search(QUERIES_QD, 9).rows_QK)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("cagra", "needs faiss-gpu-cuvs, which sees 0 GPUs"), ("flatt", "did you mean 'flat'")],
)
def test_kinds_that_there_are_not(kind, message, monkeypatch):
    monkeypatch.setattr(device_search, "faiss_gpus", lambda: 0)
    with pytest.raises(InputError, match=message):
        searcher(VECTORS_ND, kind=kind)
