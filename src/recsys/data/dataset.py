"""A prepared dataset, memory-mapped: vocabularies, flat event columns, the split as a rule."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.artifacts import read_manifest
from recsys.history import Histories
from recsys.schema import InputError

USERS = 1 << 16
"""Users whose times are looked at together."""
EVENT_ARRAYS = {"items": np.int32, "types": np.int8, "times": np.int64, "values": np.float32}


@dataclass(frozen=True)
class Split:
    """Where each user's events belong, as places in that user's trajectory: int64 [U].

    Events before `train_end` train. `validation` and `test` are the places of the event to
    predict from all before it, or -1.
    """

    train_end: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


class Dataset:
    """What `recsys prepare` wrote. Users are rows 0 to U - 1; items are indices 1 to N.

    Files: `items.parquet` (row i - 1 is item i: item_id, count, train_count, features),
    `users.parquet` (row u: user_id, features), `events/{items,types,times,values}.npy` sorted by
    (user, time), `events/offsets.npy` [U + 1], `impressions.parquet` where the log has them, and
    `pending.parquet`, the events of users and items that are too rare yet (see `admission`).
    `times` are milliseconds since 1970, or places 0, 1, … where the source has none (`has_time` is
    false). Users and items that were only shown come last; there may be no events at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path, "dataset")
        arrays = {name: self._array(name) for name in EVENT_ARRAYS}
        self.events = arrays
        self.offsets = self._array("offsets")

    def __reduce__(self) -> tuple[type[Dataset], tuple[Path]]:
        """Pickle the path alone: a worker maps the same files."""
        return Dataset, (self.path,)

    def _array(self, name: str) -> NDArray[Any]:
        file = self.path / "events" / f"{name}.npy"
        if not file.is_file():
            raise InputError(f"{self.path}: file events/{name}.npy is missing; prepare it again")
        if int(self.manifest["num_events"]) == 0:
            return np.load(file, allow_pickle=False)
        return np.load(file, mmap_mode="r", allow_pickle=False)

    @property
    def name(self) -> str:
        """What the data config calls it."""
        return str(self.manifest["name"])

    @property
    def num_users(self) -> int:
        """Users, U."""
        return int(self.manifest["num_users"])

    @property
    def num_items(self) -> int:
        """Items, N."""
        return int(self.manifest["num_items"])

    @property
    def has_time(self) -> bool:
        """Whether `times` are real moments, not only an order."""
        return bool(self.manifest["has_time"])

    @property
    def has_types(self) -> bool:
        """Whether the log tells event types apart."""
        return len(self.manifest["event_types"]) > 1

    @property
    def has_values(self) -> bool:
        """Whether any event has a value: dwell seconds, a rating, a price."""
        return bool(self.manifest["has_values"])

    @property
    def fingerprint(self) -> str:
        """What stands for the content of all its files."""
        return str(self.manifest["fingerprint"])

    @cached_property
    def items(self) -> pa.Table:
        """The item table; row i - 1 belongs to item index i."""
        return pq.read_table(self.path / "items.parquet")

    @cached_property
    def users(self) -> pa.Table:
        """The user table; row u belongs to user u."""
        return pq.read_table(self.path / "users.parquet")

    @cached_property
    def impressions(self) -> pa.Table:
        """What was shown, a row an item, sorted by (timestamp, request, position).

        Columns: user (row, -1 unknown), item (index, 0 unknown), timestamp, request (0, 1, …),
        position and propensity (null where not logged), part (0 train, 1 validation, 2 test; null
        where not given), labels, context. Raises InputError where the log has none.
        """
        if self.manifest.get("impressions") is None:
            raise InputError(
                f"{self.path.name}: no impressions in this dataset. Prepare it from a source that "
                "has them (data.source.impressions=FILE), or type examples=rated or "
                "examples=retrieved"
            )
        kinds = self.manifest["impressions"]["context"]
        categorical = [name for name, kind in kinds.items() if kind == "categorical"]
        return pq.read_table(self.path / "impressions.parquet", read_dictionary=categorical)

    @cached_property
    def train_count(self) -> NDArray[np.int64]:
        """Training events of each item: int64 [N + 1], 0 for padding."""
        return np.concatenate([[0], self.items["train_count"].to_numpy()]).astype(np.int64)

    @cached_property
    def retired(self) -> NDArray[np.int64]:
        """Indices of items that are not answered with any more, in rising order: `grow.retire`."""
        if not self.manifest.get("grown", {}).get("retired"):
            return np.zeros(0, np.int64)
        return np.flatnonzero(self.items["count"].to_numpy() == 0) + 1

    @cached_property
    def split(self) -> Split:
        """The rule of the manifest applied to every user."""
        rule = self.manifest["split"]
        if rule["rule"] == "leave_one_out":
            return leave_one_out(np.diff(self.offsets))
        return by_time(
            self.offsets, self.events["times"], rule["validation_from"], rule["test_from"]
        )

    def read_ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Ask the system to read some ranges of events now, without waiting for them."""
        for name in ("items", "types", "times"):
            _read_ahead(self.events[name], ranges)

    def read_sparsely(self) -> None:
        """Have the system read what is asked for, and not megabytes around it.

        For events that are past memory: what it adds would push out what was asked for ahead.
        """
        for name in ("items", "types", "times", "values"):
            pages = getattr(self.events[name], "_mmap", None)
            if pages is not None and hasattr(mmap, "MADV_RANDOM"):
                pages.madvise(mmap.MADV_RANDOM)

    def histories(
        self, users: NDArray[np.integer], ends: NDArray[np.integer], longest: int | None = None
    ) -> Histories:
        """Return events before place `ends[b]` of user `users[b]`: the newest `longest` of them."""
        counts = np.asarray(ends, np.int64)
        counts = counts if longest is None else np.minimum(counts, longest)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        firsts = self.offsets[users] + ends - counts
        source = np.repeat(firsts - offsets[:-1], counts) + np.arange(offsets[-1])
        items, types, times = (
            np.asarray(self.events[name][source]) for name in ("items", "types", "times")
        )
        values = np.asarray(self.events["values"][source]) if self.has_values else None
        return Histories(items, types, times, offsets, values)

    def places(
        self, users: NDArray[np.integer], moments: NDArray[np.int64], after: bool = False
    ) -> NDArray[np.int64]:
        """Return how many events user `users[b]` has before `moments[b]`, or up to it if `after`.

        int64 [B], by bisection: a few reads for each b, whatever the size of the log.
        """
        times = self.events["times"]
        starts, ends = self.offsets[users], self.offsets[np.asarray(users) + 1]
        low, high = starts.astype(np.int64), ends.astype(np.int64)
        while len(searched := np.flatnonzero(low < high)):
            middle = (low[searched] + high[searched]) // 2
            met, wanted = times[middle], moments[searched]
            earlier = (met <= wanted) if after else (met < wanted)
            low[searched] = np.where(earlier, middle + 1, low[searched])
            high[searched] = np.where(earlier, high[searched], middle)
        return low - starts

    def find(
        self,
        users: NDArray[np.integer],
        times: NDArray[np.int64],
        items: NDArray[np.integer],
        types: NDArray[np.integer],
    ) -> NDArray[np.int64]:
        """Return the place of each event in its user's trajectory, -1 for none: int64 [B]."""
        low, high = (self.places(users, times, after) for after in (False, True))
        found = np.full(len(low), -1)
        for step in range(int((high - low).max(initial=0))):
            there = np.flatnonzero((low + step < high) & (found < 0))
            at = self.offsets[users[there]] + low[there] + step
            same = self.events["items"][at] == items[there]
            same &= self.events["types"][at] == types[there]
            found[there[same]] = low[there[same]] + step
        return found


