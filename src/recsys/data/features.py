"""Feature columns of items and users: their kinds, their checks, written in index order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.schema import InputError, suggestion

if TYPE_CHECKING:
    import ibis
    import ibis.expr.datatypes as dt
    import pyarrow as pa

KINDS = ("categorical", "numeric", "multi", "text", "vector")
TEXT_NAMES = ("title", "name", "description", "text")
RESERVED = ("count", "train_count", "user", "item", "rank")
SEPARATOR = "|"
"""Between the values of a text column that the config declares `multi`."""
GROUP = 131_072
"""Rows of a row group."""


def feature_kinds(table: ibis.Table, key: str, declared: Mapping[str, str]) -> dict[str, str]:
    """Return column → kind for every column of a feature table but its key.

    declared: kinds that the config states; the others follow from type and name; a date or moment
    is a number, of days since 1970.
    Raises InputError for a reserved name, an unknown kind or a type that is no feature.
    """
    schema = {name: kind for name, kind in table.schema().items() if name != key}
    for name in declared:
        if name not in schema:
            raise InputError(
                f"data.{key[:4]}_features.{name}: no such column; found {', '.join(schema)}"
                + suggestion(name, schema)
            )
    return {name: _kind(name, dtype, declared.get(name)) for name, dtype in schema.items()}


def _kind(name: str, dtype: dt.DataType, declared: str | None) -> str:
    if name.lower() in RESERVED:  # as DuckDB takes names
        raise InputError(f"feature column {name!r} is a name of recsys's own; rename it")
    possible = _possible(name, dtype)
    if not possible:
        raise InputError(
            f"feature column {name!r} is {dtype}; expected text, a number, a date, or a list of "
            "texts or numbers. Cast it or leave it out of the file"
        )
    if declared is not None and declared not in possible:
        raise InputError(
            f"feature column {name!r} is {dtype}, which cannot be {declared!r}; expected one of "
            f"{', '.join(possible)}{suggestion(declared, KINDS)}"
        )
    return declared or possible[0]


def _possible(name: str, dtype: dt.DataType) -> tuple[str, ...]:
    """Return the kinds that a column can be, the likeliest first."""
    if dtype.is_string():
        kinds = ("categorical", "text", "multi")
        return ("text", "categorical", "multi") if name.lower() in TEXT_NAMES else kinds
    if dtype.is_numeric() or dtype.is_boolean() or dtype.is_date() or dtype.is_timestamp():
        return ("numeric", "categorical")
    if dtype.is_array():
        return (
            ("multi",)
            if dtype.value_type.is_string()
            else ("vector",) * (dtype.value_type.is_numeric())
        )
    return ()


def typed(table: ibis.Table, kinds: Mapping[str, str]) -> ibis.Table:
    """Cast every feature to the one type of its kind."""
    return table.mutate(**{name: _typed(table[name], kind) for name, kind in kinds.items()})


def _typed(column: ibis.Value, kind: str) -> ibis.Value:
    if kind == "multi":
        return column.split(SEPARATOR) if column.type().is_string() else column
    if kind == "vector":
        return column.cast("array<float32>")
    if kind != "numeric":
        return column.cast("string")
    if column.type().is_date() or column.type().is_timestamp():
        return _days(column)
    return column.cast("int8") if column.type().is_boolean() else column


def _days(column: ibis.Value) -> ibis.Value:
    """Return moments as days since 1970-01-01 (UTC)."""
    return column.cast("timestamp").epoch_seconds() / 86_400


def check_key(table: ibis.Table, key: str) -> None:
    """Raise InputError where a feature table's key is empty or there twice."""
    counted = table.group_by(key).aggregate(rows=table.count())
    bad = counted.filter(counted[key].isnull() | (counted.rows > 1)).order_by(key).limit(1)
    found = bad.to_pyarrow().to_pylist()
    if found:
        met = "empty" if found[0][key] is None else repr(found[0][key])
        raise InputError(
            f"feature table: {key} {met} in {found[0]['rows']} rows; expected one row each. "
            "Keep one and prepare again"
        )


def write_features(
    batches: Iterable[pa.RecordBatch], file: Path, key: str, kinds: Mapping[str, str]
) -> None:
    """Write record batches to Parquet, refusing numbers that are not finite and ragged vectors.

    The file's bytes follow from the rows and their order alone, however they were batched.
    """
    import pyarrow.parquet as pq

    widths: dict[str, int] = {}
    writer: Any = None
    for batch in regrouped(batches, GROUP):
        for name, kind in kinds.items():
            _check(batch, key, name, kind, widths)
        writer = writer or pq.ParquetWriter(file, batch.schema)
        writer.write_batch(batch)
    assert writer is not None, f"{file}: no rows to write"
    writer.close()


def regrouped(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the same rows, `rows` at a time, and at the end what is left of them, perhaps none."""
    import pyarrow as pa

    waiting: list[pa.RecordBatch] = []
    room = rows
    for batch in batches:
        while len(batch) > room:
            yield pa.concat_batches([*waiting, batch.slice(0, room)])
            batch, waiting, room = batch.slice(room), [], rows
        waiting.append(batch)
        room -= len(batch)
    if waiting:
        yield pa.concat_batches(waiting)


def _check(batch: pa.RecordBatch, key: str, name: str, kind: str, widths: dict[str, int]) -> None:
    column = batch.column(name)
    if kind == "numeric":
        numbers = column.drop_null().to_numpy(zero_copy_only=False).astype(np.float64)
        present = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        _refuse(batch, key, name, present[~np.isfinite(numbers)], "expected a finite number")
    if kind == "vector":
        lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
        given = lengths[lengths >= 0]
        if len(given):
            width = widths.setdefault(name, int(given[0]))
            ragged = (lengths >= 0) & (lengths != width)
            _refuse(batch, key, name, np.flatnonzero(ragged), f"expected {width} numbers")
        flat = column.flatten().to_numpy(zero_copy_only=False)
        owners = np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0))
        _refuse(batch, key, name, owners[~np.isfinite(flat)], "expected finite numbers")


def _refuse(batch: pa.RecordBatch, key: str, name: str, rows: np.ndarray, expected: str) -> None:
    if len(rows):
        row = int(rows[0])
        met = str(batch.column(name)[row].as_py())[:60]
        raise InputError(
            f"feature column {name!r} of {key} {batch.column(key)[row].as_py()!r} is {met}; "
            f"{expected}, or nothing where it is not known"
        )
