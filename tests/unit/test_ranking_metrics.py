"""Ranks and metrics against hand-worked tables and an obvious reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.metrics import (
    coverage,
    exposure,
    mean_popularity,
    metric,
    mrr_at,
    ndcg_at,
    ranks,
    ranks_without,
    recall_at,
)
from recsys.schema import InputError

# rank, then recall@10, ndcg@10, mrr@10
TABLE = [
    (1.0, 1, 1.0, 1.0),
    (2.0, 1, 1 / math.log2(3), 0.5),
    (2.5, 1, 1 / math.log2(3.5), 0.4),
    (10.0, 1, 1 / math.log2(11), 0.1),
    (10.5, 0, 0.0, 0.0),
    (11.0, 0, 0.0, 0.0),
]


@pytest.mark.parametrize(("rank", "recall", "ndcg", "mrr"), TABLE)
def test_hand_worked_table(rank: float, recall: float, ndcg: float, mrr: float) -> None:
    one = torch.tensor([rank])
    assert recall_at(one, 10).item() == recall
    assert ndcg_at(one, 10).item() == pytest.approx(ndcg)
    assert mrr_at(one, 10).item() == pytest.approx(mrr)


def reference_rank(scores: list[float], target: int, left_out: set[int]) -> float:
    others = [s for i, s in enumerate(scores) if i != target and i not in left_out]
    above = sum(s > scores[target] for s in others)
    tied = sum(s == scores[target] for s in others)
    return 1 + above + tied / 2


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], list[int], list[set[int]]]:
    users, items = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    # Few distinct scores make ties; -inf is an item that is never recommended.
    score = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5000001, 3.0])
    scores = draw(
        st.lists(st.lists(score, min_size=items, max_size=items), min_size=users, max_size=users)
    )
    targets = draw(st.lists(st.integers(0, items - 1), min_size=users, max_size=users))
    seen = [draw(st.sets(st.integers(0, items - 1))) - {target} for target in targets]
    return scores, targets, seen


@settings(deadline=None, max_examples=200)
@given(cases())
def test_ranks_equal_the_reference(case: tuple) -> None:
    scores, targets, seen = case
    scores_BN, targets_B = torch.tensor(scores), torch.tensor(targets)
    every_B = ranks(scores_BN, targets_B)
    pairs = [(row, item) for row, items in enumerate(seen) for item in sorted(items)]
    rows_S, items_S = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    without_B = ranks_without(every_B, scores_BN, targets_B, rows_S, items_S)
    rows = list(zip(scores, targets, seen, strict=True))
    assert every_B.tolist() == [reference_rank(s, t, set()) for s, t, _ in rows]
    assert without_B.tolist() == [reference_rank(s, t, left_out) for s, t, left_out in rows]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_ranks_of_all_items_sum_up_and_ignore_the_order(items: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores_N = torch.from_numpy(rng.integers(0, 5, items).astype(np.float32))
    scores_NN = scores_N.expand(items, -1)
    every = ranks(scores_NN, torch.arange(items))
    assert every.sum().item() == items * (items + 1) / 2
    order = torch.from_numpy(rng.permutation(items))
    assert torch.equal(ranks(scores_NN[:, order], torch.arange(items)), every[order])
    assert torch.equal(ranks(2 * scores_NN - 7, torch.arange(items)), every)


def test_a_constant_scorer_gains_nothing() -> None:
    assert ranks(torch.zeros(3, 101), torch.tensor([0, 50, 100])).tolist() == [51.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blocks_and_types_agree(dtype: torch.dtype) -> None:
    scores_BN = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets_B = torch.arange(300) * 7
    at_B1 = scores_BN.gather(1, targets_B[:, None])
    above_B, tied_B = (scores_BN > at_B1).sum(1), (scores_BN == at_B1).sum(1) - 1
    assert torch.equal(ranks(scores_BN, targets_B), 1 + above_B.double() + tied_B.double() / 2)


def test_scores_are_not_written_to() -> None:
    scores_BN = torch.randn(4, 9)
    before = scores_BN.clone()
    ranks(scores_BN, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(scores_BN, before)


@pytest.mark.parametrize("place", [(1, 0), (1, 3)])
def test_nan_is_refused(place: tuple[int, int]) -> None:
    scores_BN = torch.zeros(3, 4)
    scores_BN[place] = math.nan
    with pytest.raises(InputError, match="NaN for 1 of 3 users"):
        ranks(scores_BN, torch.tensor([0, 0, 0]))


def test_metric_by_name() -> None:
    assert metric("ndcg@1", torch.tensor([1.0, 2.0])).tolist() == [1, 0]


@pytest.mark.parametrize("name", ["ndgc@10", "ndcg", "ndcg@", "ndcg@0", "ndcg@-1", "ndcg@x"])
def test_unknown_metric_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown metric"):
        metric(name, torch.tensor([1.0]))


def test_exposure_adds_up_over_batches() -> None:
    first, second = torch.tensor([[1, 2]]), torch.tensor([[2, 0]])
    shown_N = exposure(first, 4) + exposure(second, 4)
    assert torch.equal(shown_N, exposure(torch.cat([first, second]), 4))
    assert coverage(shown_N) == 2 / 4
    share_N = torch.tensor([0, 0.6, 0.3, 0.1, 0])
    assert mean_popularity(shown_N, share_N) == pytest.approx((0.6 + 0.3 + 0.3) / 3)


def test_nothing_recommended() -> None:
    assert mean_popularity(torch.zeros(3, dtype=torch.int64), torch.ones(3)) == 0
