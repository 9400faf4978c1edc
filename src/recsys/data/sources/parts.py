"""Many Parquet files as one log: each whole and of one schema, or named with what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recsys.schema import InputError

if TYPE_CHECKING:
    import pyarrow as pa

ON_CORRUPT = ("refuse", "skip")
SKIP_HELP = (
    "copy the file again from its source, or leave out what cannot be read: "
    "data.source.on_corrupt=skip"
)


class Part(NamedTuple):
    """One file of a log: how many rows its footer says, and its columns."""

    file: Path
    rows: int
    schema: pa.Schema


class Skipped(NamedTuple):
    """What was left out because it cannot be read: how many rows, where known, and what it was."""

    rows: int = 0
    what: tuple[str, ...] = ()


def part_of(file: Path) -> Part:
    """Read a file's footer; raise InputError where there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            return Part(file, opened.metadata.num_rows, opened.schema_arrow)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: not a whole Parquet file ({error}); {SKIP_HELP}") from error


def parts_of(files: Sequence[Path], on_corrupt: str) -> tuple[list[Part], Skipped]:
    """Read all footers; leave out the files without one where `on_corrupt` is `skip`."""
    if on_corrupt not in ON_CORRUPT:
        raise InputError(f"data.source.on_corrupt={on_corrupt}: expected {' or '.join(ON_CORRUPT)}")
    parts, skipped = [], []
    for file in files:
        try:
            parts.append(part_of(file))
        except InputError as error:
            if on_corrupt == "refuse":
                raise
            skipped.append(f"{file.name}: {error.__cause__}")
    if not parts:
        raise InputError(f"{files[0].parent}: no Parquet file in it can be read: {skipped[0]}")
    return parts, Skipped(0, tuple(skipped))


def columns_of(parts: Sequence[Part]) -> list[str]:
    """Return every column that some file has, those of the first file first."""
    return list(dict.fromkeys(name for part in parts for name in part.schema.names))


def check_alike(parts: Sequence[Part], names: Iterable[str]) -> None:
    """Raise InputError where a column is missing in a file, or of another kind, naming both files.

    Widths may differ, as int32 and int64 do, and so may the units of times.
    """
    for name in names:
        known = next(part for part in parts if name in part.schema.names)
        kind = None
        for part in parts:
            if name not in part.schema.names:
                raise InputError(
                    f"{part.file}: no column {name!r}, which {known.file.name} has; found "
                    f"{', '.join(part.schema.names)}. Write both with the same columns, or "
                    f"prepare them apart{_or_leave_out(name)}"
                )
            met = kind_of(part.schema.field(name).type)
            if met == "nothing":
                continue
            if kind not in (None, met):
                raise InputError(
                    f"{part.file}: column {name!r} is {part.schema.field(name).type}, and in "
                    f"{known.file.name} it is {known.schema.field(name).type}; expected one kind "
                    "through all files. Cast it in one of them"
                )
            known, kind = (part, met) if kind is None else (known, kind)


def _or_leave_out(name: str) -> str:
    optional = name in ("event_type", "value")
    return f", or leave it out: data.source.columns.{name}=null" if optional else ""


def kind_of(dtype: pa.DataType) -> str:
    """Return which types go together: numbers, text, moments; any other type by itself.

    >>> import pyarrow as pa
    >>> kind_of(pa.int32()), kind_of(pa.float64()), kind_of(pa.large_string())
    ('number', 'number', 'text')
    """
    from pyarrow import types

    if types.is_dictionary(dtype):
        return kind_of(dtype.value_type)
    if types.is_null(dtype):
        return "nothing"
    if types.is_integer(dtype) or types.is_floating(dtype) or types.is_decimal(dtype):
        return "number"
    if types.is_string(dtype) or types.is_large_string(dtype) or types.is_string_view(dtype):
        return "text"
    return "moment" if types.is_timestamp(dtype) or types.is_date(dtype) else str(dtype)


def readable(
    parts: Sequence[Part], names: Sequence[str], scratch: Path
) -> tuple[list[Part], Skipped]:
    """Return the parts with their unreadable row groups left out, sound ones copied to `scratch`.

    Reads every row group once.
    """
    kept, rows, what = [], 0, []
    for part in parts:
        broken = list(_broken(part, names))
        what += [f"{part.file.name}: {said}" for _, _, said in broken]
        rows += sum(lost for _, lost, _ in broken)
        if broken:
            part = _mended(part, names, {group for group, _, _ in broken}, scratch)
        kept.append(part)
    if not sum(part.rows for part in kept):
        raise InputError(f"{parts[0].file.parent}: no row group in it can be read: {what[0]}")
    return kept, Skipped(rows, tuple(what))


def _broken(part: Part, names: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yield number, rows and what is wrong of each row group that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(part.file, page_checksum_verification=True) as opened:
        first = 0
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            try:
                opened.read_row_group(group, columns=list(names)).validate(full=True)
            except (OSError, pa.ArrowException) as error:
                where = f"row group {group + 1} of {opened.num_row_groups}"
                said = str(error).strip().split("\n")[0]
                yield group, rows, f"{where}, rows {first + 1} to {first + rows} ({said})"
            first += rows


def _mended(part: Part, names: Sequence[str], broken: set[int], scratch: Path) -> Part:
    """Copy the sound row groups of a file."""
    import pyarrow.parquet as pq

    folder = scratch / "mended"
    folder.mkdir(exist_ok=True)
    file = folder / f"{len(list(folder.iterdir())):06d}.parquet"
    with pq.ParquetFile(part.file) as opened:
        empty = opened.schema_arrow.empty_table().select(list(names))
        with pq.ParquetWriter(file, empty.schema) as writer:
            for group in set(range(opened.num_row_groups)) - broken:
                writer.write_table(opened.read_row_group(group, columns=list(names)))
    return part_of(file)


@contextmanager
def blaming(parts: Sequence[Part], names: Sequence[str]) -> Iterator[None]:
    """Name the file and the row group where an engine failed at one that cannot be read."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InputError) else error
        if isinstance(cause, engine_errors()) and not lacks(cause):
            for part in parts:
                for _, _, said in _broken(part, names):
                    raise InputError(f"{part.file}: cannot read {said}; {SKIP_HELP}") from error
        raise


def engine_errors() -> tuple[type[Exception], ...]:
    """Return the errors of DuckDB and, where it is loaded, of Spark."""
    import duckdb

    if "pyspark" not in sys.modules:
        return (duckdb.Error,)
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    return (duckdb.Error, PySparkException, Py4JError)


def lacks(error: Any) -> str | None:
    """Return what an engine's error is a lack of: `disk`, `memory` or nothing known."""
    text = f"{type(error).__name__}: {error}"
    if "No space left" in text:
        return "disk"
    return "memory" if "OutOfMemory" in text or "Out of memory" in text else None
