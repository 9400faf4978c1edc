"""Put a day's events into the flat arrays of a dataset: each at its user and its time.

The old arrays are copied in order, chunk by chunk; nothing of them is sorted or encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.data.dataset import EVENT_ARRAYS, Dataset
from recsys.data.engines import CHUNK
from recsys.data.flat import npy

Ints = NDArray[np.int64]


class Arriving(NamedTuple):
    """Events to put in, sorted by (user row, time, order of arrival): flat arrays, all as long."""

    users: NDArray[np.int64]
    items: NDArray[np.int32]
    types: NDArray[np.int8]
    times: NDArray[np.int64]
    values: NDArray[np.float32]

    @classmethod
    def of(cls, users: Ints, columns: Mapping[str, NDArray]) -> Arriving:
        """Sort events that are in the order of their arrival; columns as in `EVENT_ARRAYS`."""
        order = np.lexsort((columns["times"], users))
        arrays = {n: columns[n][order].astype(kind) for n, kind in EVENT_ARRAYS.items()}
        return cls(users=users[order], **arrays)


class Merged(NamedTuple):
    """Offsets of the new dataset [U + 1], late events put in between, old events that expired."""

    offsets: Ints
    late: int
    expired: int


def merge(old: Dataset, arriving: Arriving, num_users: int, since: int, folder: Path) -> Merged:
    """Write `old`'s events and those that arrive to `folder`, without any before `since`.

    num_users: with the new ones, whose rows follow the old. `arriving` has none before `since`; of
    events at one moment those of `old` stay first.
    """
    folder.mkdir()
    known = arriving.users < old.num_users
    users, times = arriving.users[known], arriving.times[known]
    at = np.full(len(known), len(old.events["times"]), np.int64)
    at[known] = old.offsets[users] + old.places(users, times, after=True)
    late = int((at[known] < old.offsets[users + 1]).sum())

    everyone = np.arange(old.num_users)
    expired_U = old.places(everyone, np.full(old.num_users, since))
    lengths = np.bincount(arriving.users, minlength=num_users)
    lengths[: old.num_users] += np.diff(old.offsets) - expired_U
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(folder / "offsets.npy", offsets)
    _copy(old, arriving, at, since, int(offsets[-1]), folder)
    return Merged(offsets, late, int(expired_U.sum()))


def _copy(old: Dataset, arriving: Arriving, at: Ints, since: int, total: int, folder: Path) -> None:
    size, written = len(old.events["times"]), 0
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(npy(folder / f"{name}.npy", name, total))
            for name in EVENT_ARRAYS
        }
        for start in range(0, max(1, size), CHUNK):
            stop = min(start + CHUNK, size)
            first = int(np.searchsorted(at, start))
            last = len(at) if stop == size else int(np.searchsorted(at, stop))
            columns = {
                name: np.insert(
                    np.asarray(old.events[name][start:stop]),
                    at[first:last] - start,
                    getattr(arriving, name)[first:last],
                )
                for name in EVENT_ARRAYS
            }
            alive = columns["times"] >= since
            for name, stream in files.items():
                stream.write(np.ascontiguousarray(columns[name][alive]).data)
            written += int(alive.sum())
    assert written == total, f"{written} events written, {total} counted"
