"""What a bundle's items are now: those that it was made with, added ones, without removed ones.

Shapes: N items of the bundle, M added ones, D dim. Added items have the indices N + 1 to N + M.
All is immutable: a request that began with one view ends with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from recsys.index.delta import DeltaIndex, Within
from recsys.index.search import Gone, Hits, ItemIndex, Out, among
from recsys.serving.catalogue import (
    ANY,
    CATEGORY_COLUMNS,
    NONE,
    TITLE_COLUMNS,
    Catalogue,
    Filter,
    Indices,
    Kept,
)
from recsys.serving.item_log import ItemChange
from recsys.serving.rules import Boost, names_of

BOOST_BYTES = 16 << 20
"""Boosts resolved for earlier requests may take this much memory."""
Value = TypeVar("Value")
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class View:
    """A bundle's items at one moment, as a request reads them."""

    catalogue: Catalogue
    index: ItemIndex | DeltaIndex
    boosts: Kept[Boost]

    @classmethod
    def of(cls, catalogue: Catalogue, index: ItemIndex | DeltaIndex) -> View:
        """Return the view of some items, with no boosts resolved yet."""
        return cls(catalogue, index, Kept(BOOST_BYTES))


@dataclass(frozen=True)
class Delta:
    """Added items in columns, and which of the bundle's were removed (None: none)."""

    catalogue: Catalogue
    index: ItemIndex
    space: str
    vectors_MD: Vector
    ids: list[str] = field(default_factory=list)
    features: list[dict[str, Any]] = field(default_factory=list)
    gone: Gone | None = None

    @classmethod
    def none(
        cls, catalogue: Catalogue, index: ItemIndex, space: str, retired: Indices = NONE
    ) -> Delta:
        """Return that nothing changed but that some items were removed from the beginning.

        space: names the encoder that item vectors belong to.
        """
        nothing = np.zeros((0, index.vectors_ND.shape[1]), np.float32)
        if not len(retired):
            return cls(catalogue, index, space, nothing)
        mask = np.zeros(len(index) + 1, bool)
        mask[retired] = True
        return cls(catalogue, index, space, nothing, gone=Gone(mask, len(retired)))

    @cached_property
    def places(self) -> dict[str, int]:
        """Index of each added item, by its id."""
        return {item_id: place for place, item_id in enumerate(self.ids, len(self.index) + 1)}

    @cached_property
    def view(self) -> View:
        """What a request reads."""
        if not self.ids and self.gone is None:
            return View.of(self.catalogue, self.index)
        index = DeltaIndex(self.index, self.vectors_MD, self.gone)
        return View.of(DeltaCatalogue(self), index)

    def changed(self, changes: Iterable[ItemChange]) -> Delta:
        """Return what is there after some changes, in their order."""
        newest = {change.item_id: change for change in changes}
        kept = [item_id not in newest for item_id in self.ids]
        found = {
            item_id: vector
            for item_id, change in newest.items()
            if item_id not in self.catalogue.index and (vector := self._vector(change)) is not None
        }
        return replace(
            self,
            ids=[*compress(self.ids, kept), *found],
            features=[*compress(self.features, kept), *(newest[i].features for i in found)],
            vectors_MD=np.concatenate(
                [self.vectors_MD[kept], np.reshape([*found.values()], (len(found), -1))], axis=0
            )
            if found
            else self.vectors_MD[kept],
            gone=self._gone(newest.values()),
        )

    def _vector(self, change: ItemChange) -> Vector | None:
        """Return an added item's vector: its own, or the mean of those that it is like."""
        if change.removed:
            return None
        if change.vector is not None and change.space == self.space:
            return np.frombuffer(change.vector, np.float32)
        return mean_vector(change.like, self.catalogue, self.index)

    def _gone(self, changes: Iterable[ItemChange]) -> Gone | None:
        known = self.catalogue.index
        marks = {known[one.item_id]: one.removed for one in changes if one.item_id in known}
        if not marks:
            return self.gone
        mask = np.zeros(len(self.index) + 1, bool) if self.gone is None else self.gone.mask.copy()
        mask[[*marks]] = [*marks.values()]
        count = int(mask.sum())
        return Gone(mask, count) if count else None


def mean_vector(like: Sequence[str], catalogue: Catalogue, index: ItemIndex) -> Vector | None:
    """Return the mean of some items' vectors; of those that are not known, None for none."""
    known = [catalogue.index[item_id] for item_id in like if item_id in catalogue.index]
    if not known:
        return None
    return np.asarray(index.vectors_ND[np.array(known) - 1].mean(axis=0, dtype=np.float32))


