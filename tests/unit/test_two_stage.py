"""Both stages as one scorer, by hand: the ranker's order above, all else behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.evaluation.scorers import EvaluationBatch
from recsys.evaluation.two_stage import TwoStages
from recsys.history import Histories

SCORES = [9.0, 5.0, 4.0, 3.0, 2.0, 1.0]
"""Of items 0 (padding) to 5."""


class Fixed:
    """A retriever that answers everyone alike, from one buffer as the real one does."""

    name = "fixed"

    def __init__(self, scores: list[float], people: int) -> None:
        self.scores_BN = torch.tensor([scores] * people)

    def score(self, batch: EvaluationBatch) -> Tensor:
        return self.scores_BN


def batch_of(*seen: list[int]) -> EvaluationBatch:
    parts = [
        (np.array(items, np.int64), np.ones(len(items), int), np.arange(len(items)))
        for items in seen
    ]
    count = len(parts)
    return EvaluationBatch(np.arange(count), Histories.of(parts), np.full(count, 10**9))


class Told:
    """A ranker that prefers items in a given order and keeps what it was asked."""

    def __init__(self, *order: int) -> None:
        self.place = {item: -place for place, item in enumerate(order)}
        self.asked: list[np.ndarray] = []

    def __call__(self, batch: Any, items_BC: np.ndarray) -> np.ndarray:
        self.asked.append(items_BC)
        return np.array([[self.place[int(item)] for item in row] for row in items_BC], float)


def order(scores_BN: Tensor, b: int = 0) -> list[int]:
    return (scores_BN[b, 1:].argsort(descending=True) + 1).tolist()


def test_the_ranker_orders_the_candidates_and_the_others_stay_behind() -> None:
    rank, batch = Told(2, 3, 1), batch_of([5])
    retriever = Fixed(SCORES, 1)
    found = TwoStages(retriever, rank, candidates=3, exclude_seen=False).score(batch)
    assert order(found) == [2, 3, 1, 4, 5]
    assert rank.asked[0].tolist() == [[1, 2, 3]]
    assert retriever.scores_BN.tolist() == [SCORES], "the retriever's buffer is its own"


@pytest.mark.parametrize(("exclude", "offered"), [(True, [2, 4, 5]), (False, [1, 2, 3])])
def test_what_was_seen_is_left_out_before_the_ranker(exclude: bool, offered: list[int]) -> None:
    rank = Told(5, 4, 3, 2, 1)
    found = TwoStages(Fixed(SCORES, 2), rank, 3, exclude).score(batch_of([1, 3, 1], [2]))
    assert rank.asked[0][0].tolist() == offered
    assert order(found)[:3] == offered[::-1]
    assert order(found, 1)[:3] == ([4, 3, 1] if exclude else [3, 2, 1])


def test_more_candidates_than_there_are() -> None:
    """Seen items fill up the batch's rows, and stay where they were: no candidates."""
    rank = Told(5, 4, 3, 2, 1)
    found = TwoStages(Fixed(SCORES, 1), rank, 200, True).score(batch_of([1, 4]))
    assert rank.asked[0].shape == (1, 5)
    assert order(found) == [5, 3, 2, 1, 4]


def test_what_is_never_recommended_is_no_candidate() -> None:
    never = [0.0, 5.0, -torch.inf, 3.0, 2.0, -torch.inf]
    found = TwoStages(Fixed(never, 1), Told(2, 5, 4, 3, 1), 4, False).score(batch_of([1]))
    assert order(found)[:3] == [4, 3, 1]
    assert torch.isneginf(found[0, [2, 5]]).all()


def test_ties_keep_the_order_of_retrieval_and_large_scores_their_places() -> None:
    large = [0.0, 3e8, 2e8, 1e8, 5e7, 0.0]
    alike = TwoStages(Fixed(large, 1), lambda batch, items_BC: np.zeros(items_BC.shape), 3)
    assert order(alike.score(batch_of([5]))) == [1, 2, 3, 4, 5]
    turned = TwoStages(Fixed(large, 1), Told(3, 2, 1), 3).score(batch_of([5]))
    assert order(turned) == [3, 2, 1, 4, 5]
