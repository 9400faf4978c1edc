"""Candidates against the path: how often, how lately and how dear, as of the moment asked.

Every value of a candidate is looked up once among all values of the path, sorted: no C × L grid.

Shapes: B requests, C candidates, E past events of all requests, F values of an item, K keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.features.transitions import Transitions, after_code, log_share
from recsys.history import Histories
from recsys.schema import type_code

NOWHERE, NO_CANDIDATE = -2, -1
"""Keys of a value that is missing or rare: on the path, and of a candidate; they never meet."""
END = np.iinfo(np.int64).max


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

    def _where(self, kept: NDArray[np.bool_]) -> Past:
        if kept.all():
            return self
        return Past(self.owners[kept], self.items[kept], self.types[kept], self.ages[kept])


@dataclass(frozen=True)
class Compared:
    """Which values of an item are compared with the path, laid out side by side: F of them.

    fields_F: a number for each compared field, as only values of one field meet; events_F: the type
    of event that it reads, 0 for all; indices: the first so many values are the item itself;
    places: the others' columns in a codes array; where: (field, event) → its values.
    """

    fields_F: NDArray[np.int64]
    events_F: NDArray[np.int64]
    indices: int
    places: NDArray[np.int64]
    where: Mapping[tuple[str, str | None], slice]

    @classmethod
    def of(cls, wanted: Iterable[tuple[str, str | None]], columns: Mapping[str, slice]) -> Compared:
        """Lay out (field, event) pairs; `columns`: field → its columns in a codes array.

        >>> compared = Compared.of([("genres", None), ("item_id", "cart")], {"genres": slice(4, 6)})
        >>> compared.fields_F, compared.events_F, compared.places
        (array([0, 1, 1]), array([3, 0, 0]), array([4, 5]))
        """
        pairs = sorted(dict.fromkeys(wanted), key=lambda pair: pair[0] != "item_id")
        spans = [slice(0, 1) if by == "item_id" else columns[by] for by, _ in pairs]
        widths = [span.stop - span.start for span in spans]
        ends = [sum(widths[:place]) for place in range(len(pairs) + 1)]
        indices = sum(by == "item_id" for by, _ in pairs)
        types = [0 if event is None else type_code(event) for _, event in pairs]
        places = [place for span in spans[indices:] for place in range(span.start, span.stop)]
        return cls(
            fields_F=np.repeat(np.arange(len(pairs)), widths),
            events_F=np.repeat(np.array(types, np.int64), widths),
            indices=indices,
            places=np.array(places, np.int64),
            where={pair: slice(*at) for pair, at in zip(pairs, pairwise(ends), strict=True)},
        )

    def keys(
        self, owners: NDArray[np.int64], items: NDArray[np.integer], codes: NDArray[np.integer]
    ) -> NDArray[np.int64]:
        """Return one number for each (request, field, value), under 0 where there is no value."""
        value = np.empty((*items.shape, len(self.fields_F)), np.int64)
        value[..., : self.indices] = items[..., None]
        value[..., : self.indices] += 1
        # Twice `take`: a third of the time of `codes[items][..., places]`.
        value[..., self.indices :] = codes.take(items, axis=0).take(self.places, axis=-1)
        missing = value < 2
        value += self.fields_F << 32
        value += (owners << 40)[..., None]
        np.putmask(value, missing, NO_CANDIDATE)
        return value


@dataclass(frozen=True)
class Shared:
    """What a candidate's values have in common with the path: [B, C, F] for each of its values.

    counts: past events with that value; since: log(1 + seconds) since the newest, NaN for none.
    """

    counts: NDArray[np.int64]
    since: NDArray[np.float64]
    where: Mapping[tuple[str, str | None], slice]

    @classmethod
    def of(
        cls,
        past: Past,
        candidates_BC: NDArray[np.integer],
        codes: NDArray[np.integer],
        compared: Compared,
    ) -> Shared:
        """Count and date what is shared; codes: [N + 1, W] of all items."""
        owner_B1 = np.arange(len(candidates_BC))[:, None]
        wanted = compared.keys(owner_B1, candidates_BC, codes)
        met = compared.keys(past.owners, past.items, codes)
        unread = (compared.events_F > 0) & (past.types[:, None] != compared.events_F)
        np.putmask(met, unread | (met < 0), NOWHERE)
        known_K, count_K, newest_K = _summed(met.ravel(), past.ages.repeat(met.shape[1]))
        at = known_K.searchsorted(wanted)
        at[known_K[at] != wanted] = len(known_K) - 1
        return cls(count_K[at], np.log1p(newest_K / 1000)[at], compared.where)

    def count(self, by: str, event: str | None) -> NDArray[np.float64]:
        """Return log(1 + n), n the past events with each of the field's values, summed: [B, C]."""
        counts = self.counts[..., self.where[by, event]]
        return np.log1p(counts[..., 0] if counts.shape[-1] == 1 else counts.sum(-1))

    def newest(self, by: str, event: str | None) -> NDArray[np.float64]:
        """Return log(1 + seconds) since the last event with any of the values: [B, C]."""
        since = self.since[..., self.where[by, event]]
        return since[..., 0] if since.shape[-1] == 1 else np.fmin.reduce(since, axis=-1)


def _summed(
    key: NDArray[np.int64], ages: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return distinct keys in order, how often each is there, and its newest age: [K].

    The last key stands for what is not found: 0 times, of age NaN.
    """
    order = key.argsort()
    key = key[order]
    first = np.ones(len(key) + 1, bool)
    np.not_equal(key[1:], key[:-1], out=first[1:-1])
    starts = first.nonzero()[0]
    count, newest = np.zeros(len(starts), np.int64), np.full(len(starts), np.nan)
    count[:-1] = starts[1:] - starts[:-1]
    if len(key):
        newest[:-1] = np.minimum.reduceat(ages[order], starts[:-1])
    known = np.full(len(starts), END)
    known[:-1] = key[starts[:-1]]
    return known, count, newest


def newest_with(
    past: Past, candidates_BC: NDArray[np.integer], codes_N: NDArray[np.integer] | None
) -> NDArray[np.int64]:
    """Return the newest past event of each candidate's value, as an index: [B, C], -1 for none.

    codes_N: each item's value of one field; rare and missing values (under 2) are not shared. None:
    all items but 0 have one.
    """
    code_E, code_BC = (
        np.where(items > 0, 2, 0) if codes_N is None else codes_N.take(items)
        for items in (past.items, candidates_BC)
    )
    key_E = (past.owners << 32) + code_E
    order = key_E.argsort(kind="stable")
    wanted = (np.arange(len(candidates_BC))[:, None] << 32) + code_BC
    key_E, order = np.append(key_E[order], NOWHERE), np.append(order, -1)
    at = key_E[:-1].searchsorted(wanted, side="right") - 1
    return np.where((key_E[at] == wanted) & (code_BC >= 2), order[at], -1)


def transition(
    past: Past,
    candidates_BC: NDArray[Any],
    codes_N: NDArray[np.integer] | None,
    known: Transitions,
    now_B: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return log of how often a candidate came next after its value's newest event, or NaN."""
    newest_BC = newest_with(past, candidates_BC, codes_N)
    after_BC = np.append(after_code(past.items, past.types), 0)[newest_BC]
    chance_BC = known.chances(after_BC, candidates_BC, now_B)
    return np.where(newest_BC >= 0, log_share(chance_BC), np.nan)


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
