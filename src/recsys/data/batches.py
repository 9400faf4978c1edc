"""Training batches: a pure function of (seed, epoch, step), read from the memory-mapped dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from recsys.data.dataset import Dataset
from recsys.data.fresh import Fresh, Replaying
from recsys.data.shuffle import Everywhere, Order, Windows
from recsys.history import Arrays, Histories, encode, pack
from recsys.schema import InputError

Step = tuple[int, int]
Shuffle = Literal["auto", "global"] | int
LARGE = 1 << 27
"""Events from which `auto` shuffles within windows: their order alone would take a gigabyte."""
WINDOW = 1 << 23
"""Events of a window then: some 110 MB."""
BLOCK = 1 << 16
"""Events that lie together on the disk and are read together."""
IDLE = "idle"
"""Marks a part without an example of its own: it holds another's, which is not to count."""


class Batches(TorchDataset[dict[str, Tensor]]):
    """All batches of a training: indexed by (epoch, step), so any worker can make any of them.

    `part`: which of how many parts of each batch is made, one a process that trains; the batches
    themselves are the same however many there are.
    """

    layout: str
    part = (0, 1)
    derived: tuple[str, ...] = ("order",)
    """Attributes that a spawned worker makes again."""

    def __init__(self, dataset: Dataset, size: int, seed: int) -> None:
        self.dataset, self.size, self.seed = dataset, size, seed
        self._derive()

    def _derive(self) -> None:
        self.order = self.ordered()

    def ordered(self) -> Order:
        """Return where each example stands in each epoch."""
        return Everywhere(self.total, self.seed)

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

    def cost(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what each example takes to train on, by which a batch is divided."""
        return np.ones(len(rows), np.int64)

    def draws(self, rows: NDArray[np.int64]) -> int:
        """Return how many numbers `collate` draws for some examples, one after the other."""
        return 0

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return -(-self.total // self.size)

    def __getitem__(self, index: Step) -> dict[str, Tensor]:
        epoch, step = index
        rows = self.order.rows(epoch, step * self.size, (step + 1) * self.size)
        mine = share(self.cost(rows), *self.part)
        rng = np.random.default_rng([self.seed, epoch, step])
        # What the parts before this one draw is left to them.
        rng.bit_generator.advance(self.draws(rows[: mine.start]))  # type: ignore[attr-defined]
        arrays = self.collate(rows[mine] if mine.stop > mine.start else rows[:1], rng)
        if mine.stop == mine.start:
            arrays[IDLE] = np.ones(1, np.bool_)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

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


def share(cost_B: NDArray[np.int64], part: int, parts: int) -> slice:
    """Return which neighbours of a batch are of a part, all parts costing about the same.

    >>> [share(np.array([5, 1, 1, 1, 1, 1]), part, 2) for part in (0, 1)]
    [slice(0, 1, None), slice(1, 6, None)]
    """
    middle_B = np.cumsum(cost_B) - cost_B / 2
    owner_B = (middle_B * parts / max(1, cost_B.sum())).astype(np.int64)
    first, last = np.searchsorted(owner_B, [part, part + 1])
    return slice(int(first), int(last))


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

    `shuffle`: `global` lets any example follow any; a number shuffles within windows of about so
    many events, which are read block by block; `auto` does that with data past memory. Of the
    examples only how many each user has is kept, 8 bytes a user. With `fresh`, examples have new
    targets, and a share of them old ones, spread evenly; the order is then in memory.
    """

    derived = ("order", "before", "ranges")

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        seed: int,
        length: int,
        shuffle: Shuffle = "auto",
        fresh: Fresh | None = None,
    ) -> None:
        if shuffle not in ("auto", "global") and (isinstance(shuffle, str) or shuffle < 1):
            raise InputError(
                f"batches.shuffle={shuffle}: expected auto, global, or the events of a window, "
                f"as in {WINDOW}"
            )
        self.length, self.shuffle, self.fresh = length, shuffle, fresh
        super().__init__(dataset, size, seed)
        if not self.total:
            raise InputError(
                f"{dataset.path}: no user has two events to train on; prepare more events, or "
                "lower data.min_item_events and data.min_user_events"
            )

    def _derive(self) -> None:
        ends = self.dataset.split.train_end
        self.ranges = [(np.broadcast_to(np.int64(1), len(ends)), ends)]
        if self.fresh is not None:
            firsts, cut = self.ranges[0][0], self.fresh.cut(ends)
            self.ranges = [(cut, ends), (firsts, cut)]
        counts = [self.counts(*places) for places in self.ranges]
        self.before = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        super()._derive()

    def ordered(self) -> Order:
        """Return the order that `shuffle` asks for: it depends on nothing but data and settings."""
        if self.fresh is not None:
            return Replaying(self.fresh, self.new, int(self.before[-1]) - self.new, self.seed)
        events = len(self.dataset.events["items"])
        large = self.shuffle == "auto" and events > LARGE
        if isinstance(self.shuffle, str) and not large:
            return super().ordered()
        window = WINDOW if isinstance(self.shuffle, str) else self.shuffle
        block = max(1, min(BLOCK, window // 8) * self.total // max(1, events))
        count = max(1, window * self.total // max(1, events) // block)
        self.dataset.read_sparsely()
        return Windows(self.total, self.seed, block, count, self._read_ahead)

    def _read_ahead(self, runs: list[tuple[int, int]]) -> None:
        users = self.find(np.array([[first, last - 1] for first, last in runs]).reshape(-1))[0]
        offsets = self.dataset.offsets
        self.dataset.read_ahead(
            [(int(offsets[a]), int(offsets[b + 1])) for a, b in users.reshape(-1, 2) if a <= b]
        )

    @property
    def total(self) -> int:
        """Training examples of an epoch."""
        old = int(self.before[-1]) - self.new
        return self.new + (0 if self.fresh is None else self.fresh.replayed(self.new, old))

    @property
    def new(self) -> int:
        """Examples of new targets, the first ones; all, where none are old."""
        return int(self.before[self.dataset.num_users])

    def counts(self, firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many examples each user has: int64 [U].

        Of targets at places from `firsts` up to but without `lasts`, both int64 [U].
        """
        raise NotImplementedError

    def find(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each example's user row, and the place in the trajectory where it ends."""
        at = np.searchsorted(self.before, rows, side="right") - 1
        of, users = np.divmod(at, self.dataset.num_users)
        ends = np.zeros(len(rows), np.int64)
        for number, (firsts, lasts) in enumerate(self.ranges):
            some = of == number
            who, nth = users[some], (rows - self.before[at])[some]
            ends[some] = self.ends(who, nth, firsts[who], lasts[who])
        return users, ends

    def ends(
        self,
        users: NDArray[np.int64],
        nth: NDArray[np.int64],
        firsts: NDArray[np.int64],
        lasts: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Return where the examples end that are each user's `nth`; all are int64 [B]."""
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
        shuffle: Shuffle = "auto",
        fresh: Fresh | None = None,
    ) -> None:
        if horizon < 1:
            raise InputError(f"batches.horizon={horizon}: expected 1 (the next event) or more")
        self.windows, self.horizon = windows, horizon
        super().__init__(dataset, size, seed, length, shuffle, fresh)

    def counts(self, firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> NDArray[np.int64]:
        """One example a window of `length` positions."""
        targets = np.maximum(lasts - firsts, 0)
        return np.minimum(targets, 1) if self.windows == "last" else -(-targets // self.length)

    def ends(
        self,
        users: NDArray[np.int64],
        nth: NDArray[np.int64],
        firsts: NDArray[np.int64],
        lasts: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Windows are counted back from the newest event."""
        return lasts - nth * self.length

    def cost(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return each example's positions."""
        return np.minimum(self.find(rows)[1] - 1, self.length)

    def draws(self, rows: NDArray[np.int64]) -> int:
        """One number a position, by which its target is chosen."""
        return int(self.cost(rows).sum()) if self.horizon > 1 else 0

    def collate(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Arrays:
        """Return packed rows, see `history.pack`."""
        users, ends = self.find(rows)
        histories = self.dataset.histories(users, ends, self.length + 1)
        trains = (
            None if self.fresh is None else self._trains(rows < self.new, users, ends, histories)
        )
        return pack(histories, self.length, self.horizon, rng, trains)

    def _trains(
        self,
        new: NDArray[np.bool_],
        users: NDArray[np.int64],
        ends: NDArray[np.int64],
        histories: Histories,
    ) -> NDArray[np.bool_] | None:
        """Return which events of the histories may be targets; None for all."""
        if self.fresh is None:
            return None
        lengths = histories.lengths
        to_end = np.repeat(histories.offsets[1:], lengths) - np.arange(histories.offsets[-1])
        places = np.repeat(ends, lengths) - to_end
        return self.fresh.trains(np.repeat(users, lengths), places, np.repeat(new, lengths))


class PairBatches(EventBatches):
    """`size` pairs of a history and the event after it, every training position once an epoch."""

    layout = "pairs"

    def counts(self, firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> NDArray[np.int64]:
        """One example for each target; none for one that is held out."""
        targets = np.maximum(lasts - firsts, 0)
        if self.fresh is None:
            return targets
        held = self.fresh.held_U
        return targets - ((held >= firsts) & (held < lasts))

    def ends(
        self,
        users: NDArray[np.int64],
        nth: NDArray[np.int64],
        firsts: NDArray[np.int64],
        lasts: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """The place of the target."""
        places = firsts + nth
        if self.fresh is None:
            return places
        held = self.fresh.held_U[users]
        return places + ((held >= firsts) & (places >= held))

    def collate(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Arrays:
        """Return right-padded histories, `users` (row + 1), `targets` and `target_types`."""
        users, ends = self.find(rows)
        places = self.dataset.offsets[users] + ends
        now = np.asarray(self.dataset.events["times"][places])
        targets, types = (
            np.asarray(self.dataset.events[name][places], np.int64) for name in ("items", "types")
        )
        histories = self.dataset.histories(users, ends, self.length)
        asked = {"users": users + 1, "targets": targets, "target_types": types}
        return encode(histories, self.length, now) | asked
