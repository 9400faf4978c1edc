"""A bundle's items as an answer needs them: ids, titles, categories, popularity; all at load.

Shapes: N items, M items of one category, K answers. Items are indices 1 to N; 0 is padding.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.index.bundle import Bundle
from recsys.index.delta import Within
from recsys.index.search import Hits, ItemIndex, Masked, Out, Subset, among
from recsys.schema import InputError
from recsys.serving.messages import Recommended

TITLE_COLUMNS = ("title", "name")
CATEGORY_COLUMNS = ("category", "categories", "genres")
"""The first of these that the item table has is what an item is called, or belongs to."""
NOT_FEATURES = ("item_id", "count", "train_count")
KEPT_BYTES = 64 << 20
"""Filters made for earlier requests may take this much memory, or as much as all vectors do."""

NAME_BYTES = 1_000
"""What a name in a key may take: also of filters that let nothing through, not all are kept."""

Indices = NDArray[np.int64]
NONE: Indices = np.zeros(0, np.int64)


class Sized(Protocol):
    """Something that knows its bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""


Value = TypeVar("Value", bound=Sized)


class Kept(Generic[Value]):
    """What was made for recent requests, up to `limit` bytes: what was not used longest goes first.

    Safe to use from several threads at once; two that miss at the same time both make.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self.values: OrderedDict[Hashable, Value] = OrderedDict()
        self.lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return what was made for `key` before, or make it."""
        with self.lock:
            if key in self.values:
                self.values.move_to_end(key)
                return self.values[key]
        value = make()
        with self.lock:
            if key not in self.values and value.nbytes <= self.limit:
                self.values[key] = value
                self.nbytes += value.nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self.values.popitem(last=False)[1].nbytes
        return value


@dataclass(frozen=True)
class Filter:
    """Category lists resolved: the items to answer with (None: any), and names not known."""

    subset: Subset | Within | None
    unknown: list[str] = field(default_factory=list)
    popularity: Indices = field(default_factory=lambda: NONE)
    names: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes held: its names, its items, and their order by popularity, once asked for."""
        if self.subset is None:
            return 0
        order = self.popularity.itemsize * _count(self.subset)
        return NAME_BYTES * (1 + self.names) + self.subset.nbytes + order

    @cached_property
    def by_popularity(self) -> Indices:
        """Its items, most events first; made when a newcomer first asks."""
        assert self.subset is not None
        return self.popularity[self.subset.holds(self.popularity)]


ANY = Filter(None)


class Catalogue:
    """Everything about items that an answer may need, as lists and arrays ready to index."""

    def __init__(self, bundle: Bundle, search_index: ItemIndex) -> None:
        self.table = bundle.items
        self.ids: Sequence[str] = bundle.item_ids.tolist()
        self.index: Any = bundle.item_index
        self.titles: Sequence[Any] = self._padded(TITLE_COLUMNS)
        self.categories: Sequence[Any] = self._padded(CATEGORY_COLUMNS)
        self.members: Any = _members(self.categories)
        self.counts = bundle.counts
        self.by_popularity = bundle.popular
        self.search_index = search_index
        self.filters: Kept[Filter] = Kept(max(KEPT_BYTES, bundle.vectors_ND.nbytes))

    def _padded(self, names: Sequence[str]) -> list[Any]:
        column = next((name for name in names if name in self.table.column_names), None)
        values = self.table[column].to_pylist() if column else [None] * len(self.table)
        return [None, *values]

    def recommended(
        self,
        indices: Sequence[int],
        scores: Sequence[float],
        propensities: Sequence[float] | None = None,
    ) -> list[Recommended]:
        """Return items by index with their scores, titles, categories and propensities."""
        ids, titles, categories = self.ids, self.titles, self.categories
        chances: Sequence[float | None] = propensities or [None] * len(indices)
        return [
            Recommended(ids[i], score, titles[i], categories[i], chance)
            for i, score, chance in zip(indices, scores, chances, strict=True)
        ]

    def filter(self, allow: Sequence[str] | None, deny: Sequence[str]) -> Filter:
        """Resolve category lists; an item is left out where any of its categories is denied."""
        if allow is None and not deny:
            return ANY
        self.need_categories("leave out category lists")
        key = None if allow is None else frozenset(allow), frozenset(deny)
        return self.filters.get(key, lambda: self._filter(allow, deny))

    def need_categories(self, advice: str) -> None:
        """Raise InputError where items have no categories."""
        if not self.members:
            raise InputError(f"this bundle's items have no categories; {advice}")

    def popularity(self, indices: Indices) -> NDArray[np.float64]:
        """Return items' numbers of events."""
        return self.counts[indices].astype(float)

    def alive(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items were not removed: all of them."""
        return np.ones(len(indices), bool)

    def added(self, item_ids: Iterable[str]) -> set[int]:
        """Return the indices of those of some items that were added since: none."""
        return set()

    def popular(self, k: int, out: Out, chosen: Filter) -> Hits:
        """Return the `k` items with most events, without `out`, and their numbers of events."""
        order = self.by_popularity if chosen.subset is None else chosen.by_popularity
        head = order[: k + len(out)]
        head = head[~among(head, out)][:k]
        return head, self.popularity(head)

    @property
    def feature_names(self) -> list[str]:
        """Names of the item table's feature columns, without vectors."""
        return [
            f.name for f in self.table.schema if f.name not in NOT_FEATURES and not _is_vector(f)
        ]

    def features(self, index: int) -> dict[str, Any]:
        """Return an item's feature columns by name, without its vectors."""
        row = self.table.slice(index - 1, 1)
        return {name: row[name][0].as_py() for name in self.feature_names}

    def _filter(self, allow: Sequence[str] | None, deny: Sequence[str]) -> Filter:
        unknown = [name for name in (*(allow or ()), *deny) if name not in self.members]
        # What is only denied leaves most of the catalogue, where an index finds as much as ever.
        subset = self.search_index.subset(self._eligible(allow, deny), exact=allow is not None)
        return Filter(subset, unknown, self.by_popularity, len(allow or ()) + len(deny))

    def _eligible(self, allow: Sequence[str] | None, deny: Sequence[str]) -> Indices:
        chosen = np.full(len(self.ids), allow is None)
        for name in allow or ():
            chosen[self.members.get(name, NONE)] = True
        for name in deny:
            chosen[self.members.get(name, NONE)] = False
        chosen[0] = False
        return np.flatnonzero(chosen)


def _count(subset: Subset | Within) -> int:
    if isinstance(subset, Within):
        return _count(subset.base)
    return len(subset.mask) if isinstance(subset, Masked) else len(subset.indices)


def _members(categories: Sequence[str | list[str] | None]) -> dict[str, Indices]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, names in enumerate(categories):
        for name in [names] if isinstance(names, str) else names or ():
            members[name].append(index)
    return {name: np.array(indices, np.int64) for name, indices in members.items()}


def _is_vector(column: pa.Field) -> bool:
    kind = column.type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_a(kind) for is_a in lists) and pa.types.is_floating(kind.value_type)