class DeltaCatalogue(Catalogue):
    """A catalogue with added items after its own, and without what was removed."""

    def __init__(self, delta: Delta) -> None:
        base, self.base, self.delta = delta.catalogue, delta.catalogue, delta
        self.size, self.gone = len(delta.index), delta.gone
        self.table = base.table
        self.ids = Joined(base.ids, delta.ids)
        self.titles = Joined(base.titles, _column(delta.features, TITLE_COLUMNS))
        added = _column(delta.features, CATEGORY_COLUMNS)
        self.categories = Joined(base.categories, added)
        self.index = Known(base.index, delta.places, delta.gone)
        self.members = Members(base.members, _by_category(added, self.size + 1))

    def popularity(self, indices: Indices) -> NDArray[np.float64]:
        """Return items' numbers of events: none of an added one."""
        return self.base.popularity(np.where(indices > self.size, 0, indices))

    def alive(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items were not removed."""
        if self.gone is None:
            return np.ones(len(indices), bool)
        return ~self.gone.mask[np.where(indices > self.size, 0, indices)]

    def added(self, item_ids: Iterable[str]) -> set[int]:
        """Return the indices of those of some items that were added."""
        places = self.delta.places
        return {places[item_id] for item_id in item_ids if item_id in places}

    def filter(self, allow: Sequence[str] | None, deny: Sequence[str]) -> Filter:
        """Resolve category lists, as for a bundle's own items and for added ones."""
        if allow is None and not deny:
            return ANY
        base = self.base.filter(allow, deny)
        assert base.subset is not None
        assert not isinstance(base.subset, Within)
        places = self.size + 1 + np.arange(len(self.delta.ids))
        extra = np.full(len(places), allow is None)
        for name in allow or ():
            extra |= np.isin(places, self.members.added(name))
        for name in deny:
            extra &= ~np.isin(places, self.members.added(name))
        unknown = [name for name in base.unknown if name not in self.members]
        return DeltaFilter(Within(base.subset, extra, self.size), unknown, base=base)

    def popular(self, k: int, out: Out, chosen: Filter) -> Hits:
        """Return the `k` items with most events, without `out`; added ones come last."""
        base, subset = ANY, chosen.subset
        if isinstance(chosen, DeltaFilter):
            base = chosen.base
        order = self.base.by_popularity if base.subset is None else base.by_popularity
        head = order[: k + len(out) + (self.gone.count if self.gone else 0)]
        places = np.append(head[self.alive(head)], self._of_delta(subset))
        found = places[~among(places, out)][:k]
        return found, self.popularity(found)

    def features(self, index: int) -> dict[str, Any]:
        """Return an item's features by name: of an added one, those that it was added with."""
        if index <= self.size:
            return self.base.features(index)
        return self.delta.features[index - self.size - 1]

    def _of_delta(self, subset: Any) -> Indices:
        places = self.size + 1 + np.arange(len(self.delta.ids))
        return places[subset.extra] if isinstance(subset, Within) else places


@dataclass(frozen=True)
class DeltaFilter(Filter):
    """A filter over added items too; `base` is that over the bundle's own."""

    base: Filter = ANY


class Joined(Sequence[Value], Generic[Value]):
    """Two lists as one, of which the first is not copied."""

    def __init__(self, first: Sequence[Value], then: Sequence[Value]) -> None:
        self.first, self.then, self.size = first, then, len(first)

    def __len__(self) -> int:
        return self.size + len(self.then)

    def __getitem__(self, place: Any) -> Any:
        return self.first[place] if place < self.size else self.then[place - self.size]


class Known:
    """Index of each item by id, as a mapping, of those that can be answered with."""

    def __init__(self, base: Any, places: dict[str, int], gone: Gone | None) -> None:
        self.base, self.places, self.gone = base, places, gone

    def get(self, item_id: str) -> int | None:
        """Return an item's index, None for an unknown or removed one."""
        place: int | None = self.places.get(item_id)
        if place is None:
            place = self.base.get(item_id)
            if place is not None and self.gone is not None and self.gone.mask[place]:
                return None
        return place

    def __contains__(self, item_id: object) -> bool:
        return self.get(str(item_id)) is not None

    def __getitem__(self, item_id: str) -> int:
        place = self.get(item_id)
        if place is None:
            raise KeyError(item_id)
        return place


class Members:
    """Indices of each category's items, as a mapping."""

    def __init__(self, base: dict[str, Indices], added: dict[str, Indices]) -> None:
        self.base, self._added = base, added

    def added(self, name: str) -> Indices:
        """Return those of a category that were added."""
        return self._added.get(name, NONE)

    def __bool__(self) -> bool:
        return bool(self.base)

    def __contains__(self, name: object) -> bool:
        return name in self.base or name in self._added

    def __getitem__(self, name: str) -> Indices:
        return np.append(self.base.get(name, NONE), self.added(name))


def _column(features: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Any]:
    """Return the first of some columns that an item has, None where it has none."""
    return [next((one[n] for n in names if n in one), None) for one in features]


def _by_category(categories: Sequence[Any], first: int) -> dict[str, Indices]:
    found: dict[str, list[int]] = {}
    for place, category in enumerate(categories, first):
        for name in names_of(category):
            found.setdefault(name, []).append(place)
    return {name: np.array(places, np.int64) for name, places in found.items()}
