"""The log of `recsys serve`: the events that it accepted, after an older log where there is one."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.sources import Tables
from recsys.data.sources.canonical import EARLIEST, LARGEST, LATEST, Log, epoch_ms
from recsys.data.sources.events import Events, _features
from recsys.data.sources.files import ROW, existing, parquet
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis
    import ibis.expr.types as ir

COLUMNS = ("event_id", "user_id", "item_id", "timestamp", "event_type", "value")
LOCK = "files.lock"
"""The file beside `events` that a server holds while it changes the files there."""


@dataclass(frozen=True)
class Served(Events):
    """What was posted to a server, each event once; the server may go on writing meanwhile.

    also: an older log, as `data=events` reads it; its events come first, and columns, event_types
    and delimiter are about it. items, users, item_id, user_id: feature tables, as there.
    """

    also: str | None = None

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read a server's log folder, or the `events` in it. Raises InputError."""
        served, dropped = _served(con, _folder(path), scratch / "served")
        if self.also is None:
            items = _features(con, self.items, self.item_id, "item_id", "data.source.items")
            users = _features(con, self.users, self.user_id, "user_id", "data.source.users")
            shown, _ = self._shown(con)
            return Tables(served, items, users, True, dropped, shown, tuple(self.labels))
        older = super().read(con, existing(self.also, "data.source.also"), scratch)
        if not older.has_time:
            raise InputError(
                "data.source.also needs times, as served events have them; name their column: "
                "data.source.columns.timestamp=YOUR_COLUMN"
            )
        return older._replace(events=_after(older.events, served), dropped=dropped)


def _folder(path: Path | None) -> Path:
    if path is not None and str(path) != "???" and not Path(path).expanduser().exists():
        raise InputError(f"{path}: no such folder (looked from {Path.cwd()}); {_how()}")
    found = existing(path)
    folder = found / "events" if (found / "events").is_dir() else found
    if not folder.is_dir():
        raise InputError(f"{folder}: a file; {_how()}. For your own file type data=events")
    return folder


def _how() -> str:
    return (
        "expected the log of a server, WORKSPACE/serving/log. Start `recsys serve`, post events to "
        "/v1/events, and type data.path=WORKSPACE/serving/log"
    )


def _served(con: ibis.BaseBackend, folder: Path, scratch: Path) -> tuple[ir.Table, dict[str, int]]:
    """Return the checked events of a log, and how many were left out and why."""
    files = _snapshot(folder, scratch)
    if not files:
        raise InputError(
            f"{folder}: no events logged yet. Post some to /v1/events; they are logged within "
            "`rotate_seconds` (60), and when the server stops. Then type this again"
        )
    raw = parquet(con, files)
    if missing := [name for name in COLUMNS if name not in raw.columns]:
        raise InputError(
            f"{folder}: no column {missing[0]!r}, so not the log of a server; for your own files "
            "type data=events"
        )
    once, repeated = _once(con, raw.select(*COLUMNS, row=raw[ROW]))
    sound, impossible = _sound(once)
    events = Log(sound.drop("event_id"), str(folder)).events()
    return events, {"repeated": repeated, "impossible times": impossible}


def _snapshot(folder: Path, scratch: Path) -> list[Path]:
    """Link the files of this moment, so that the server may merge and delete its own."""
    scratch.mkdir(parents=True, exist_ok=True)
    with _unchanging(folder.parent / LOCK):
        for file in sorted(folder.glob("*.parquet")):
            try:
                os.link(file, scratch / file.name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(file, scratch / file.name)
    return sorted(scratch.glob("*.parquet"))


@contextmanager
def _unchanging(lock: Path) -> Iterator[None]:
    """Wait until a server is done with changing its files, and keep it from the next change."""
    if not lock.is_file():  # a copy of the files alone
        yield
        return
    with lock.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield


def _once(con: ibis.BaseBackend, events: ir.Table) -> tuple[ir.Table, int]:
    """Keep the first of events with one user and one event_id: a post may have been repeated."""
    keys = ["user_id", "event_id"]
    counted = events.group_by(keys).aggregate(rows=events.count(), kept=events.row.min())
    # Few are repeated, so that the join is with a small table.
    few = counted.filter(counted.rows > 1)
    repeated = con.create_table("repeated_posts", few, temp=True)
    extra = _number((repeated.rows - 1).sum())
    if not extra:
        return events, 0
    marked = events.left_join(repeated, keys)
    first = marked.filter(marked.kept.isnull() | (marked.kept == marked.row))
    return first.select(*events.columns), extra


def _sound(events: ir.Table) -> tuple[ir.Table, int]:
    """Leave out times that no dataset takes, and values: one bad post must not stop them all."""
    import ibis

    times = epoch_ms(events.timestamp.cast("timestamp(6)"))
    usable = times.between(EARLIEST * 1_000, LATEST * 1_000)
    value = ibis.ifelse(
        events.value.between(-LARGEST, LARGEST) & ~events.value.isnan(),
        events.value,
        ibis.null("float64"),
    )
    return events.filter(usable).mutate(value=value), _number((~usable).sum())


def _after(older: ir.Table, served: ir.Table) -> ir.Table:
    """Return both logs, the rows of the second numbered after those of the first."""
    later = served.mutate(row=served.row + _number(older.count()))
    return older.union(later.select(*older.columns))


def _number(value: ir.Scalar) -> int:
    return int(value.to_pyarrow().as_py() or 0)
