"""Cut, pad and encode trajectories: one path for training and serving, numpy only.

Shapes: B histories, E events in all of them together, L encoded length, R packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

GAP_BUCKETS = 40
"""Time gaps fall into power-of-two buckets of seconds; 0 means that there is no earlier event."""

VALUE_BUCKETS = 160
"""Values of events (dwell seconds, a rating, a price) fall into eighths of a doubling; 0: none."""

OWN_RECENCY = -1.0
"""Leaves the weight of short-term against long-term interest to the model."""

PER_EVENT = ("items", "types", "gaps", "times", "values")
"""What may be encoded of each event."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Histories:
    """A ragged batch of trajectories, each oldest first.

    items, types: int arrays [E] of indices and event-type codes; times: int64 [E], milliseconds
    since 1970; offsets: int64 [B + 1], history b is `[offsets[b]:offsets[b + 1]]`; values: float
    [E], NaN where an event has none, or nothing where no event has one.
    """

    items: NDArray[np.integer]
    types: NDArray[np.integer]
    times: NDArray[np.int64]
    offsets: NDArray[np.int64]
    values: NDArray[np.floating] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Events of each history: int64 [B]."""
        return self.offsets[1:] - self.offsets[:-1]

    @classmethod
    def of(cls, parts: Sequence[tuple[NDArray, ...]]) -> Histories:
        """Join one (items, types, times[, values]) tuple a history into a ragged batch."""
        if len(parts) == 1:
            items, types, times, *values = parts[0]
            return cls(items, types, times, np.array([0, len(items)], np.int64), *values)
        if not parts:
            nothing = np.zeros(0, np.int64)
            return cls(nothing, nothing, nothing, np.zeros(1, np.int64))
        items, types, times, *values = map(np.concatenate, zip(*parts, strict=True))
        lengths = [len(part[0]) for part in parts]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(items, types, times, offsets, *values)

    def taking(
        self, events: slice | NDArray[np.integer] | NDArray[np.bool_], offsets: NDArray[np.int64]
    ) -> Histories:
        """Return histories that are made of some of the events."""
        columns = self.items[events], self.types[events], self.times[events]
        return Histories(*columns, offsets, None if self.values is None else self.values[events])

    def last(self, count: int) -> Histories:
        """Return each history's newest `count` events."""
        if self.lengths.max(initial=0) <= count:
            return self
        kept = np.minimum(self.lengths, count)
        offsets = np.concatenate([[0], np.cumsum(kept)])
        source = np.repeat(self.offsets[1:] - offsets[1:], kept) + np.arange(offsets[-1])
        return self.taking(source, offsets)


