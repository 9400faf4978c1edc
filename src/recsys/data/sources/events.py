"""Your own log: Parquet or CSV events, columns mapped by name, optional item and user tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.sources import Tables
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

COLUMNS = {name: name for name in (*EVENT_COLUMNS, "event_type", "value")}
OPTIONAL = ("event_type", "value")


@dataclass(frozen=True)
class Events:
    """Canonical events: one file, or a folder of Parquet files read in name order.

    columns: our name → the file's; `timestamp: null` takes the order of the rows for time.
    event_types: the file's event types → ours. items, users: feature tables (Parquet or CSV)
    with the id column named `item_id` and `user_id`.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    event_types: Mapping[str, str] = field(default_factory=dict)
    items: str | None = None
    users: str | None = None
    item_id: str = "item_id"
    user_id: str = "user_id"
    delimiter: str = ","

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read the log at `path`, and the feature tables where there are any."""
        found = existing(path)
        raw = self._open(con, found)
        wanted = {ours: str(theirs) for ours, theirs in self._wanted().items() if theirs}
        names = mapped((c for c in raw.columns if c != ROW), wanted, OPTIONAL, found.name)
        chosen = {ours: raw[theirs] for ours, theirs in names.items()}
        if _kind(found) == "parquet":
            log = raw.select(row=raw[ROW], **chosen)
        else:
            log = kept_rows(con, "raw_events", raw.select(**chosen), found)
        return Tables(
            events=Log(log, found.name, names, self.event_types).events(),
            items=_features(con, self.items, self.item_id, "item_id", "data.source.items"),
            users=_features(con, self.users, self.user_id, "user_id", "data.source.users"),
            has_time="timestamp" in names,
        )

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
