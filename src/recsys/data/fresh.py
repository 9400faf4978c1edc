"""What a continued training learns from: what is new since the run before, and some of the old.

Shapes: U users, N items, E events of some histories.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from recsys.data.dataset import Dataset
from recsys.data.splits import FOREVER
from recsys.schema import InputError

Ints = NDArray[np.int64]


class Fresh:
    """Where each user's new events begin: targets at `first_U` and later are new, others old.

    first_U: place of the first event that the run before has not trained on: int64 [U]. held_U:
    place of the event that it was tested on, -1 for none; never a target, so that what is
    forgotten can be measured. replay: share of the examples that have old targets.
    """

    # No dataclass: Hydra would make a config of it.
    def __init__(self, first_U: Ints, held_U: Ints, replay: float) -> None:
        if not 0 <= replay < 1:
            raise InputError(f"replay={replay}: expected a share, 0 or more and below 1")
        self.first_U, self.held_U, self.replay = first_U, held_U, replay

    @classmethod
    def since(cls, before: Dataset, now: Dataset, replay: float) -> Fresh:
        """Return what is new in `now`, which has grown from `before`."""
        first_U, held_U = np.zeros(now.num_users, np.int64), np.full(now.num_users, -1)
        users = np.arange(before.num_users)
        first_U[users] = now.places(users, _cut(before))
        tested = np.flatnonzero(before.split.test >= 0)
        at = before.offsets[tested] + before.split.test[tested]
        times, items, types = (before.events[name][at] for name in ("times", "items", "types"))
        held_U[tested] = now.find(tested, times, items, types)
        return cls(first_U, held_U, replay)

    def cut(self, ends_U: Ints) -> Ints:
        """Return the place of each user's first new target, at most where training ends: [U]."""
        return np.clip(self.first_U, 1, np.maximum(ends_U, 1))

    def trains(self, users_E: Ints, places_E: Ints, new_E: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which events may be targets: in an example of new ones (`new_E`) only those."""
        return (places_E != self.held_U[users_E]) & (~new_E | (places_E >= self.first_U[users_E]))

    def replayed(self, new: int, old: int) -> int:
        """Return how many of `old` examples go with `new` ones, so that their share is `replay`."""
        return min(old, round(new * self.replay / (1 - self.replay)))

    def share(self, dataset: Dataset) -> NDArray[np.float64]:
        """Return each item's share of the targets, new and replayed: [N + 1], 0 for padding."""
        lengths = np.diff(dataset.offsets)
        users_E = np.repeat(np.arange(dataset.num_users), lengths)
        places_E = np.arange(len(users_E)) - dataset.offsets[users_E]
        trains_E = (places_E > 0) & (places_E < dataset.split.train_end[users_E])
        trains_E &= places_E != self.held_U[users_E]
        new_E = places_E >= self.first_U[users_E]
        weights = (1 - self.replay, new_E), (self.replay, ~new_E)
        items_E, total = dataset.events["items"], np.zeros(dataset.num_items + 1)
        for weight, some_E in weights:
            counts = np.bincount(items_E[trains_E & some_E], minlength=len(total))
            total += weight * counts / max(1, counts.sum())
        return total


class Replaying:
    """All new examples in any order, and old ones drawn anew each epoch, spread evenly between.

    New examples are counted first, then old ones.

    >>> fresh = Fresh(np.zeros(1, int), np.zeros(1, int), replay=0.5)
    >>> (Replaying(fresh, 2, 5, seed=0).rows(0, 0, 4) >= 2).tolist()
    [False, True, False, True]
    """

    def __init__(self, fresh: Fresh, new: int, old: int, seed: int) -> None:
        self.new, self.old, self.seed = new, old, seed
        self.replayed = fresh.replayed(new, old)
        self.order = lru_cache(maxsize=1)(self._order)

    def rows(self, epoch: int, first: int, last: int) -> Ints:
        """Return the examples from place `first` up to `last` of an epoch."""
        return self.order(epoch)[first:last]

    def _order(self, epoch: int) -> Ints:
        rng = np.random.default_rng([self.seed, epoch])
        new, old = (rng.permutation(count) for count in (self.new, self.old))
        parts = new, self.new + old[: self.replayed]
        places = [(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts]
        return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]


def _cut(dataset: Dataset) -> Ints:
    """Return the moment from which each user's events do not train: int64 [U]."""
    split = dataset.manifest["split"]
    if "validation_from" in split:
        return np.full(dataset.num_users, split["validation_from"])
    ends, lengths = dataset.split.train_end, np.diff(dataset.offsets)
    moments = np.full(dataset.num_users, FOREVER)
    some = np.flatnonzero(lengths)
    last = np.minimum(ends[some], lengths[some] - 1)
    moments[some] = dataset.events["times"][dataset.offsets[some] + last]
    moments[some] += ends[some] == lengths[some]
    return moments
