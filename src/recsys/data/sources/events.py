"""Your own log: Parquet or CSV events, columns mapped by name, optional item and user tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from recsys.data.sources import OpenParquet, Tables, no_events
from recsys.data.sources.canonical import Log
from recsys.data.sources.files import (
    ROW,
    SUFFIXES,
    delimited,
    existing,
    header,
    is_gzip,
    kept_rows,
    mapped,
    parquet,
    parquet_parts,
    reading,
    separator,
    typed,
)
from recsys.data.sources.parts import (
    Part,
    Skipped,
    check_alike,
    columns_of,
    kind_of,
    parts_of,
    readable,
)
from recsys.data.sources.parts import blaming as blame
from recsys.schema import EVENT_COLUMNS, InputError, suggestion

if TYPE_CHECKING:
    import ibis

COLUMNS = {name: name for name in (*EVENT_COLUMNS, "event_type", "value")}
OPTIONAL = ("event_type", "value")
UNTYPED = "untyped"
"""What is in the columns of a text file, and in one of nulls: they go with any type."""
SHOWN = ("user_id", "item_id", "timestamp", "request_id", "position", "propensity", "part")
"""Columns of impressions that are neither labels nor context."""


class ReadLog(NamedTuple):
    """Checked events, whether they have times, what could not be read, and what columns hold."""

    events: ibis.Table
    has_time: bool
    columns: Mapping[str, str]
    skipped: Skipped = Skipped()
    blaming: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Events:
    """Canonical events: one file, or a folder of Parquet files read in name order.

    columns: our name → the file's; `timestamp: null` takes the order of the rows for time.
    event_types: the file's event types → ours. items, users: feature tables (Parquet or CSV)
    with the id column named `item_id` and `user_id`.
    impressions: what was shown, Parquet or CSV, a row an item; there may be no events beside it.
    impression_columns: our name → the file's; null for a `user_id`, `item_id` or `timestamp` that
    it does not have. labels: which columns are, where their names do not say so.
    on_corrupt: `refuse` a Parquet log with files or row groups that cannot be read, or `skip` them.
    """

    columns: Mapping[str, str | None] | None = field(default_factory=dict)
    event_types: Mapping[str, str] = field(default_factory=dict)
    items: str | None = None
    users: str | None = None
    item_id: str = "item_id"
    user_id: str = "user_id"
    delimiter: str = ","
    impressions: str | None = None
    impression_columns: Mapping[str, str | None] = field(default_factory=dict)
    labels: Sequence[str] = ()
    on_corrupt: str = "refuse"

    def __post_init__(self) -> None:
        if self.delimiter == "\\t":  # as it can be typed
            object.__setattr__(self, "delimiter", "\t")
        if not isinstance(self.delimiter, str) or len(self.delimiter) != 1:
            raise InputError(
                f"data.source.delimiter={self.delimiter!r}: expected one character, or \\t"
            )

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read the log at `path`, the impressions and the feature tables where there are any."""
        return self.read_with(con, partial(parquet_parts, con), path, scratch)

    def read_with(
        self, con: ibis.BaseBackend, opened: OpenParquet, path: Path | None, scratch: Path
    ) -> Tables:
        """Read as `read` does, but events in Parquet through `opened`."""
        shown, shown_has_time = self._shown(con)
        if path is None and shown is not None:
            log = ReadLog(no_events(), shown_has_time, {})
        elif _kind(found := existing(path)) == "parquet":
            log = self._parquet(opened, found, scratch)
        else:
            log = self._text(con, found)
        has_time = log.has_time
        if shown is not None and has_time != shown_has_time:
            raise InputError(
                "events and impressions need one clock, and only one of them has times; name the "
                "other's column: data.source.columns.timestamp or "
                "data.source.impression_columns.timestamp"
            )
        return Tables(
            events=log.events,
            items=_features(con, self.items, self.item_id, "item_id", "data.source.items"),
            users=_features(con, self.users, self.user_id, "user_id", "data.source.users"),
            has_time=has_time,
            impressions=shown,
            labels=tuple(self.labels),
            dropped={"unreadable": log.skipped.rows} if log.skipped.what else {},
            skipped=log.skipped.what,
            blaming=log.blaming,
            columns=log.columns,
        )

    def _parquet(self, opened: OpenParquet, found: Path, scratch: Path) -> ReadLog:
        """Return checked events of a Parquet file, or of all in a folder."""
        parts, skipped = parts_of(_files(found), self.on_corrupt)
        self._refuse_in_folders(parts, found)
        names = self._mapped(columns_of(parts), found)
        columns = list(dict.fromkeys(names.values()))
        check_alike(parts, columns)
        if self.on_corrupt == "skip":
            parts, more = readable(parts, columns, scratch)
            skipped = Skipped(more.rows, skipped.what + more.what)
        blaming = partial(blame, parts, columns)
        with blaming():
            raw = opened(parts, columns)
            table = raw.select(row=raw[ROW], **{ours: raw[name] for ours, name in names.items()})
            events = Log(table, found.name, names, self.event_types).events()
        kinds = {ours: _kind_in(parts, theirs) for ours, theirs in names.items()}
        return ReadLog(events, "timestamp" in names, kinds, skipped, blaming)

    def _refuse_in_folders(self, parts: Sequence[Part], found: Path) -> None:
        """Refuse a log that tells a column by the names of its folders alone."""
        there, wanted = columns_of(parts), self._wanted().values()
        for part in parts if found.is_dir() else ():
            for folder in part.file.relative_to(found).parts[:-1]:
                name, equals, _ = folder.partition("=")
                if equals and name in wanted and name not in there:
                    raise InputError(
                        f"{part.file}: {name} is in the folder's name and not in the file; write "
                        "it into the files: duckdb's COPY … (FORMAT parquet, PARTITION_BY "
                        f"({name}), WRITE_PARTITION_COLUMNS true)"
                    )

    def _text(self, con: ibis.BaseBackend, found: Path) -> ReadLog:
        """Return checked events of delimited text."""
        if self.on_corrupt != "refuse":
            raise InputError(
                f"data.source.on_corrupt={self.on_corrupt} is about Parquet and has no effect on "
                f"{found.name}; leave it out"
            )
        with reading(found):
            raw = delimited(con, found, delimiter=self.delimiter)
        names = self._mapped(raw.columns, found)
        chosen = raw.select(**{ours: raw[theirs] for ours, theirs in names.items()})
        log = Log(kept_rows(con, "raw_events", chosen, found), found.name, names, self.event_types)
        return ReadLog(log.events(), "timestamp" in names, dict.fromkeys(names, UNTYPED))

    def _mapped(self, columns: Iterable[str], found: Path) -> dict[str, str]:
        wanted = {ours: str(theirs) for ours, theirs in self._wanted().items() if theirs}
        return mapped(columns, wanted, OPTIONAL, found.name)

    def _shown(self, con: ibis.BaseBackend) -> tuple[ibis.Table | None, bool]:
        """Return the impressions under our names, and whether they have times."""
        if self.impressions is None:
            if self.impression_columns or self.labels:
                raise InputError(
                    "data.source.impression_columns and labels are about impressions, and there "
                    "are none; name the file: data.source.impressions=FILE"
                )
            return None, False
        file = existing(self.impressions, "data.source.impressions")
        wanted = {name: name for name in SHOWN} | dict(self.impression_columns)
        raw = self._typed(con, file, [wanted[name] for name in SHOWN if name.endswith("_id")])
        names = mapped(
            (c for c in raw.columns if c != ROW),
            {ours: str(theirs) for ours, theirs in wanted.items() if theirs},
            SHOWN[3:],
            file.name,
            "data.source.impression_columns",
        )
        rest = [c for c in raw.columns if c not in (ROW, *wanted, *names.values())]
        chosen = {ours: raw[theirs] for ours, theirs in names.items()}
        table = raw.select(*rest, **chosen, row=raw[ROW])
        with reading(file):
            timed = table.mutate(timestamp=Log(table, file.name, names).times())
        return timed, "timestamp" in names

    def _typed(self, con: ibis.BaseBackend, file: Path, ids: Sequence[str | None]) -> ibis.Table:
        """Open a table with a type a column, `ids` as text, and ROW its place in the file."""
        if _kind(file) == "parquet":
            return parquet(con, _files(file))
        there = set(header(file, self.delimiter))
        texts = [name for name in ids if name in there]
        table = typed(con, file, self.delimiter, texts)
        return kept_rows(con, "raw_impressions", table, file).rename({ROW: "row"})

    def _wanted(self) -> dict[str, str | None]:
        for name in self.columns or {}:
            if name not in COLUMNS:
                raise InputError(
                    f"data.source.columns: unknown column {name!r}; known are "
                    f"{', '.join(COLUMNS)}{suggestion(name, COLUMNS)}"
                )
        return COLUMNS | dict(self.columns or {})


