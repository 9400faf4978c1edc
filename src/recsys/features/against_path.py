"""Candidates against the path: how often, how lately and how dear, as of the moment asked.

Every value of a candidate is looked up once among all values of the path, sorted: no C × L grid.

Shapes: B requests, C candidates, E past events of all requests, I items, F values of an item, K
keys.
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

    def _where(self, kept: NDArray[np.bool_]) -> Past:
        if kept.all():
            return self
        return Past(self.owners[kept], self.items[kept], self.types[kept], self.ages[kept])


@dataclass(frozen=True)
class Compared:
    """Which values of an item are compared with the path, laid out side by side: F of them.

    fields_F: a number for each compared field, as only values of one field meet; events_F: the type
    of event that it reads, 0 for all; indices: the first so many values are the item itself; known:
    of so many next it is whether it is an item; places: the others' columns in a codes array;
    where: (field, event) → its values.
    """

    fields_F: NDArray[np.int64]
    events_F: NDArray[np.int64]
    indices: int
    known: int
    places: NDArray[np.int64]
    where: Mapping[Pair, slice]

    @classmethod
    def of(cls, wanted: Iterable[Pair], columns: Mapping[str, slice]) -> Compared:
        """Lay out (field, event) pairs; `columns`: field → its columns in a codes array.

        >>> compared = Compared.of([("genres", None), ("item_id", "cart")], {"genres": slice(4, 6)})
        >>> compared.fields_F, compared.events_F, compared.places
        (array([0, 1, 1]), array([3, 0, 0]), array([4, 5]))
        """
        first = ("item_id", None)
        pairs = sorted(dict.fromkeys(wanted), key=lambda pair: [pair[0] != by for by in first])
        coded = [columns[by] for by, _ in pairs if by is not None and by not in first]
        indices, known = (sum(by == one for by, _ in pairs) for one in first)
        widths = [1] * (indices + known) + [span.stop - span.start for span in coded]
        ends = [sum(widths[:place]) for place in range(len(pairs) + 1)]
        types = [0 if event is None else type_code(event) for _, event in pairs]
        places = [place for span in coded for place in range(span.start, span.stop)]
        return cls(
            fields_F=np.repeat(np.arange(len(pairs)), widths),
            events_F=np.repeat(np.array(types, np.int64), widths),
            indices=indices,
            known=known,
            places=np.array(places, np.int64),
            where={pair: slice(*at) for pair, at in zip(pairs, pairwise(ends), strict=True)},
        )

    def keys(
        self, owners: NDArray[np.int64], items: NDArray[np.integer], codes: NDArray[np.integer]
    ) -> NDArray[np.int64]:
        """Return a number for each (request, field, value) of items [I], under 0 for no value."""
        value = np.empty((len(items), len(self.fields_F)), np.int64)
        plain = self.indices + self.known
        value[:, : self.indices] = items[:, None] + 1
        value[:, self.indices : plain] = 2 * (items > 0)[:, None]
        # Twice `take`: a third of the time of `codes[items][:, places]`.
        value[:, plain:] = codes.take(items, axis=0).take(self.places, axis=1)
        missing = value < 2
        value += self.fields_F << 32
        value += (owners << 40)[:, None]
        np.putmask(value, missing, NO_CANDIDATE)
        return value


@dataclass(frozen=True)
class Shared:
    """What a candidate's values have in common with the path: [B, C, F] for each of its values.

    counts: past events with that value; newest: the newest of them, as an index, and one too many
    where there is none; since_E: log(1 + seconds) since each past event, and NaN.
    """

    counts: NDArray[np.int64]
    newest: NDArray[np.int64]
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
        batch, count = candidates_BC.shape
        owners = np.concatenate([past.owners, np.arange(batch).repeat(count)])
        items = np.concatenate([past.items, candidates_BC.ravel()])
        keys = compared.keys(owners, items, codes)
        met, wanted = keys[: len(past.items)], keys[len(past.items) :]
        unread = (compared.events_F > 0) & (past.types[:, None] != compared.events_F)
        np.putmask(met, unread | (met < 0), NOWHERE)
        known_K, count_K, newest_K = _summed(met)
        at = known_K.searchsorted(wanted)
        at = np.where(known_K[at] == wanted, at, len(known_K) - 1).reshape(
            batch, count, keys.shape[1]
        )
        since_E = np.append(np.log1p(past.ages / 1000), np.nan)
        return cls(count_K[at], newest_K[at], since_E, compared.where)

    def count(self, pair: Pair) -> NDArray[np.float64]:
        """Return log(1 + n), n the past events with each of the field's values, summed: [B, C]."""
        counts = self.counts[..., self.where[pair]]
        return np.log1p(counts[..., 0] if counts.shape[-1] == 1 else counts.sum(-1))

    def since(self, pair: Pair) -> NDArray[np.float64]:
        """Return log(1 + seconds) since the last event with any of the values: [B, C]."""
        since = self.since_E[self.newest[..., self.where[pair]]]
        return since[..., 0] if since.shape[-1] == 1 else np.fmin.reduce(since, axis=-1)

    def last(self, pair: Pair) -> NDArray[np.int64]:
        """Return the newest past event with a field's one value, or one too many: [B, C]."""
        return self.newest[..., self.where[pair].start]


def _summed(
    key_EF: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return distinct keys in order, how often each is there, and its last event: [K].

    The last key stands for what is not found: 0 times, after all events.
    """
    events, width = key_EF.shape
    order = key_EF.argsort(axis=None, kind="stable")
    key = key_EF.ravel()[order]
    first = np.ones(len(key) + 1, bool)
    np.not_equal(key[1:], key[:-1], out=first[1:-1])
    starts = first.nonzero()[0]
    count, newest = np.zeros(len(starts), np.int64), np.full(len(starts), events)
    count[:-1] = starts[1:] - starts[:-1]
    newest[:-1] = order[starts[1:] - 1] // max(width, 1)
    known = np.full(len(starts), END)
    known[:-1] = key[starts[:-1]]
    return known, count, newest


def transition(
    past: Past,
    candidates_BC: NDArray[Any],
    newest_BC: NDArray[np.int64],
    known: Transitions,
    now_B: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return log of how often candidates came next after `newest` events, NaN after none."""
    after_BC = np.append(after_code(past.items, past.types), 0)[newest_BC]
    chance_BC = log_share(known.chances(after_BC, candidates_BC, now_B))
    chance_BC[newest_BC == len(past.items)] = np.nan
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
