"""One request resolved against a bundle, and the items that it may be answered with.

Shapes: H interests, D dim, C candidates. Items are indices 1 to N.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recsys.history import Arrays, value_bucket
from recsys.index.search import Hits, Out, among
from recsys.serving.catalogue import Filter, Indices
from recsys.serving.delta import View
from recsys.serving.messages import Ignored
from recsys.serving.paths import Trajectory
from recsys.serving.rules import Rules

NAMED_UNKNOWN = 5
"""So many unknown items are named in an answer; the rest are counted."""
Queries = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reading:
    """One request resolved against a bundle: indices in place of ids, nothing left to look up.

    `view` holds the items as they were when it was read; `path` is cut to what the models read;
    `out` holds item indices never to answer with, in rising order; `user` is the user's row plus
    one, 0 where unknown; `now` is in milliseconds; `recency` is the share of the newest turn,
    `OWN_RECENCY` where the model weighs it; `requested` is what a ranker reads of the request
    itself, and `weights_T` what it makes of its tasks.
    """

    view: View
    path: Trajectory
    out: Out
    filter: Filter
    rules: Rules
    user: int
    now: int
    recency: float
    k: int
    ignored: Ignored | None
    requested: Arrays
    weights_T: NDArray[np.float64]

    @property
    def checksum(self) -> int:
        """Return a number that stands for the events of the path and the times between them.

        Values count where there are any: what was logged before they were kept is told alike.
        """
        items, types, times, values = self.path
        told = [] if np.isnan(values).all() else [value_bucket(values)]
        total = 0
        for part in (items, types, times - times[-1:], *told):
            total = zlib.crc32(part.astype(np.int64).tobytes(), total)
        return total


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What the search finds for one request; its `first` `width` hits are there already.

    arrays: the request's encoded history, of one row.
    """

    reading: Reading
    queries_HD: Queries
    arrays: Arrays
    first: Hits
    width: int
    kind: Literal["model"] = "model"

    def best(self, width: int) -> Hits:
        """Return the best `width` items; fewer only where there are no more."""
        if width == self.width:
            return self.first
        reading, queries_BHD = self.reading, self.queries_HD[None]
        index: Any = reading.view.index
        return index.nearest(queries_BHD, width, [reading.out], reading.filter.subset)[0]

    def score(self, indices: Indices) -> NDArray[np.floating]:
        """Return inner products with the queries."""
        return self.reading.view.index.score(self.queries_HD, indices)

    def retrieval(self, indices: Indices) -> NDArray[np.floating]:
        """Return the scores as a ranker reads them."""
        return self.score(indices)

    def eligible(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items, in rising order, may be answered with."""
        return _eligible(self.reading, indices)


@dataclass(frozen=True, slots=True)
class Popular:
    """What is popular, for one request; scores are numbers of events."""

    reading: Reading
    queries_HD: Queries
    arrays: Arrays
    width: int
    kind: Literal["popular"] = "popular"

    def best(self, width: int) -> Hits:
        """Return the `width` items with most events; fewer only where there are no more."""
        reading = self.reading
        return reading.view.catalogue.popular(width, reading.out, reading.filter)

    def score(self, indices: Indices) -> NDArray[np.floating]:
        """Return numbers of events."""
        return self.reading.view.catalogue.popularity(indices)

    def retrieval(self, indices: Indices) -> NDArray[np.floating]:
        """Return NaN, a missing number, for each: there was no search."""
        return np.full(len(indices), np.nan)

    def eligible(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items, in rising order, may be answered with."""
        return _eligible(self.reading, indices)


def _eligible(reading: Reading, indices: Indices) -> NDArray[np.bool_]:
    subset = reading.filter.subset
    allowed = reading.view.catalogue.alive(indices) & ~among(indices, reading.out)
    return allowed if subset is None else allowed & subset.holds(indices)


def passed_over(excluded: Sequence[int], path: Trajectory) -> Out:
    """Return some items and those of a path, each once and in rising order."""
    rising = np.sort(np.append(path.items, excluded) if excluded else path.items)
    # Not np.unique, which costs ten times as much for so few.
    firsts = np.ones(len(rising), bool)
    np.not_equal(rising[1:], rising[:-1], out=firsts[1:])
    return rising[firsts]


def ignored(items: list[str], chosen: Filter, rules: Rules) -> Ignored | None:
    """Return what a request named that the bundle does not know, None where it knows all."""
    boost, categories = rules.boost, chosen.unknown
    if boost is not None:
        items, categories = items + boost.unknown_items, categories + boost.unknown_categories
    if not items and not categories:
        return None
    return Ignored(len(items), list(dict.fromkeys(items))[:NAMED_UNKNOWN], categories)
