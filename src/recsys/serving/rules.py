"""What a shop adds to the model's opinion: boosts of items, and how many of a category to show.

In this order: the score, boosts, what is excluded or not allowed, the cap, the first k (diverse and
exploring where asked for: `recsys.serving.arranging`). Shapes: M boosted items, N items. Items are
indices 1 to N.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from recsys.index.search import Hits
from recsys.schema import PAD
from recsys.serving.catalogue import NAME_BYTES, Catalogue, Indices, Kept
from recsys.serving.messages import Boosts, RecommendRequest

WIDER = 4
"""How much further each search looks than the one that left too few."""
Amounts = NDArray[np.float64]
Found = TypeVar("Found", bound=Sequence[Any])
"""Items first, then what belongs to each of them."""


class Source(Protocol):
    """Where a request's items come from before any rule but its filters."""

    def best(self, width: int) -> Hits:
        """Return the best `width` items; fewer only where there are no more."""

    def score(self, indices: Indices) -> NDArray[np.floating]:
        """Return the scores of some items."""

    def eligible(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items, in rising order, may be answered with."""


@dataclass(frozen=True)
class Boost:
    """What is added to the scores of which items; `named` are those asked for by their ids.

    indices: sorted int64 [M]; amounts: float64 [M].
    """

    indices: Indices
    amounts: Amounts
    named: Indices
    unknown_items: list[str]
    unknown_categories: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes held, names included."""
        names = 1 + len(self.named) + len(self.unknown_items) + len(self.unknown_categories)
        return self.indices.nbytes + self.amounts.nbytes + NAME_BYTES * names

    def of(self, indices: Indices) -> Amounts:
        """Return what is added to the scores of some items: 0 for one without a boost."""
        places, boosted = self._places(indices)
        return np.where(boosted, np.append(self.amounts, 0.0)[places], 0.0)

    def holds(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items have a boost."""
        return self._places(indices)[1]

    def _places(self, indices: Indices) -> tuple[Indices, NDArray[np.bool_]]:
        places = np.searchsorted(self.indices, indices)
        return places, np.append(self.indices, PAD)[places] == indices


class Rules(NamedTuple):
    """The rules of one request; None, or 0, where it has none of a kind."""

    cap: int | None = None
    boost: Boost | None = None
    diversity: float = 0.0
    explore: float = 0.0


NO_RULES = Rules()


def rules_of(request: RecommendRequest, catalogue: Catalogue, kept: Kept[Boost]) -> Rules:
    """Resolve a request's rules; raise InputError where the bundle has no categories for them."""
    boosts, cap = request.boosts, request.max_per_category
    boosted = bool(boosts.items or boosts.categories)
    further = request.diversity, request.explore or 0.0
    if cap is None and not boosted and not any(further):
        return NO_RULES
    if cap is not None or boosts.categories:
        catalogue.need_categories("leave out max_per_category and boosts.categories")
    key = frozenset(boosts.items.items()), frozenset(boosts.categories.items())
    boost = kept.get(key, lambda: resolved(boosts, catalogue)) if boosted else None
    return Rules(cap, boost, *further)


def resolved(boosts: Boosts, catalogue: Catalogue) -> Boost:
    """Turn boosts by id and by category into one by index; an item's boosts add up."""
    index, members = catalogue.index, catalogue.members
    named = {index[item]: amount for item, amount in boosts.items.items() if item in index}
    parts = [(members[name], given) for name, given in boosts.categories.items() if name in members]
    indices = [np.array([*named], np.int64), *(part for part, _ in parts)]
    amounts = [np.array([*named.values()], float), *(np.full(len(p), given) for p, given in parts)]
    every, place = np.unique(np.concatenate(indices), return_inverse=True)
    return Boost(
        every,
        np.bincount(place, np.concatenate(amounts), minlength=len(every)).astype(float),
        np.sort(indices[0]),
        [item for item in boosts.items if item not in index],
        [name for name in boosts.categories if name not in members],
    )


def boosted(source: Source, boost: Boost | None, width: int) -> tuple[Hits, bool]:
    """Return the best items by boosted score, as far as is sure, and whether there are no more.

    The boosted ones are all scored. Of the others the search has seen the best `width`; what it
    has not seen is no better than the last of them, and nothing below that is sure of its place.
    """
    hits = source.best(width)
    complete = len(hits[0]) < width
    if boost is None:
        return hits, complete
    eligible = source.eligible(boost.indices)
    extra = boost.indices[eligible]
    values = source.score(extra) + boost.amounts[eligible]
    floor = -np.inf if complete else hits[1][-1]
    if len(extra) > width:
        top = np.argpartition(-values, width - 1)[:width]
        extra, values, complete = extra[top], values[top], False
        floor = max(floor, values.min())
    found, scores = hits[0], hits[1].astype(float)
    others = ~boost.holds(found)
    indices = np.concatenate([found[others], extra])
    scores = np.concatenate([scores[others], values])
    sure = scores >= floor
    return in_order(indices[sure], scores[sure]), complete


def in_order(indices: Indices, scores: NDArray[np.floating]) -> Hits:
    """Return items best first, of equal ones the smallest index, the most popular, first."""
    # One key takes a third of the time of two, and equal scores are rare.
    order = (-scores).argsort(kind="stable")
    ranked = scores[order]
    if (ranked[1:] == ranked[:-1]).any():
        order = np.lexsort((indices, -scores))
    return indices[order], scores[order]


def capped(hits: Hits, cap: int | None, k: int, categories: Sequence[Any]) -> Hits:
    """Return the first `k` hits of which no category has more than `cap`.

    An item of several categories counts in each; one of none is never in the way.

    >>> hits = np.array([1, 2, 3, 4]), np.array([9.0, 8.0, 7.0, 6.0])
    >>> capped(hits, 1, 3, [None, "a", "a", ["a", "b"], ["b"]])[0].tolist()
    [1, 4]
    """
    if cap is None:
        return hits[0][:k], hits[1][:k]
    shown: Counter[str] = Counter()
    kept: list[int] = []
    for place, index in enumerate(hits[0].tolist()):
        names = names_of(categories[index])
        if any(shown[name] >= cap for name in names):
            continue
        shown.update(names)
        kept.append(place)
        if len(kept) == k:
            break
    return hits[0][kept], hits[1][kept]


def names_of(category: str | Sequence[str] | None) -> frozenset[str]:
    """Return the categories of an item, as the catalogue holds them, as a set.

    >>> names_of("shoes"), names_of(None)
    (frozenset({'shoes'}), frozenset())
    """
    return frozenset([category] if isinstance(category, str) else category or ())


def until_enough(width: int, k: int, attempt: Callable[[int], tuple[Found, bool]]) -> Found:
    """Return the first attempt that leaves `k` items, or that saw all there are.

    Each looks `WIDER` times further than the one before it.
    """
    while True:
        hits, complete = attempt(width)
        if complete or len(hits[0]) >= k:
            return hits
        width *= WIDER
