"""A bundle's items as an answer needs them: ids, titles, categories, popularity; all at load.

Shapes: N items, M items of one category, K answers. Items are indices 1 to N; 0 is padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.index.bundle import Bundle
from recsys.schema import InputError
from recsys.serving.messages import Recommended

TITLE_COLUMNS = ("title", "name")
CATEGORY_COLUMNS = ("category", "categories", "genres")
"""The first of these that the item table has is what an item is called, or belongs to."""
NOT_FEATURES = ("item_id", "count", "train_count")

Indices = NDArray[np.int64]
NONE: Indices = np.zeros(0, np.int64)


class Filter(NamedTuple):
    """Category lists resolved: item indices to answer with (None: any), and names not known."""

    allowed: Indices | None
    unknown: list[str]


class Catalogue:
    """Everything about items that an answer may need, as lists and arrays ready to index."""

    def __init__(self, bundle: Bundle) -> None:
        self.table = bundle.items
        self.ids: list[str] = bundle.item_ids.tolist()
        self.index = bundle.item_index
        self.titles = self._padded(TITLE_COLUMNS)
        self.categories = self._padded(CATEGORY_COLUMNS)
        self.members = _members(self.categories)
        self.counts = bundle.counts
        self.by_popularity = bundle.popular
        self.place = np.empty(len(self.ids), np.int64)
        self.place[self.by_popularity] = np.arange(len(self.by_popularity))

    def _padded(self, names: Sequence[str]) -> list[Any]:
        column = next((name for name in names if name in self.table.column_names), None)
        values = self.table[column].to_pylist() if column else [None] * len(self.table)
        return [None, *values]

    def recommended(self, indices: Sequence[int], scores: Sequence[float]) -> list[Recommended]:
        """Return items by index with their scores, titles and categories."""
        ids, titles, categories = self.ids, self.titles, self.categories
        return [
            Recommended(ids[i], score, titles[i], categories[i])
            for i, score in zip(indices, scores, strict=True)
        ]

    def filter(self, allow: Sequence[str] | None, deny: Sequence[str]) -> Filter:
        """Resolve category lists; an item is left out where any of its categories is denied."""
        if allow is None and not deny:
            return Filter(None, [])
        if not self.members:
            raise InputError("this bundle's items have no categories; leave out category lists")
        unknown = [name for name in (*(allow or ()), *deny) if name not in self.members]
        return Filter(self._eligible(allow, deny), unknown)

    def _eligible(self, allow: Sequence[str] | None, deny: Sequence[str]) -> Indices:
        chosen = np.full(len(self.ids), allow is None)
        for name in allow or ():
            chosen[self.members.get(name, NONE)] = True
        for name in deny:
            chosen[self.members.get(name, NONE)] = False
        chosen[0] = False
        return np.flatnonzero(chosen)

    def popular(self, k: int, excluded: Indices, allowed: Indices | None) -> Indices:
        """Return the `k` items with most events, without the excluded: int64 [K]."""
        if allowed is None:
            head = self.by_popularity[: k + len(excluded)]
        else:
            head = allowed[np.argsort(self.place[allowed])]
        return head[~np.isin(head, excluded)][:k] if len(excluded) else head[:k]

    def features(self, index: int) -> dict[str, Any]:
        """Return an item's feature columns by name, without its vectors."""
        row = self.table.slice(index - 1, 1)
        shown = [f.name for f in row.schema if f.name not in NOT_FEATURES and not _is_vector(f)]
        return {name: row[name][0].as_py() for name in shown}


def _members(categories: Sequence[str | list[str] | None]) -> dict[str, Indices]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, names in enumerate(categories):
        for name in [names] if isinstance(names, str) else names or ():
            members[name].append(index)
    return {name: np.array(indices, np.int64) for name, indices in members.items()}


def _is_vector(field: pa.Field) -> bool:
    kind = field.type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_a(kind) for is_a in lists) and pa.types.is_floating(kind.value_type)
