"""What every model must beat: popularity, and items that were taken together.

Shapes: E training events, U users, B users of a batch, N + 1 items with padding at 0.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from recsys.data.batches import LARGE
from recsys.data.dataset import Dataset
from recsys.evaluation.scorers import EvaluationBatch, Scorer
from recsys.history import Histories
from recsys.schema import InputError

DAY = 86_400_000
BLOCK = 1024
"""Items whose neighbours are sought at once, so that memory does not grow with items squared."""
BREAK_TIES = 1e-6
"""Weight of popularity in item-kNN: under any similarity, over nothing."""
RECENT = 0.7
"""Decay of the recent item-kNN: best of 0.7, 0.8, 0.9 on validation, Beauty and MovieLens-small."""


class TrainingEvents(NamedTuple):
    """Users (rows), items and times (milliseconds) of the events that train: int64 [E]."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    times: NDArray[np.int64]


def training_events(dataset: Dataset) -> TrainingEvents:
    """Return every event before its user's training end."""
    lengths_U = np.diff(dataset.offsets)
    users = np.repeat(np.arange(dataset.num_users), lengths_U)
    places = np.arange(len(users)) - dataset.offsets[users]
    trains = places < dataset.split.train_end[users]
    columns = (np.asarray(dataset.events[c], np.int64)[trains] for c in ("items", "times"))
    return TrainingEvents(users[trains], *columns)


class Popularity:
    """Scores an item by its number of training events, the same for everybody.

    With `recent_days` only the last days before the end of training count. Raises InputError where
    that is asked for and the dataset has no times.
    """

    name = "popularity"

    def __init__(self, dataset: Dataset, recent_days: float | None = None) -> None:
        counts_N = dataset.train_count
        if recent_days is not None:
            self.name = f"popularity, {recent_days:g} days"
            counts_N = _recent_counts(dataset, recent_days)
        self.scores_N = torch.from_numpy(counts_N.astype(np.float32))

    def score(self, batch: EvaluationBatch) -> Tensor:
        """Return the counts once a user: [B, N + 1], one row in memory."""
        return self.scores_N.expand(len(batch), -1)


def _recent_counts(dataset: Dataset, days: float) -> NDArray[np.int64]:
    if not dataset.has_time:
        raise InputError(
            f"dataset {dataset.name} has no times, so that no days are recent; "
            "use popularity without recent_days"
        )
    if not days > 0:
        raise InputError(f"recent_days={days:g}: expected more than 0, as in 30")
    events = training_events(dataset)
    recent = events.times > events.times.max(initial=0) - days * DAY
    return np.bincount(events.items[recent], minlength=dataset.num_items + 1)


class ItemKNN:
    """Scores an item by its similarity to the items of the history.

    Similarity is the cosine of two items' training users, common / (sqrt(n_i · n_j) + shrink), and
    only each item's `k_neighbours` nearest count (Sarwar et al. 2001; shrinkage as in Bell and
    Koren 2007). An event's weight is `decay` to the power of the events since. Items with equal
    scores, most of them 0, go by popularity.
    """

    def __init__(
        self, dataset: Dataset, k_neighbours: int = 100, shrink: float = 10.0, decay: float = 1.0
    ) -> None:
        _check(k_neighbours, shrink, decay)
        self.decay = decay
        self.similarity_NN = neighbours(_taken(dataset), k_neighbours, shrink)
        counts_N = dataset.train_count
        self.popularity_N = (BREAK_TIES * counts_N / max(1, counts_N.max())).astype(np.float32)

    @property
    def name(self) -> str:
        """What tables call it: its decay tells it from the plain one."""
        return "item-kNN" if self.decay == 1 else f"item-kNN, decay {self.decay:g}"

    def with_decay(self, decay: float) -> ItemKNN:
        """Return the same neighbours under another weight of past events."""
        other = copy(self)
        other.decay = decay
        return other

    def score(self, batch: EvaluationBatch) -> Tensor:
        """Return the weighted sum of the history items' similarities: [B, N + 1]."""
        scores_BN = (self._weights(batch.histories) @ self.similarity_NN).toarray()
        scores_BN += self.popularity_N
        return torch.from_numpy(scores_BN)

    def _weights(self, histories: Histories) -> sparse.csr_array:
        newest = np.repeat(histories.offsets[1:] - 1, histories.lengths)
        since = newest - np.arange(len(histories.items))
        weights = np.power(self.decay, since, dtype=np.float32)
        shape = (len(histories), len(self.popularity_N))
        return sparse.csr_array((weights, histories.items, histories.offsets), shape=shape)


def _check(k_neighbours: int, shrink: float, decay: float) -> None:
    if k_neighbours < 1:
        raise InputError(f"k_neighbours={k_neighbours}: expected at least 1, as in 100")
    if not shrink >= 0:
        raise InputError(f"shrink={shrink:g}: expected at least 0, as in 10")
    if not 0 < decay <= 1:
        raise InputError(f"decay={decay:g}: expected above 0 and at most 1, as in 0.9")


def _taken(dataset: Dataset) -> sparse.csr_array:
    """Return which user took which item in training: 0 or 1, [U, N + 1]."""
    events = training_events(dataset)
    once = np.ones(len(events.users), np.float32)
    shape = (dataset.num_users, dataset.num_items + 1)
    taken_UN = sparse.csr_array((once, (events.users, events.items)), shape=shape)
    taken_UN.sum_duplicates()
    taken_UN.data[:] = 1
    return taken_UN


def neighbours(taken_UN: sparse.csr_array, k: int, shrink: float = 0.0) -> sparse.csr_array:
    """Return each item's `k` largest cosine similarities to others: sparse [N, N], a row an item.

    `taken_UN` holds 0 and 1.

    >>> taken = sparse.csr_array(np.array([[1, 1, 0], [1, 1, 1], [0, 0, 1]], np.float32))
    >>> neighbours(taken, k=1).toarray().round(2).tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0]]
    """
    taken_NU = taken_UN.T.tocsr()
    counts_N = np.diff(taken_NU.indptr)
    blocks = []
    for start in range(0, len(counts_N), BLOCK):
        common = (taken_NU[start : start + BLOCK] @ taken_UN).tocoo()
        rows, columns = common.coords
        other = rows + start != columns
        rows, columns, data = rows[other], columns[other], common.data[other]
        scale = np.sqrt(counts_N[rows + start].astype(np.float32) * counts_N[columns]) + shrink
        block = sparse.csr_array((data / scale, (rows, columns)), shape=common.shape)
        blocks.append(_largest(block, k))
    return sparse.vstack(blocks, format="csr", dtype=np.float32)


def _largest(values_MN: sparse.csr_array, k: int) -> sparse.csr_array:
    """Return the `k` largest values of each row; of equal ones those of the lowest columns."""
    values_MN.sort_indices()
    kept = []
    for start, end in zip(values_MN.indptr, values_MN.indptr[1:], strict=False):
        order = np.argsort(-values_MN.data[start:end], kind="stable")[:k]
        kept.append(start + order)
    source = np.concatenate(kept)
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in kept])])
    columns = values_MN.data[source], values_MN.indices[source], indptr
    return sparse.csr_array(columns, shape=values_MN.shape)


def baselines(dataset: Dataset) -> list[Scorer]:
    """Return the scorers that every evaluation puts beside the model.

    Item-kNN comes twice: as published, and with newer events first, which is far harder to beat;
    not at all for logs past memory, all of which it reads at once.
    """
    if len(dataset.events["items"]) > LARGE:
        return [Popularity(dataset)]
    plain = ItemKNN(dataset)
    return [Popularity(dataset), plain, plain.with_decay(RECENT)]
