"""What a model must know of a dataset before it sees an event: sizes, counts and features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.data.dataset import Dataset
from recsys.schema import InputError, suggestion


@dataclass(frozen=True)
class Codes:
    """A categorical column as integers: `codes` int64 [N + 1] in 0 … size - 1, 0 is unknown."""

    codes: NDArray[np.int64]
    size: int


@dataclass(frozen=True)
class Catalogue:
    """Sizes, training counts [N + 1] and feature columns of one dataset.

    Row 0 of every array is padding (for items) or the unknown user (for users).
    """

    num_items: int
    num_users: int
    train_count: NDArray[np.int64]
    has_time: bool = False
    has_types: bool = False
    has_values: bool = False
    item_codes: Mapping[str, Codes] = field(default_factory=dict)
    user_codes: Mapping[str, Codes] = field(default_factory=dict)
    item_vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset) -> Catalogue:
        """Read the catalogue of a prepared dataset."""
        kinds = dataset.manifest["item_features"], dataset.manifest["user_features"]
        return cls(
            num_items=dataset.num_items,
            num_users=dataset.num_users,
            train_count=dataset.train_count,
            has_time=dataset.has_time,
            has_types=dataset.has_types,
            has_values=dataset.has_values,
            item_codes=_codes(dataset.items, kinds[0]),
            user_codes=_codes(dataset.users, kinds[1]) if kinds[1] else {},
            item_vectors={
                name: _vectors(dataset.items[name])
                for name, kind in kinds[0].items()
                if kind == "vector"
            },
        )


def choose(available: Mapping[str, object], wanted: list[str], what: str) -> list[str]:
    """Return the wanted columns, or raise InputError naming one that is not there."""
    for name in wanted:
        if name not in available:
            there = ", ".join(available) or "none"
            raise InputError(
                f"no {what} {name!r} in this dataset; it has: {there}" + suggestion(name, available)
            )
    return wanted


def _codes(table: pa.Table, kinds: Mapping[str, str]) -> dict[str, Codes]:
    names = [name for name, kind in kinds.items() if kind == "categorical"]
    return {name: encode_column(table[name]) for name in names}


def encode_column(column: pa.ChunkedArray) -> Codes:
    """Number a column's values in sorted order from 1; missing values and row 0 are 0.

    >>> encode_column(pa.chunked_array([["b", None, "a"]])).codes
    array([0, 2, 0, 1])
    """
    values = values_of(column)
    places = pc.fill_null(pc.add(pc.index_in(column, values), 1), 0)
    return Codes(np.concatenate([[0], places.to_numpy()]).astype(np.int64), len(values) + 1)


def values_of(column: pa.ChunkedArray) -> pa.Array:
    """Return a column's values in the order in which `encode_column` numbers them."""
    return pc.unique(column.drop_null()).sort()


def _vectors(column: pa.ChunkedArray) -> NDArray[np.float32]:
    rows = [row if row is not None else [] for row in column.to_pylist()]
    width = max(map(len, rows), default=0)
    vectors = np.zeros((len(rows) + 1, width), np.float32)
    for index, row in enumerate(rows, start=1):
        vectors[index, : len(row)] = row
    return vectors
