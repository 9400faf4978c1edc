"""Training batches: a pure function of (seed, epoch, step), read from the memory-mapped dataset."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from recsys.data.dataset import Dataset
from recsys.data.fresh import Fresh
from recsys.history import Arrays, Histories, encode, pack
from recsys.schema import InputError

Step = tuple[int, int]


class Batches(TorchDataset[dict[str, Tensor]]):
    """All batches of a training: indexed by (epoch, step), so any worker can make any of them."""

    layout: str
    derived: tuple[str, ...] = ("order",)
    """Attributes that a spawned worker makes again."""

    def __init__(self, dataset: Dataset, size: int, seed: int) -> None:
        self.dataset, self.size, self.seed = dataset, size, seed
        self._derive()

    def _derive(self) -> None:
        self.order = lru_cache(maxsize=1)(self._order)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is derived."""
        return {name: value for name, value in vars(self).items() if name not in self.derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._derive()

    @property
    def total(self) -> int:
        """Training examples."""
        raise NotImplementedError

    def collate(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Arrays:
        """Return the arrays of one batch of examples; what is drawn for it comes from `rng`."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return -(-self.total // self.size)

    def __getitem__(self, index: Step) -> dict[str, Tensor]:
        epoch, step = index
        rows = self.order(epoch)[step * self.size : (step + 1) * self.size]
        rng = np.random.default_rng([self.seed, epoch, step])
        arrays = self.collate(rows, rng)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.total)

    def loader(
        self, workers: int = 0, sampler: Steps | None = None
    ) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of one epoch after another; Lightning tells its sampler which."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=sampler or Steps(self.steps),
            num_workers=workers,
            persistent_workers=workers > 0,
        )


class Steps(Sampler[Step]):
    """Yields (epoch, step) in order, from `first` on; the shuffling is in the batches.

    A resumed training sets `epoch` and `first` before the loader's workers start to read ahead.
    """

    def __init__(self, steps: int, first: int = 0) -> None:
        self.steps, self.epoch, self.first = steps, 0, first

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that the next iteration yields; a new one begins at its first step."""
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def __len__(self) -> int:
        """All steps of an epoch, as Lightning counts them, wherever the iteration begins."""
        return self.steps

    def __iter__(self) -> Iterator[Step]:
        return ((self.epoch, step) for step in range(self.first, self.steps))


class EventBatches(Batches):
    """Batches of histories that end at training events, read from the memory-mapped dataset.

    With `fresh`, examples have new targets, and a share of them old ones, spread evenly.
    """

    derived = ("order", "users", "ends")

    def __init__(
        self, dataset: Dataset, size: int, seed: int, length: int, fresh: Fresh | None = None
    ) -> None:
        self.length, self.fresh = length, fresh
        super().__init__(dataset, size, seed)
        if not self.total:
            raise InputError(
                f"{dataset.path}: no user has two events to train on; prepare more events, or "
                "lower data.min_item_events and data.min_user_events"
            )

    def _derive(self) -> None:
        super()._derive()
        ends = self.dataset.split.train_end
        firsts = np.ones_like(ends)
        cut = firsts if self.fresh is None else np.clip(self.fresh.first_U, 1, np.maximum(ends, 1))
        new, old = self.examples(cut, ends), self.examples(firsts, cut)
        self.new, self.old = len(new[0]), len(old[0])
        self.users, self.ends = (np.concatenate(pair) for pair in zip(new, old, strict=True))

    @property
    def total(self) -> int:
        """Training examples of an epoch."""
        return self.new + (0 if self.fresh is None else self.fresh.replayed(self.new, self.old))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self.fresh is None:
            return super()._order(epoch)
        rng = np.random.default_rng([self.seed, epoch])
        replayed = self.new + rng.permutation(self.old)[: self.total - self.new]
        parts = rng.permutation(self.new), replayed
        places = [(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts]
        return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]

    def examples(
        self, firsts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each example's user row and the place in the trajectory where it ends.

        Its targets are at places from `firsts` up to but without `ends`, both int64 [U].
        """
        raise NotImplementedError


class PackedBatches(EventBatches):
    """`size` histories a batch, packed into few rows; every event after the first is a target.

    `windows`: `last` trains on each user's newest `length` positions, `all` on every position.
    `horizon`: each target is drawn among the next so many events; 1 is the next one.
    """

    layout = "packed"

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        seed: int,
        length: int,
        windows: Literal["last", "all"] = "all",
        horizon: int = 1,
        fresh: Fresh | None = None,
    ) -> None:
        if horizon < 1:
            raise InputError(f"batches.horizon={horizon}: expected 1 (the next event) or more")
        self.windows, self.horizon = windows, horizon
        super().__init__(dataset, size, seed, length, fresh)

    def examples(
        self, firsts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One example a window of `length` positions, counted back from the newest event."""
        users = np.flatnonzero(ends > firsts)
        targets, ends = ends[users] - firsts[users], ends[users]
        counts = np.ones_like(ends) if self.windows == "last" else -(-targets // self.length)
        back = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(users, counts), np.repeat(ends, counts) - back * self.length

    def collate(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Arrays:
        """Return packed rows, see `history.pack`."""
        histories = self.dataset.histories(self.users[rows], self.ends[rows], self.length + 1)
        return pack(histories, self.length, self.horizon, rng, self._trains(rows, histories))

    def _trains(self, rows: NDArray[np.int64], histories: Histories) -> NDArray[np.bool_] | None:
        if self.fresh is None:
            return None
        rows_E = np.repeat(rows, histories.lengths)
        to_end_E = np.repeat(histories.offsets[1:], histories.lengths) - np.arange(len(rows_E))
        places_E = self.ends[rows_E] - to_end_E
        return self.fresh.trains(self.users[rows_E], places_E, rows_E < self.new)


class PairBatches(EventBatches):
    """`size` pairs of a history and the event after it, every training position once an epoch."""

    layout = "pairs"

    def examples(
        self, firsts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One example a target; `ends` is its place."""
        counts = np.maximum(ends - firsts, 0)
        users = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - firsts, counts)
        if self.fresh is None:
            return users, places
        kept = places != self.fresh.held_U[users]
        return users[kept], places[kept]

    def collate(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Arrays:
        """Return right-padded histories, `users` (row + 1), `targets` and `target_types`."""
        users, ends = self.users[rows], self.ends[rows]
        places = self.dataset.offsets[users] + ends
        now = np.asarray(self.dataset.events["times"][places])
        targets, types = (
            np.asarray(self.dataset.events[name][places], np.int64) for name in ("items", "types")
        )
        histories = self.dataset.histories(users, ends, self.length)
        asked = {"users": users + 1, "targets": targets, "target_types": types}
        return encode(histories, self.length, now) | asked
