"""Your own log: Parquet or CSV events, columns mapped by name, optional item and user tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.sources import Tables, no_events
from recsys.data.sources.canonical import Log
from recsys.data.sources.files import (
    ROW,
    SUFFIXES,
    delimited,
    existing,
    header,
    kept_rows,
    mapped,
    parquet,
    reading,
)
from recsys.schema import EVENT_COLUMNS, InputError, suggestion

if TYPE_CHECKING:
    import ibis
    import ibis.expr.datatypes as dt

COLUMNS = {name: name for name in (*EVENT_COLUMNS, "event_type", "value")}
OPTIONAL = ("event_type", "value")
UNTYPED = "untyped"
"""What is in the columns of a text file, and in one of nulls: they go with any type."""
SHOWN = ("user_id", "item_id", "timestamp", "request_id", "position", "propensity", "part")
"""Columns of impressions that are neither labels nor context."""


@dataclass(frozen=True)
class Events:
    """Canonical events: one file, or a folder of Parquet files read in name order.

    columns: our name → the file's; `timestamp: null` takes the order of the rows for time.
    event_types: the file's event types → ours. items, users: feature tables (Parquet or CSV)
    with the id column named `item_id` and `user_id`.
    impressions: what was shown, Parquet or CSV, a row an item; there may be no events beside it.
    impression_columns: our name → the file's; null for a `user_id`, `item_id` or `timestamp` that
    it does not have. labels: which columns are, where their names do not say so.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    event_types: Mapping[str, str] = field(default_factory=dict)
    items: str | None = None
    users: str | None = None
    item_id: str = "item_id"
    user_id: str = "user_id"
    delimiter: str = ","
    impressions: str | None = None
    impression_columns: Mapping[str, str | None] = field(default_factory=dict)
    labels: Sequence[str] = ()

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read the log at `path`, the impressions and the feature tables where there are any."""
        shown, shown_has_time = self._shown(con)
        columns: dict[str, str] = {}
        if path is None and shown is not None:
            events, has_time = no_events(), shown_has_time
        else:
            events, columns = self._events(con, existing(path))
            has_time = "timestamp" in columns
        if shown is not None and has_time != shown_has_time:
            raise InputError(
                "events and impressions need one clock, and only one of them has times; name the "
                "other's column: data.source.columns.timestamp or "
                "data.source.impression_columns.timestamp"
            )
        return Tables(
            events=events,
            items=_features(con, self.items, self.item_id, "item_id", "data.source.items"),
            users=_features(con, self.users, self.user_id, "user_id", "data.source.users"),
            has_time=has_time,
            impressions=shown,
            labels=tuple(self.labels),
            columns=columns,
        )

    def _events(self, con: ibis.BaseBackend, found: Path) -> tuple[ibis.Table, dict[str, str]]:
        """Return the checked events, and what is in each column that the log has."""
        raw = self._open(con, found)
        wanted = {ours: str(theirs) for ours, theirs in self._wanted().items() if theirs}
        names = mapped((c for c in raw.columns if c != ROW), wanted, OPTIONAL, found.name)
        chosen = {ours: raw[theirs] for ours, theirs in names.items()}
        if _kind(found) == "parquet":
            log = raw.select(row=raw[ROW], **chosen)
            columns = {name: _content(column.type()) for name, column in chosen.items()}
        else:
            log = kept_rows(con, "raw_events", raw.select(**chosen), found)
            columns = dict.fromkeys(chosen, UNTYPED)
        return Log(log, found.name, names, self.event_types).events(), columns

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
            timed = table.mutate(timestamp=Log(table, file.name, names)._times())
        return timed, "timestamp" in names

    def _typed(self, con: ibis.BaseBackend, file: Path, ids: Sequence[str | None]) -> ibis.Table:
        """Open a table with a type a column, `ids` as text, and ROW its place in the file."""
        if _kind(file) == "parquet":
            return self._open(con, file)
        there = set(header(file, self.delimiter))
        texts = {name: "VARCHAR" for name in ids if name in there}
        with reading(file):
            table = con.read_csv(str(file), header=True, delim=self.delimiter, types=texts)
        return kept_rows(con, "raw_impressions", table, file).rename({ROW: "row"})

    def _wanted(self) -> dict[str, str | None]:
        for name in self.columns:
            if name not in COLUMNS:
                raise InputError(
                    f"data.source.columns: unknown column {name!r}; known are "
                    f"{', '.join(COLUMNS)}{suggestion(name, COLUMNS)}"
                )
        return COLUMNS | dict(self.columns)

    def _open(self, con: ibis.BaseBackend, found: Path) -> ibis.Table:
        if found.is_dir():
            files = sorted(found.glob("**/*.parquet"))
            if not files:
                raise InputError(f"{found}: no *.parquet in this folder; name a file instead")
            return parquet(con, files)
        if _kind(found) == "parquet":
            return parquet(con, [found])
        with reading(found):
            return delimited(con, found, delimiter=self.delimiter)


def _content(dtype: dt.DataType) -> str:
    """Return what a Parquet column holds, as a message says it."""
    if dtype.is_timestamp() or dtype.is_date():
        return "moments"
    if dtype.is_null():
        return UNTYPED
    if dtype.is_integer():
        return "whole numbers"
    return "numbers" if dtype.is_numeric() else "text"


def _kind(file: Path) -> str:
    """Return `parquet` or `csv` by the name's ending, before any `.gz`."""
    if file.is_dir():
        return "parquet"
    suffix = (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()
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
        names = header(file, ",")
        mapped(names, {ours: theirs}, (), file.name, "data.source")
        with reading(file):
            table = con.read_csv(str(file), header=True, delim=",", types={theirs: "VARCHAR"})
    mapped(table.columns, {ours: theirs}, (), file.name, "data.source")
    rest = [name for name in table.columns if name != theirs]
    return table.select(*rest, **{ours: table[theirs].cast("string")})