def _kind_in(parts: Sequence[Part], name: str) -> str:
    kinds = [kind_of(part.schema.field(name).type) for part in parts]
    return next((kind for kind in kinds if kind != "nothing"), UNTYPED)


def _files(found: Path) -> list[Path]:
    """Return a Parquet file, or all in a folder in the order of their names.

    Names that begin with a dot or an underscore are not read, of folders neither: so Spark, Hive
    and their like mark what is not, or not yet, data.
    """
    files = [found]
    if found.is_dir():
        all_ = sorted(found.glob("**/*.parquet"))
        files = [file for file in all_ if not _is_hidden(file.relative_to(found))]
    if not files:
        raise InputError(f"{found}: no *.parquet in this folder; name a file instead")
    return files


def _is_hidden(inside: Path) -> bool:
    """Return whether a part of a path below the log's folder marks it as no data.

    >>> _is_hidden(Path("_temporary/0/part-0.parquet")), _is_hidden(Path("_day=1/a.parquet"))
    (True, False)
    """
    return any(
        part.startswith(".") or (part.startswith("_") and "=" not in part) for part in inside.parts
    )


def _kind(file: Path) -> str:
    """Return `parquet` or `csv` by the name's ending, before any `.gz`."""
    if file.is_dir():
        return "parquet"
    suffix = (file.with_suffix("") if is_gzip(file) else file).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{file}: cannot tell the format from its name; expected one of "
            f"{', '.join(SUFFIXES)} (text also with .gz), or a folder of Parquet files"
        )
    return SUFFIXES[suffix]


def _features(
    con: ibis.BaseBackend, path: str | None, theirs: str, ours: str, setting: str
) -> ibis.Table | None:
    """Open a feature table with its id as text under our name, or None where there is no path."""
    if path is None:
        return None
    file = existing(path, setting)
    if _kind(file) == "parquet":
        table = parquet(con, [file]).drop(ROW)
    else:
        delimiter = separator(file)
        mapped(header(file, delimiter), {ours: theirs}, (), file.name, "data.source")
        table = typed(con, file, delimiter, [theirs])
    mapped(table.columns, {ours: theirs}, (), file.name, "data.source")
    if table[theirs].type().is_floating():  # 7 would be "7.0", and no item's id
        raise InputError(
            f"{file.name}: column {theirs!r} holds numbers with a point; expected ids, text or "
            "whole numbers (pandas makes floats of a column where one is missing)"
        )
    rest = [name for name in table.columns if name != theirs]
    return table.select(*rest, **{ours: table[theirs].cast("string")})
