"""What is learnt of a column: values and scales; and how Arrow columns become arrays.

Shapes: R rows of a table, K knots of a scale, V values of all rows or width of a vector.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.features.columns import Column
from recsys.schema import InputError, suggestion

MISSING, OTHER, FIRST = 0, 1, 2
"""Codes: nothing there, a value that is rare or unknown, and the most frequent known value."""
KNOTS = 65
WORD = re.compile(r"\w+")


class Vocabulary:
    """Codes of a categorical, multi-valued or text column: known values, or hashes.

    >>> Vocabulary(Column("brand", "item", "categorical"), ["Oak", "Fjord"]).code("Fjord")
    3
    """

    def __init__(self, column: Column, values: Sequence[str]) -> None:
        self.hash = column.hash
        self.default = column.default
        self.known = {value: code for code, value in enumerate(values, FIRST)}
        self.size = FIRST + (column.hash or len(values))

    def code(self, value: str | None) -> int:
        """Return the code of one value; None is missing."""
        if value is None:
            value = self.default  # type: ignore[assignment]  # text, as `declare` has checked
        if value is None:
            return MISSING
        if self.hash:
            # Not Python's hash: that of text differs from process to process.
            return FIRST + crc32(value.encode(errors="surrogatepass")) % self.hash
        return self.known.get(value, OTHER)

    def codes(self, texts: pa.Array) -> NDArray[np.int32]:
        """Return the codes of a text array: int32 [R]; each distinct value is looked up once."""
        encoded = texts.dictionary_encode()
        codes = [self.code(value) for value in encoded.dictionary.to_pylist()]
        place_R = encoded.indices.fill_null(len(codes)).to_numpy(zero_copy_only=False)
        return np.array([*codes, self.code(None)], np.int32)[place_R]


def learn_values(column: Column, texts: pa.Array) -> list[str]:
    """Return a column's known values, the most frequent first; equally frequent ones by name."""
    if isinstance(column.default, str):
        texts = texts.fill_null(column.default)
    counted = pc.value_counts(texts.drop_null())
    values, counts = counted.field(0).to_pylist(), counted.field(1).to_pylist()
    if not values:
        raise InputError(f"features.{column.name}: no value is there to learn from; leave it out")
    if column.hash:
        return []
    order = sorted(zip(counts, values, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [value for count, value in order if count >= column.least][: column.vocabulary]


def learn_collisions(column: Column, texts: pa.Array) -> dict[str, int]:
    """Return of a hashed column how many values were met, and how many share another's code.

    >>> brand = Column("brand", "item", "categorical", hash=1)
    >>> learn_collisions(brand, pa.array(["Oak", "Wren", "Oak", None]))
    {'distinct': 2, 'shared': 2}
    """
    values = pc.unique(texts.drop_null()).to_pylist()
    vocabulary = Vocabulary(column, ())
    crowd = Counter(vocabulary.code(value) for value in values)
    return {"distinct": len(values), "shared": sum(n for n in crowd.values() if n > 1)}


class Scale:
    """A numeric column's way to small numbers; missing (NaN) stays so unless it has a default.

    quantile: linear between knots at the training quantiles, onto -1 to 1; log: sign(x) log(1 +
    |x|), then standardised; standard: mean 0, deviation 1; none. A value outside the range that
    training saw counts as that range's nearer end: no request can send a number that overflows.

    >>> price = Column("price", "item", "numeric", scale="standard")
    >>> learnt = {"low": 2.0, "high": 14.0, "mean": 10.0, "deviation": 4.0}
    >>> Scale(price, learnt).numbers(np.array([12.0, 1e300, np.nan]))
    array([0.5, 1. , nan], dtype=float32)
    """

    def __init__(self, column: Column, learnt: Mapping[str, Any]) -> None:
        self.kind = column.scale
        self.default = column.default
        self.knots = np.array(learnt.get("knots", ()))
        self.targets = np.array(learnt.get("targets", ()))
        self.range = learnt.get("low"), learnt.get("high")
        self.mean = learnt.get("mean", 0.0)
        self.deviation = learnt.get("deviation", 1.0)

    def filled(self, value_R: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values with the default in place of missing ones."""
        if self.default is None:
            return value_R
        return np.where(np.isnan(value_R), self.default, value_R)

    def numbers(self, value_R: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return scaled values: float32 [R]."""
        value_R = self.filled(value_R)
        if self.kind == "quantile":
            return np.interp(value_R, self.knots, self.targets).astype(np.float32)
        value_R = np.clip(value_R, *self.range)
        if self.kind == "log":
            value_R = signed_log(value_R)
        return ((value_R - self.mean) / self.deviation).astype(np.float32)


def signed_log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sign(x) log(1 + |x|)."""
    return np.sign(values) * np.log1p(np.abs(values))


def learn_scale(column: Column, value_R: NDArray[np.float64]) -> dict[str, Any]:
    """Return what a `Scale` needs to know: knots and targets, or range, mean and deviation."""
    known = value_R[~np.isnan(value_R)]
    if column.default is not None:
        known = np.append(known, np.full(len(value_R) - len(known), column.default))
    if not len(known):
        raise InputError(f"features.{column.name}: no value is there to learn from; leave it out")
    if column.scale == "quantile":
        return _learn_knots(known)
    ends = known if column.default is None else np.append(known, column.default)
    seen = {"low": float(ends.min()), "high": float(ends.max())}
    if column.scale == "none":
        return seen
    known = signed_log(known) if column.scale == "log" else known
    return seen | {"mean": float(known.mean()), "deviation": float(known.std()) or 1.0}


def _learn_knots(known: NDArray[np.float64]) -> dict[str, Any]:
    """Put one knot at each distinct quantile; a value of many quantiles goes to their middle."""
    quantile_K = np.quantile(known, np.linspace(0, 1, KNOTS))
    knots, place = np.unique(quantile_K, return_inverse=True)
    targets = np.bincount(place, np.linspace(-1, 1, KNOTS)) / np.bincount(place)
    return {"knots": knots.tolist(), "targets": targets.tolist()}


def read_column(column: Column, table: Mapping[str, Any] | pa.Table, where: str) -> pa.Array:
    """Return a declared column of a table as one plain array; `where` names the table."""
    names = table.column_names if isinstance(table, pa.Table) else list(table)
    if column.source not in names:
        raise InputError(
            f"features.{column.name}: {where} have no column {column.source!r}; found "
            f"{', '.join(names) or 'none'}{suggestion(column.source, names)}"
        )
    array = table[column.source]
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def as_texts(column: Column, array: pa.Array) -> pa.Array:
    """Return a column of text, whole numbers or truth values as text."""
    if _is_text(array.type) or pa.types.is_null(array.type):
        return array.cast(pa.string())
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        return array.cast(pa.string())
    raise _unfit(column, array, "text or whole numbers")


def as_numbers(column: Column, array: pa.Array) -> NDArray[np.float64]:
    """Return a column of numbers or truth values as float64 [R]; NaN is missing."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if not (_is_number(array.type) or pa.types.is_null(array.type)):
        raise _unfit(column, array, "numbers")
    value_R = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    if np.isinf(value_R).any():
        raise InputError(
            f"features.{column.name}: {array[int(np.isinf(value_R).argmax())]} is among the "
            "values; expected finite numbers, or nothing where it is not known"
        )
    return value_R


def as_value_lists(column: Column, array: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
    """Return a multi-valued or text column laid flat: the row of each value, and the values."""
    if column.kind == "text":
        texts = as_texts(column, array).fill_null("").to_pylist()
        array = pa.array([words(text) for text in texts], pa.list_(pa.string()))
    if not _is_list(array.type):
        raise _unfit(column, array, "lists of text (or declare kind text or categorical)")
    texts = as_texts(column, array.flatten())
    length_R = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    row_V = np.repeat(np.arange(len(array)), length_R)
    there = texts.is_valid()
    return row_V[there.to_numpy(zero_copy_only=False)], texts.filter(there)


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case.

    >>> words("Hat, red")
    ['hat', 'red']
    """
    return WORD.findall(text.lower())


def as_vectors(column: Column, array: pa.Array, width: int | None = None) -> NDArray[np.float32]:
    """Return a column of equally long lists of numbers as float32 [R, V]; missing ones are 0."""
    if not (_is_list(array.type) and _is_number(array.type.value_type)):
        raise _unfit(column, array, "lists of numbers")
    lengths = pc.unique(pc.list_value_length(array).drop_null()).to_pylist()
    expected = width or (lengths or [0])[0]
    if not expected or any(length != expected for length in lengths):
        raise InputError(
            f"features.{column.name}: vectors of {', '.join(map(str, lengths)) or 'no'} numbers; "
            f"expected {width or 'as many'} in each"
        )
    vector_RV = np.zeros((len(array), expected), np.float32)
    there = array.is_valid().to_numpy(zero_copy_only=False)
    flat = array.drop_null().flatten().to_numpy(zero_copy_only=False)
    vector_RV[there] = flat.reshape(-1, expected)
    return vector_RV


def _is_list(dtype: pa.DataType) -> bool:
    """Whether values are lists, of any layout."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(kind(dtype) for kind in kinds)


def _is_text(dtype: pa.DataType) -> bool:
    """Whether values are text, of any layout."""
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype)


def _is_number(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype)


def _unfit(column: Column, array: pa.Array, expected: str) -> InputError:
    return InputError(
        f"features.{column.name}: column {column.source!r} is {array.type}; a {column.kind} one "
        f"is made of {expected}"
    )