def gap_bucket(milliseconds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bucket of each time gap: 1 under a second, then one more each doubling.

    >>> gap_bucket(np.array([0, 999, 1_000, 2_000, 86_400_000]))
    array([ 1,  1,  2,  3, 18])
    """
    seconds = np.maximum(milliseconds, 0) // 1000
    return np.minimum(np.frexp(seconds)[1] + np.int64(1), GAP_BUCKETS - 1)


def value_bucket(values: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return the bucket of each event's value: 0 for none, then eight each doubling of 1 + value.

    Fine enough for half stars, wide enough for a day in seconds; what is below 0 counts as 0.

    >>> value_bucket(np.array([np.nan, 0, 4.5, 5, 60, 3600]))
    array([ 0,  1, 20, 21, 48, 95])
    """
    # What is NaN stays so in the maximum, and is the other one in fmax.
    places = np.floor(8 * np.log2(1 + np.maximum(values, 0)))
    return np.fmax(np.minimum(places, VALUE_BUCKETS - 2) + 1, 0).astype(np.int64)


def gaps_within(histories: Histories) -> NDArray[np.int64]:
    """Return each event's gap bucket to the one before it: int64 [E], 0 where a history starts."""
    gaps = np.zeros(len(histories.times), np.int64)
    gaps[1:] = gap_bucket(histories.times[1:] - histories.times[:-1])
    firsts = histories.offsets[:-1][histories.lengths > 0]
    gaps[firsts] = 0
    return gaps


def seconds_within(histories: Histories) -> NDArray[np.int64]:
    """Return the whole seconds from each history's first event to each event: int64 [E]."""
    if len(histories) == 1:
        return (histories.times - histories.times[:1]) // 1000
    firsts = np.append(histories.times, 0)[histories.offsets[:-1]]
    return (histories.times - np.repeat(firsts, histories.lengths)) // 1000


def request_context(last: NDArray[np.int64], now: NDArray[np.int64]) -> Arrays:
    """Encode when recommendations are asked for, given each history's last event time.

    last, now: int64 [B], milliseconds; last is negative where there is no event. Returns int64 [B]
    arrays: `request_gap` (bucket), `request_hour` (0 to 23, UTC), `request_weekday` (0 is Monday).

    >>> request_context(np.array([0]), np.array([3_600_000]))["request_hour"]
    array([1])
    """
    return {"request_gap": np.where(last < 0, 0, gap_bucket(now - last)), **request_clock(now)}


def request_clock(now: NDArray[np.int64]) -> Arrays:
    """Return the hour and the weekday of `now`, as `request_context` does."""
    hours = now // 3_600_000
    return {"request_hour": hours % 24, "request_weekday": (hours // 24 + 3) % 7}


def encode(
    histories: Histories,
    max_length: int,
    now: NDArray[np.int64],
    recency: NDArray[np.float32] | None = None,
    of_events: Collection[str] = PER_EVENT,
) -> Arrays:
    """Cut to the newest events, right-pad and encode: what every encoder reads.

    Returns int64 arrays `items`, `types`, `gaps`, `times`, `values` (buckets) [B, L], those that
    `of_events` names, `lengths` [B] and the request context [B]; L is the longest kept history, at
    least 1. `recency` float32 [B] is the weight of short-term against long-term interest, -1 where
    the model chooses.

    >>> h = Histories.of([(np.array([5, 6, 7]), np.array([1, 1, 1]), np.array([0, 1000, 9000]))])
    >>> encode(h, 2, np.array([10_000]))["items"]
    array([[6, 7]])
    """
    kept = histories.last(max_length)
    lengths = kept.lengths
    at_BL = _right_padded(kept) if len(kept) != 1 else None
    last = np.where(lengths > 0, np.append(kept.times, 0)[kept.offsets[1:] - 1], -1)
    if recency is None:
        recency = np.full(len(kept), OWN_RECENCY, np.float32)
    asked: Arrays = {"lengths": lengths, "recency": recency}
    return _grids(kept, at_BL, of_events) | asked | request_context(last, now)


def pack(
    histories: Histories,
    row_length: int,
    horizon: int = 1,
    rng: np.random.Generator | None = None,
    trains: NDArray[np.bool_] | None = None,
) -> Arrays:
    """Lay many training histories into few rows, each position with an event that follows it.

    With a `horizon` above 1 the target is drawn (by `rng`) among the next so many events, else it
    is the next one (dense all-action targets: Pancha et al. 2022, PinnerFormer, section 3.3).
    `trains` [E] tells which events may be targets; all, where it is not given.

    A history of n events gives n - 1 positions (at most `row_length`). Returns int64 [R, L] arrays:
    `items`, `types`, `gaps`, `times`, `values` as in `encode`; `positions` (0 at each history's
    start), `segments` (1, 2, … within a row, 0 where empty); `targets` (0 where empty, and where
    the event may not be one), `target_types`; and the request context at the moment of the next
    event.

    >>> h = Histories.of([(np.array([5, 6, 7]), np.ones(3, int), np.arange(3) * 1000)] * 2)
    >>> pack(h, 4)["targets"]
    array([[6, 7, 6, 7]])
    """
    whole = histories.last(row_length + 1)
    newest = whole.offsets[1:][whole.lengths > 0] - 1
    oldest = whole.offsets[:-1][whole.lengths > 0]
    inputs = _without(whole, newest)
    following = _without(whole, oldest)
    if trains is not None:
        targets = replace(histories, items=np.where(trains, histories.items, 0))
        following = _without(targets.last(row_length + 1), oldest)
    rows, starts, segments = _first_fit(inputs.lengths, row_length)
    places = _places(inputs)
    target = np.arange(len(places))
    if horizon > 1 and rng is not None:
        left = np.repeat(inputs.lengths, inputs.lengths) - places
        target += (rng.random(len(places)) * np.minimum(left, horizon)).astype(np.int64)
    at_RL = np.full((int(rows.max(initial=0)) + 1, row_length), len(places))
    at_RL[np.repeat(rows, inputs.lengths), np.repeat(starts, inputs.lengths) + places] = np.arange(
        len(places)
    )
    flat = {
        "positions": places,
        "segments": np.repeat(segments, inputs.lengths),
        "targets": following.items[target],
        "target_types": following.types[target],
    } | request_context(inputs.times, following.times)
    return _grids(inputs, at_RL) | {name: _laid(column, at_RL) for name, column in flat.items()}


def _without(histories: Histories, events: NDArray[np.int64]) -> Histories:
    dropped = np.zeros(len(histories.items), np.int64)
    dropped[events] = 1
    kept = dropped == 0
    before = np.concatenate([[0], np.cumsum(dropped)])
    offsets = histories.offsets - before[histories.offsets]
    return histories.taking(kept, offsets)


def _first_fit(
    lengths: NDArray[np.int64], row_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Place each length into the first row with room, longest first: row, start and segment."""
    rows, starts, segments = np.zeros((3, len(lengths)), np.int64)
    room: list[int] = []
    members: list[int] = []
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        row = next((r for r, free in enumerate(room) if free >= length), len(room))
        if row == len(room):
            room.append(row_length)
            members.append(0)
        starts[index] = row_length - room[row]
        room[row] -= length
        members[row] += 1
        rows[index], segments[index] = row, members[row]
    return rows, starts, segments


def _places(histories: Histories) -> NDArray[np.int64]:
    lengths = histories.lengths
    return np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], lengths)


def _right_padded(histories: Histories) -> NDArray[np.int64]:
    """Return which event stands where, one past the last where none does: int64 [B, L]."""
    lengths = histories.lengths
    places_L = np.arange(max(1, int(lengths.max(initial=1))))
    at_BL = histories.offsets[:-1, None] + places_L
    return np.where(places_L < lengths[:, None], at_BL, len(histories.items))


def _grids(
    histories: Histories, at_RL: NDArray[np.int64] | None, names: Collection[str] = PER_EVENT
) -> Arrays:
    made: dict[str, Callable[[], NDArray]] = {
        "items": lambda: histories.items,
        "types": lambda: histories.types,
        "gaps": lambda: gaps_within(histories),
        "times": lambda: seconds_within(histories),
        "values": lambda: _value_buckets(histories),
    }
    return {name: _laid(make(), at_RL) for name, make in made.items() if name in names}


def _value_buckets(histories: Histories) -> NDArray[np.int64]:
    if histories.values is None:
        return np.zeros(len(histories.items), np.int64)
    return value_bucket(histories.values)


def _laid(flat: NDArray, at_RL: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return the column with each event where it stands, else 0; without places, as one row."""
    if at_RL is not None:
        return np.append(flat, 0).astype(np.int64, copy=False).take(at_RL)
    return flat[None].astype(np.int64) if len(flat) else np.zeros((1, 1), np.int64)
