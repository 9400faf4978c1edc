"""Open delimited text, JSON lines and Parquet as Ibis tables, with messages a person can act on."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from recsys.data.sources.parts import Part, engine_errors, lacks, part_of
from recsys.schema import InputError, suggestion

if TYPE_CHECKING:
    import ibis

SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "csv"}
SEPARATORS = (",", "\t", ";", "|")
ROW = "file_row_number"
TYPED = {"\t": "\\t"}
"""How a separator is typed that a shell would not leave as it is."""
FILE = "recsys_file"
"""Columns that the Parquet reader adds; neither is likely in anyone's log."""
INDEX = re.compile(r"__index_level_\d+__")
"""What pandas calls an index without a name in Parquet."""
ALIASES = {
    "user_id": ("user", "userid", "uid", "visitorid", "visitor_id", "customer_id", "session"),
    "item_id": ("item", "itemid", "product_id", "sku", "movieid", "asin", "article_id", "iid"),
    "timestamp": ("time", "ts", "date", "datetime", "event_time", "unix_timestamp", "created_at"),
    "event_type": ("type", "event", "behavior", "behaviour", "action"),
    "value": ("rating", "price", "score", "dwell"),
}
"""Names that other people give to our columns, for the suggestion in a message only."""


def existing(path: Path | str | None, setting: str = "data.path") -> Path:
    """Return `path` where there is a file with something in it, or a folder; else InputError."""
    if path is None or str(path) == "???":
        raise InputError(f"{setting} is not set; type {setting}=/path/to/your/file")
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(
            f"{found}: no such file or folder (looked from {Path.cwd()}); "
            f"set {setting} to where it is"
        )
    if found.is_file() and found.stat().st_size == 0:
        raise InputError(f"{found}: the file is empty (0 bytes); expected events in it")
    return found


def inside(folder: Path, names: Sequence[str]) -> Path:
    """Return the first of `names` that is a file in `folder`, with or without `.gz`."""
    for name in names:
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return existing(file)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise InputError(f"{folder}: no {' or '.join(names)} in it; found {found}")


def is_gzip(file: Path) -> bool:
    """Return whether a file's name says that it is packed.

    >>> is_gzip(Path("LOG.CSV.GZ"))
    True
    """
    return file.suffix.lower() == ".gz"


