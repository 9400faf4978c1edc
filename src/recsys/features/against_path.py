"""Candidates against the path: how often, how lately and how dear, as of the moment asked.

The path's values are put down in a table with a slot for every value that there is, and each value
of a candidate is looked up there: neither a C × L grid nor a search.

Shapes: B requests, C candidates, E past events of all requests, I items, F values of an item.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.features.learnt import FIRST
from recsys.features.transitions import Transitions, after_code, log_share
from recsys.history import Histories
from recsys.schema import type_code

NOWHERE = 0
"""The slot of values that are missing or rare, or not to be read: nothing stays there."""
KNOWN = FIRST
"""The value of being an item at all."""
NEVER = -1
"""The newest event with a value that no event has: what stands last."""
Pair = tuple[str | None, str | None]
"""A field, None being that it is an item at all, and a type of event, None being all."""


@dataclass(frozen=True)
class Past:
    """Events before the moment asked: [E] each.

    owners: whose (request); items, types: as in a history; ages: milliseconds, above 0.
    """

    owners: NDArray[np.int64]
    items: NDArray[np.integer]
    types: NDArray[np.integer]
    ages: NDArray[np.int64]

    @classmethod
    def of(cls, histories: Histories, now_B: NDArray[np.int64]) -> Past:
        """Leave out every event at or after `now`: what was asked about cannot be known."""
        owners = np.repeat(np.arange(len(histories)), histories.lengths)
        ages = now_B[owners] - histories.times
        past = cls(owners, histories.items, histories.types, ages)
        return past._where(ages > 0)

    def only(self, event: str | None) -> Past:
        """Return the events of one type, or all of them."""
        return self if event is None else self._where(self.types == type_code(event))

    def ends(self, batch: int) -> list[int]:
        """Return where each request's events begin, and where the last one's end."""
        if batch == 1:
            return [0, len(self.owners)]
        bounds: list[int] = self.owners.searchsorted(np.arange(batch + 1)).tolist()
        return bounds

    def _where(self, kept: NDArray[np.bool_]) -> Past:
        if kept.all():
            return self
        return Past(self.owners[kept], self.items[kept], self.types[kept], self.ages[kept])


@dataclass(frozen=True)
class Compared:
    """Which values of an item are compared with the path, laid out side by side: F of them.

    events_F: the type of event that each reads, 0 for all; indices: the first so many values are
    the item itself; known: of so many next it is whether it is an item; places: the others' columns
    in a codes array; where: (field, event) → its values. Only values of one such pair meet:
    starts_F, indices_F: how many slots the pairs before have, and how many of them are the item
    itself, with a slot for each item besides; slots: of all pairs but these.
    """

    events_F: NDArray[np.int64]
    indices: int
    known: int
    places: NDArray[np.int64]
    where: Mapping[Pair, slice]
    starts_F: NDArray[np.int64]
    indices_F: NDArray[np.int64]
    slots: int

    @classmethod
    def of(cls, wanted: Iterable[Pair], columns: Mapping[str, tuple[slice, int]]) -> Compared:
        """Lay out (field, event) pairs; `columns`: field → its columns in a codes array, and size.

        >>> wanted = [("genres", None), ("item_id", "cart")]
        >>> compared = Compared.of(wanted, {"genres": (slice(4, 6), 20)})
        >>> compared.events_F, compared.places, compared.starts_F, compared.indices_F
        (array([3, 0, 0]), array([4, 5]), array([0, 0, 0]), array([0, 1, 1]))
        """
        first = ("item_id", None)
        pairs = sorted(dict.fromkeys(wanted), key=lambda pair: [pair[0] != by for by in first])
        coded = [columns[by] for by, _ in pairs if by is not None and by not in first]
        indices, known = (sum(by == one for by, _ in pairs) for one in first)
        widths = [1] * (indices + known) + [span.stop - span.start for span, _ in coded]
        ends = [sum(widths[:place]) for place in range(len(pairs) + 1)]
        types = [0 if event is None else type_code(event) for _, event in pairs]
        places = [place for span, _ in coded for place in range(span.start, span.stop)]
        sizes = [0] * indices + [KNOWN + 1] * known + [size for _, size in coded]
        *starts, slots = accumulate(sizes, initial=0)
        return cls(
            events_F=np.repeat(np.array(types, np.int64), widths),
            indices=indices,
            known=known,
            places=np.array(places, np.int64),
            where={pair: slice(*at) for pair, at in zip(pairs, pairwise(ends), strict=True)},
            starts_F=np.repeat(np.array(starts, np.int64), widths),
            indices_F=np.repeat(np.arange(len(pairs)).clip(max=indices), widths),
            slots=slots,
        )

    def total(self, codes: NDArray[np.integer]) -> int:
        """Return how many slots there are; codes: [N + 1, W] of all items."""
        return self.slots + self.indices * (len(codes) + 1)

    def slots_of(self, items: NDArray[np.integer], codes: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the slot of each value of items [I]: [I, F], `NOWHERE` for no value."""
        value = np.empty((len(items), len(self.starts_F)), np.int64)
        plain = self.indices + self.known
        value[:, : self.indices] = items[:, None] + 1
        value[:, self.indices : plain] = KNOWN * (items > 0)[:, None]
        # Twice `take`: a third of the time of `codes[items][:, places]`.
        value[:, plain:] = codes.take(items, axis=0).take(self.places, axis=1)
        missing = value < FIRST
        value += self.starts_F + self.indices_F * (len(codes) + 1)
        np.putmask(value, missing, NOWHERE)
        return value


