"""Where a request's history comes from: given with it, stored in the bundle, or posted since.

Shapes: E events of one user, oldest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.schema import EVENT_TYPES, PAD
from recsys.serving.messages import HistoryEvent, milliseconds

if TYPE_CHECKING:
    from recsys.serving.state import UserPath

TYPE_CODES = {name: code for code, name in enumerate(EVENT_TYPES, 1)}
Times = NDArray[np.int64]


class Trajectory(NamedTuple):
    """Events of one user, oldest first: item indices, type codes, milliseconds, values or NaN."""

    items: NDArray[np.integer]
    types: NDArray[np.integer]
    times: Times
    values: NDArray[np.floating]

    def last(self, count: int) -> Trajectory:
        """Return the newest `count` events."""
        return self.at(slice(-count, None))

    def at(self, events: slice | NDArray[np.integer] | NDArray[np.bool_]) -> Trajectory:
        """Return some of the events."""
        items, types, times, values = self
        return Trajectory(items[events], types[events], times[events], values[events])

    def before(self, now: int) -> Trajectory:
        """Return the path with what is dated `now` or later, or not at all, as just happened.

        >>> Trajectory(*np.array([[7, 8], [1, 1], [1000, 2000], [30, 40]])).before(2000).times
        array([1000, 1999])
        """
        late = len(self.times) > 0 and self.times[-1] >= now
        return self._replace(times=np.minimum(self.times, now - 1)) if late else self


NONE = np.zeros(0, np.int64)
EMPTY = Trajectory(NONE, NONE, NONE, np.zeros(0, np.float32))


def stored(events: Mapping[str, NDArray[Any]], row: int) -> Trajectory:
    """Return what a bundle's `events` hold of user `row`."""
    start, end = events["offsets"][row : row + 2].tolist()
    items, types, times = (events[name][start:end] for name in ("items", "types", "times"))
    values = events["values"][start:end] if "values" in events else _no_values(len(items))
    return Trajectory(items, types, times, values)


def since(path: Trajectory, erased_before: int, has_time: bool) -> Trajectory:
    """Return what is left of a stored path after an erasure (0: there was none).

    Where times are only an order, nothing says what came later: all of it is left out.

    >>> path = Trajectory(*np.array([[7, 8], [1, 1], [1000, 2000], [30, 40]]))
    >>> since(path, 1000, True).items, len(since(path, 1000, False).items)
    (array([8]), 0)
    """
    if not erased_before:
        return path
    kept = np.searchsorted(path.times, erased_before, side="right") if has_time else len(path.times)
    return path.at(slice(int(kept), None))


def joined(
    path: Trajectory, live: UserPath, index: Mapping[str, int], has_time: bool
) -> Trajectory:
    """Return a stored path and the events posted since as one, by time; the same event once.

    Posted items that the bundle does not know are left out. Where times are only an order, what
    was posted comes after what is stored.
    """
    posted = _posted(live, index)
    if not has_time:
        whole = _after(path, posted)
        return whole._replace(times=np.arange(len(whole.items), dtype=np.int64))
    if not len(path.items) or not len(posted.items):
        return posted if len(posted.items) else path
    if posted.times[0] > path.times[-1]:
        return _after(path, posted)
    # The log was trained on meanwhile: the bundle may hold some of it.
    overlap = path.at(slice(int(np.searchsorted(path.times, posted.times[0])), None))
    known = set(_triples(overlap))
    new = [place for place, event in enumerate(_triples(posted)) if event not in known]
    whole = _after(path, posted.at(np.array(new, np.int64)))
    return whole.at(np.argsort(whole.times, kind="stable"))


def given(
    history: Sequence[str | HistoryEvent],
    now: int,
    index: Mapping[str, int],
    has_time: bool,
    unknown: list[str],
) -> Trajectory:
    """Return a request's own history by time; items not in `index` are added to `unknown`."""
    events = [HistoryEvent(event) if isinstance(event, str) else event for event in history]
    known = [event for event in events if event.item_id in index]
    if len(known) < len(events):
        unknown += [event.item_id for event in events if event.item_id not in index]
    items = np.array([index[event.item_id] for event in known], np.int64)
    types = np.array([TYPE_CODES[event.event_type] for event in known], np.int64)
    values = np.array([event.value for event in known], np.float32)
    path = Trajectory(items, types, event_times(known, now), values)
    if (path.times[1:] < path.times[:-1]).any():
        path = path.at(np.argsort(path.times, kind="stable"))
    return path if has_time else path._replace(times=np.arange(len(known), dtype=np.int64))


def event_times(events: Sequence[HistoryEvent], now: int) -> Times:
    """Return each event's milliseconds; one without a time happened with the one before it.

    Those before the first known time happened with it; where no time is known, all happened now.

    >>> events = [HistoryEvent("a"), HistoryEvent("b", timestamp=5), HistoryEvent("c")]
    >>> event_times(events, now=9000)
    array([5000, 5000, 5000])
    """
    moments = [event.timestamp for event in events]
    first = next((moment for moment in moments if moment is not None), None)
    latest = now if first is None else milliseconds(first)
    times = []
    for moment in moments:
        latest = latest if moment is None else milliseconds(moment)
        times.append(latest)
    return np.array(times, np.int64)


def _posted(live: UserPath, index: Mapping[str, int]) -> Trajectory:
    items = [index.get(item, PAD) for item in live.items]
    codes, times = np.array(live.types, np.int64), np.array(live.times, np.int64)
    path = Trajectory(np.array(items, np.int64), codes, times, np.array(live.values, np.float32))
    return path.at(path.items != PAD) if PAD in items else path


def _after(path: Trajectory, later: Trajectory) -> Trajectory:
    return Trajectory(*(np.concatenate(parts) for parts in zip(path, later, strict=True)))


def _triples(path: Trajectory) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in path[:3]), strict=True))


def _no_values(count: int) -> NDArray[np.float32]:
    return np.full(count, np.nan, np.float32)