def _read_ahead(array: NDArray[Any], ranges: Sequence[tuple[int, int]]) -> None:
    if not isinstance(array, np.memmap) or not hasattr(os, "posix_fadvise"):
        return
    with open(str(array.filename), "rb") as file:
        for first, last in ranges:
            place, size = array.offset + first * array.itemsize, (last - first) * array.itemsize
            os.posix_fadvise(file.fileno(), place, size, os.POSIX_FADV_WILLNEED)


def leave_one_out(lengths: NDArray[np.int64]) -> Split:
    """Test on each user's last event and validate on the one before; under 3 events only train.

    >>> leave_one_out(np.array([5, 2])).test
    array([ 4, -1])
    """
    enough = lengths >= 3
    return Split(
        train_end=np.where(enough, lengths - 2, lengths),
        validation=np.where(enough, lengths - 2, -1),
        test=np.where(enough, lengths - 1, -1),
    )


def by_time(
    offsets: NDArray[np.int64], times: NDArray[np.int64], validation_from: int, test_from: int
) -> Split:
    """Train before `validation_from`; predict each user's last event in each later window.

    The history goes up to that event, as it would when serving: a newcomer of the window is read
    too, and only a user's very first event is never predicted. Source: global temporal split with
    the last target, Gusak et al. 2025.

    >>> by_time(np.array([0, 4]), np.array([10, 20, 30, 40]), 20, 35).validation
    array([2])
    """
    before_validation = _count_before(offsets, times, validation_from)
    before_test = _count_before(offsets, times, test_from)
    total = np.diff(offsets)
    validates = (before_test > before_validation) & (before_test >= 2)
    tests = (total > before_test) & (total >= 2)
    return Split(
        train_end=before_validation,
        validation=np.where(validates, before_test - 1, -1),
        test=np.where(tests, total - 1, -1),
    )


def _count_before(
    offsets: NDArray[np.int64], times: NDArray[np.int64], moment: int
) -> NDArray[np.int64]:
    counts = np.zeros(len(offsets) - 1, np.int64)
    for first in range(0, len(counts), USERS):
        some = np.asarray(offsets[first : first + USERS + 1])
        before = np.concatenate([[0], np.cumsum(times[some[0] : some[-1]] < moment)])
        counts[first : first + USERS] = np.diff(before[some - some[0]])
    return counts