@dataclass(frozen=True)
class Shared:
    """What a candidate's values have in common with the path: [B, C, F] for each of its values.

    counts: past events with that value; newest: the newest of them, `NEVER` where there is none;
    since_E: log(1 + seconds) since each past event, and NaN.
    """

    counts: NDArray[np.int32]
    newest: NDArray[np.int32]
    since_E: NDArray[np.float64]
    where: Mapping[Pair, slice]

    @classmethod
    def of(
        cls,
        past: Past,
        candidates_BC: NDArray[np.integer],
        codes: NDArray[np.integer],
        compared: Compared,
    ) -> Shared:
        """Count and date what is shared; codes: [N + 1, W] of all items."""
        slots = compared.slots_of(np.concatenate([past.items, candidates_BC.ravel()]), codes)
        met, wanted = slots[: len(past.items)], slots[len(past.items) :]
        np.putmask(
            met, (compared.events_F > 0) & (past.types[:, None] != compared.events_F), NOWHERE
        )
        wanted_BCF = wanted.reshape(*candidates_BC.shape, slots.shape[1])
        found = _looked_up(met, past.ends(len(candidates_BC)), wanted_BCF, compared.total(codes))
        since_E = np.append(np.log1p(past.ages / 1000), np.nan)
        return cls(*found, since_E, compared.where)

    def count(self, pair: Pair) -> NDArray[np.float64]:
        """Return log(1 + n), n the past events with each of the field's values, summed: [B, C]."""
        counts = self.counts[..., self.where[pair]]
        return np.log1p(counts[..., 0] if counts.shape[-1] == 1 else counts.sum(-1))

    def since(self, pair: Pair) -> NDArray[np.float64]:
        """Return log(1 + seconds) since the last event with any of the values: [B, C]."""
        since = self.since_E[self.newest[..., self.where[pair]]]
        return since[..., 0] if since.shape[-1] == 1 else np.fmin.reduce(since, axis=-1)

    def last(self, pair: Pair) -> NDArray[np.int32]:
        """Return the newest past event with a field's one value, or `NEVER`: [B, C]."""
        return self.newest[..., self.where[pair].start]


def _looked_up(
    met_EF: NDArray[np.int64], ends: Sequence[int], wanted_BCF: NDArray[np.int64], slots: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return how often each wanted slot was met by its request's events, and the newest of them."""
    counts, newest = _tables(slots)
    count_BCF, newest_BCF = np.empty((2, *wanted_BCF.shape), np.int32)
    numbers_EF = np.broadcast_to(np.arange(len(met_EF), dtype=np.int32)[:, None], met_EF.shape)
    for row, (start, end) in enumerate(pairwise(ends)):
        met = met_EF[start:end].ravel()
        try:
            np.add.at(counts, met, 1)
            newest[met] = numbers_EF[start:end].ravel()  # of several the last one stays
            counts[NOWHERE], newest[NOWHERE] = 0, NEVER
            counts.take(wanted_BCF[row], out=count_BCF[row])
            newest.take(wanted_BCF[row], out=newest_BCF[row])
        finally:
            counts[met], newest[met] = 0, NEVER
    return count_BCF, newest_BCF


def _tables(slots: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return this thread's tables of 0 and of `NEVER`, to be left as they were."""
    tables: tuple[NDArray[np.int32], NDArray[np.int32]] | None = getattr(_thread, "tables", None)
    if tables is None or len(tables[0]) < slots:
        tables = np.zeros(slots, np.int32), np.full(slots, NEVER, np.int32)
        _thread.tables = tables
    return tables


_thread = threading.local()


def transition(
    past: Past,
    candidates_BC: NDArray[Any],
    newest_BC: NDArray[np.integer],
    known: Transitions,
    now_B: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return log of how often candidates came next after `newest` events, NaN after none."""
    after_BC = np.append(after_code(past.items, past.types), 0)[newest_BC]
    chance_BC = log_share(known.chances(after_BC, candidates_BC, now_B))
    chance_BC[newest_BC == NEVER] = np.nan
    return chance_BC


def ratio(
    past: Past, candidate_BC: NDArray[np.float64], path_E: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return log of a candidate's value over the mean of the path's positive ones; else NaN."""
    batch = len(candidate_BC)
    there = path_E > 0
    owners = past.owners[there]
    total = np.bincount(owners, path_E[there], minlength=batch)
    number = np.bincount(owners, minlength=batch)
    usual = np.full(batch, np.nan)
    np.divide(total, number, out=usual, where=number > 0)
    value = np.where(candidate_BC > 0, candidate_BC, np.nan)
    return np.log(value / usual[:, None])


def positions(position_BC: NDArray[np.integer] | None, shape: tuple[int, ...]) -> NDArray:
    """Return log(1 + place) where it was shown; 0 (the top) when serving; NaN where unknown."""
    if position_BC is None:
        return np.zeros(shape)
    place = np.asarray(position_BC, np.float64)
    return np.log1p(np.where(place < 0, np.nan, place))
