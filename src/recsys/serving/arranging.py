"""Which of the ranked items take the places: no category too often, not too alike, some drawn.

Shapes: C ranked items, D dim. Items are indices 1 to N.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.index.delta import Rows
from recsys.index.search import Hits
from recsys.serving.rules import Rules, capped, names_of

WITHIN = 200
"""Among so many items a bundle without a ranker looks for what is diverse, or drawn."""


class Arranged(NamedTuple):
    """Items in their places, with their scores, and where drawn for, their propensities."""

    items: list[int]
    scores: list[float]
    propensities: list[float] | None = None


def arranged(
    ranked: Hits,
    k: int,
    rules: Rules,
    categories: Sequence[Any],
    vectors_ND: NDArray[np.float32] | Rows,
    draws: np.random.Generator,
) -> Arranged:
    """Return who takes the first `k` places, by the request's rules."""
    if rules.diversity:
        top = diverse(ranked, k, rules.diversity, vectors_ND, rules.cap, categories)
    else:
        top = capped(ranked, rules.cap, k, categories)
    if not rules.explore:
        return Arranged(top[0].tolist(), top[1].tolist())
    left = ~np.isin(ranked[0], top[0])
    tail = ranked[0][left], ranked[1][left]

    def group(item: int) -> Hashable:
        return None if rules.cap is None else names_of(categories[item])

    return explored(top, tail, rules.explore, draws, group)


def diverse(
    ranked: Hits,
    k: int,
    diversity: float,
    vectors_ND: NDArray[np.float32] | Rows,
    cap: int | None,
    categories: Sequence[Any],
) -> Hits:
    """Fill `k` places one by one with what is good and unlike the items above it.

    Each takes the item with the greatest (1 - diversity) × score - diversity × its greatest cosine
    with an item above; scores are first brought onto 0 to 1. Source: Carbonell & Goldstein 1998,
    The Use of MMR (maximal marginal relevance).

    >>> vectors = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]], np.float32)
    >>> diverse((np.array([1, 2, 3]), np.array([9.0, 8.0, 7.0])), 2, 0.7, vectors, None, [])[0]
    array([1, 3])
    """
    items = ranked[0]
    worth_C = (1 - diversity) * _scaled(ranked[1].astype(float))
    unit_CD = _unit(vectors_ND[items - 1])
    nearest_C, open_C = np.full(len(items), -1.0, np.float32), np.ones(len(items), bool)
    allowed = _Allowed(items, cap, categories)
    places: list[int] = []
    while len(places) < k and open_C.any():
        best = int(np.argmax(np.where(open_C, worth_C - diversity * nearest_C, -np.inf)))
        places.append(best)
        open_C[[best, *allowed.full_after(best)]] = False
        # Not a matrix product: NumPy's BLAS would wake a thread a core.
        np.maximum(nearest_C, np.einsum("cd,d->c", unit_CD, unit_CD[best]), out=nearest_C)
    return ranked[0][places], ranked[1][places]


def explored(
    top: Hits,
    tail: Hits,
    share: float,
    draws: np.random.Generator,
    group: Callable[[int], Hashable] = lambda item: None,
) -> Arranged:
    """Give each place to an item of the tail with probability `share`, drawn without replacement.

    A place is drawn for among the tail's items of its own item's group, so that no cap is broken.
    Where a group has fewer of these than places, its last places keep their items. The propensity
    of what stands at a place is 1 - share for its own item, share / n for each of n that could be
    drawn, and 1 where nothing could.
    """
    waiting: dict[Hashable, list[tuple[int, float]]] = defaultdict(list)
    for hit in _pairs(tail):
        waiting[group(hit[0])].append(hit)
    sizes = {key: len(members) for key, members in waiting.items()}
    places: Counter[Hashable] = Counter()
    shown: list[tuple[int, float, float]] = []
    for hit, chance in zip(_pairs(top), draws.random(len(top[0])), strict=True):
        key = group(hit[0])
        size = sizes.get(key, 0)
        places[key] += 1
        if places[key] > size:
            shown.append((*hit, 1.0))
        elif chance >= share:
            shown.append((*hit, 1 - share))
        else:
            drawn = waiting[key].pop(int(draws.integers(len(waiting[key]))))
            shown.append((*drawn, share / size))
    items, scores, propensities = zip(*shown, strict=True) if shown else ((), (), ())
    return Arranged([*items], [*scores], [*propensities])


def _pairs(hits: Hits) -> Iterator[tuple[int, float]]:
    return zip(hits[0].tolist(), hits[1].tolist(), strict=True)


class _Allowed:
    """Which places of a ranking are closed once their categories have all that they may."""

    def __init__(
        self, items: NDArray[np.int64], cap: int | None, categories: Sequence[Any]
    ) -> None:
        self.cap, self.shown = cap, Counter[str]()
        self.names = [names_of(categories[item]) for item in items.tolist()] if cap else []
        self.places: dict[str, list[int]] = defaultdict(list)
        for place, names in enumerate(self.names):
            for name in names:
                self.places[name].append(place)

    def full_after(self, place: int) -> list[int]:
        """Count the item at a place as shown; return the places that this closes."""
        if self.cap is None:
            return []
        self.shown.update(self.names[place])
        full = [name for name in self.names[place] if self.shown[name] >= self.cap]
        return [other for name in full for other in self.places[name]]


def _scaled(values_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values brought onto 0 to 1; equal ones are all 0."""
    low, high = values_C.min(initial=np.inf), values_C.max(initial=-np.inf)
    return (values_C - low) / (high - low) if high > low else np.zeros_like(values_C)


def _unit(vectors_CD: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.sqrt(np.einsum("cd,cd->c", vectors_CD, vectors_CD))
    return vectors_CD / np.maximum(lengths, np.float32(1e-12))[:, None]