def open_text(file: Path, encoding: str = "utf-8-sig") -> IO[str]:
    """Open a text file for reading, unpacking `.gz`."""
    if is_gzip(file):
        return gzip.open(file, "rt", encoding=encoding, newline="")
    return file.open(encoding=encoding, newline="")


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Turn what DuckDB and the decoders say about a bad file into an InputError naming it."""
    try:
        yield
    except engine_errors() as error:
        if lacks(error):
            raise
        raise InputError(f"{file}: {_essence(str(error))}") from error
    except (UnicodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from error


def _essence(message: str) -> str:
    """Keep what is wrong of a DuckDB message; drop its option dump and its advice on SQL."""
    head = message.split("Possible fixes")[0].split("Possible Solution")[0].split("LINE 1:")[0]
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    return "; ".join(lines[:4]) + "; mend that line or convert the file to Parquet"


def header(file: Path, delimiter: str) -> list[str]:
    """Return the column names in the first line of a delimited text file.

    One without a name, as pandas writes its index, is `unnamed` of its place.
    """
    with reading(file), open_text(file) as stream:
        given = next(csv.reader(stream, delimiter=delimiter), [])
    names = [name or unnamed(at) for at, name in enumerate(given)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{file.name}: column {twice[0]!r} is there twice; rename one")
    return names


def unnamed(place: int) -> str:
    """Return what a column without a name is called.

    >>> unnamed(0)
    'unnamed_0'
    """
    return f"unnamed_{place}"


def delimited(
    con: ibis.BaseBackend,
    file: Path,
    *,
    delimiter: str = ",",
    names: Sequence[str] | None = None,
    quote: str = '"',
) -> ibis.Table:
    """Open delimited text with every column as text, so that ids stay byte for byte.

    names: the columns of a file without a header.
    """
    columns = dict.fromkeys(names or header(file, delimiter), "VARCHAR")
    return con.read_csv(
        as_named(file),
        columns=columns,
        header=names is None,
        auto_detect=False,
        delim=delimiter,
        quote=quote,
        escape=quote,
        compression=_compression(file),
    )


def _compression(file: Path) -> str:
    return "gzip" if is_gzip(file) else "none"


def separator(file: Path) -> str:
    """Return what separates the columns of a table: the most frequent one in its first line."""
    with reading(file), open_text(file) as stream:
        line = stream.readline()
    return max(SEPARATORS, key=line.count)


def typed(con: ibis.BaseBackend, file: Path, delimiter: str, texts: Sequence[str]) -> ibis.Table:
    """Open delimited text with a type a column, as all of its rows have it; `texts` stay text.

    Columns without a name are left out.
    """
    text = dict.fromkeys(texts, "VARCHAR")
    names = header(file, delimiter)
    with reading(file):
        table = con.read_csv(
            as_named(file),
            header=True,
            delim=delimiter,
            types=text,
            sample_size=-1,
            compression=_compression(file),
        )
    return table.drop(*(table.columns[at] for at, name in enumerate(names) if name == unnamed(at)))


def json_lines(con: ibis.BaseBackend, file: Path, columns: Mapping[str, str]) -> ibis.Table:
    """Open JSON lines, one column a key, with the given DuckDB types; absent keys are null."""
    return con.read_json(as_named(file), columns=dict(columns), format="newline_delimited")


def first_json(file: Path) -> dict[str, object]:
    """Return the first object of a JSON-lines file, to see which keys it has."""
    with reading(file), open_text(file) as stream:
        line = stream.readline()
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{file}: line 1 is not JSON ({error}); expected JSON lines") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: line 1 is JSON but not an object; expected {{...}} a line")
    return value


def as_named(file: Path | str) -> str:
    """Return a path that DuckDB takes for one file, not for a pattern of names.

    >>> as_named("log[1].csv")
    'log[[]1].csv'
    """
    return re.sub(r"([*?\[])", r"[\1]", str(file))


def parquet(con: ibis.BaseBackend, files: Sequence[Path]) -> ibis.Table:
    """Open Parquet files as one table whose ROW column counts through all of them in order.

    An index that pandas has written beside the columns is left out.
    """
    table = parquet_parts(con, [part_of(file) for file in files])
    return table.drop(*(name for name in table.columns if INDEX.fullmatch(name)))


def parquet_parts(
    con: ibis.BaseBackend, parts: Sequence[Part], columns: Sequence[str] = ()
) -> ibis.Table:
    """Open files whose footers are read, as one table with ROW; `columns` are among its own."""
    # As DuckDB tells them again: absolute, and `..` gone, but links kept.
    names = [os.path.abspath(part.file) for part in parts]
    literal = [as_named(name) for name in names]
    plain = {"file_row_number": True, "hive_partitioning": False}
    if len(names) == 1:
        return _in_microseconds(con.read_parquet(literal, **plain), parts)
    table = con.read_parquet(literal, filename=FILE, union_by_name=True, **plain)
    table = _in_microseconds(table, parts)
    starts = [0, *itertools.accumulate(part.rows for part in parts)]
    start = table[FILE].cases(*zip(names, starts[:-1], strict=True), else_=0)
    return table.mutate(**{ROW: table[ROW] + start}).drop(FILE)


def _in_microseconds(table: ibis.Table, parts: Sequence[Part]) -> ibis.Table:
    """Cast moments in nanoseconds with a zone, as pandas writes them: Ibis has no type for them."""
    fields = (column for part in parts for column in part.schema)
    fine = {f.name for f in fields if str(f.type).startswith("timestamp[ns, tz=")}
    return table.mutate(**{name: table[name].cast("timestamp('UTC', 6)") for name in fine})


def kept_rows(con: ibis.BaseBackend, name: str, table: ibis.Table, file: Path) -> ibis.Table:
    """Parse a text table once into DuckDB's own storage; `row` is its place in the file."""
    with reading(file):
        stored = con.create_table(name, table, temp=True)
    return stored.mutate(row=stored.rowid())


def mapped(
    found: Iterable[str],
    wanted: Mapping[str, str],
    optional: Iterable[str],
    place: str,
    setting: str = "data.source.columns",
) -> dict[str, str]:
    """Return our name → their name for the columns that are there, or raise InputError.

    An optional column may be absent only while it keeps its own name.

    >>> mapped(["user_id", "t"], {"user_id": "user_id", "value": "value"}, ["value"], "log.csv")
    {'user_id': 'user_id'}
    """
    there = list(found)
    chosen = {}
    for ours, theirs in wanted.items():
        if theirs in there:
            chosen[ours] = theirs
        elif ours not in optional or theirs != ours:
            raise InputError(_no_column(ours, theirs, there, place, setting))
    return chosen


def _no_column(ours: str, theirs: str, found: list[str], place: str, setting: str) -> str:
    if len(found) == 1 and (other := next((c for c in "\t;|" if c in found[0]), None)):
        return (
            f"{place}: no column {theirs!r}; the columns look separated by {other!r}. "
            f"Type 'data.source.delimiter=\"{TYPED.get(other, other)}\"'"
        )
    return (
        f"{place}: no column {theirs!r}; found {', '.join(found)}. "
        f"Map it with {setting}.{ours}={_likely(ours, found)}"
    )


def _likely(ours: str, found: list[str]) -> str:
    known = ALIASES.get(ours, ())
    for name in found:
        if name.lower().replace(" ", "_") in known:
            return name
    guess = suggestion(ours, found)
    return guess.split("'")[1] if guess else "YOUR_COLUMN"
