"""The log of `recsys serve`: the events that it took, after an older log, and what it showed."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.sources import Tables
from recsys.data.sources.answers import FEEDBACK, NEEDED, SINCE, shown_in
from recsys.data.sources.canonical import EARLIEST, LARGEST, LATEST, Log, epoch_ms, number
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
class Served:
    """What was posted to a server, each event once; the server may go on writing meanwhile.

    also: an older log, as `data=events` reads it; its events come first, and columns, event_types
    and delimiter are about it. items, users, item_id, user_id: feature tables, as there.
    impressions: read what the server answered as impressions, labelled by the events that name the
    answers. wait_minutes: answers that the newest event is not so much later than are left out, for
    their outcome is not known yet.
    """

    also: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    event_types: Mapping[str, str] = field(default_factory=dict)
    items: str | None = None
    users: str | None = None
    item_id: str = "item_id"
    user_id: str = "user_id"
    delimiter: str = ","
    impressions: bool = True
    wait_minutes: float = 60

    def __post_init__(self) -> None:
        if not isinstance(self.impressions, bool):
            raise InputError(
                f"data.source.impressions={self.impressions}: expected true or false; a file of "
                "what was shown goes with data=events"
            )
        wait = self.wait_minutes
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait < math.inf:
            raise InputError(f"data.source.wait_minutes={wait}: expected minutes, 0 or more")

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read a server's log folder, or the `events` in it alone. Raises InputError."""
        folder, answered = _folders(path)
        answers = _snapshot(answered, scratch / "answers") if self.impressions else []
        posted, dropped = _posted(con, folder, scratch / "served")
        events = Log(posted.drop("event_id", "answer_id"), str(folder)).events()
        shown, left = self._shown(con, answers, answered, posted) if answers else (None, {})
        return Tables(
            events=events if self.also is None else _after(self._older(con, scratch), events),
            items=_features(con, self.items, self.item_id, "item_id", "data.source.items"),
            users=_features(con, self.users, self.user_id, "user_id", "data.source.users"),
            has_time=True,
            dropped=dropped,
            impressions=shown,
            labels=() if shown is None else FEEDBACK,
            dropped_requests=left,
        )

    def _older(self, con: ibis.BaseBackend, scratch: Path) -> ibis.Table:
        """Return the events of `also`; raise InputError where they have no times."""
        log = Events(self.columns, self.event_types, delimiter=self.delimiter)
        older = log.read(con, existing(self.also, "data.source.also"), scratch)
        if not older.has_time:
            raise InputError(
                "data.source.also needs times, as served events have them; name their column: "
                "data.source.columns.timestamp=YOUR_COLUMN"
            )
        return older.events

    def _shown(
        self, con: ibis.BaseBackend, files: Sequence[Path], folder: Path, posted: ir.Table
    ) -> tuple[ibis.Table | None, dict[str, int]]:
        """Return what the answers in `files` showed, and how many were left out and why."""
        answers = _opened(con, files, folder, NEEDED, SINCE)
        once, repeated = _once(con, answers, ["answer_id"], "repeated_answers")
        shown, left = shown_in(con, once, posted, round(self.wait_minutes * 60_000))
        return shown, left | ({"answers logged twice": repeated} if repeated else {})


def _folders(path: Path | None) -> tuple[Path, Path]:
    """Return where a log's events are, and where its answers would be."""
    if path is not None and str(path) != "???" and not Path(path).expanduser().exists():
        raise InputError(f"{path}: no such folder (looked from {Path.cwd()}); {_how()}")
    found = existing(path)
    folder = found / "events" if (found / "events").is_dir() else found
    if not folder.is_dir():
        raise InputError(f"{folder}: a file; {_how()}. For your own file type data=events")
    return folder, found / "answers"


def _how() -> str:
    return (
        "expected the log of a server, WORKSPACE/serving/log. Start `recsys serve`, post events to "
        "/v1/events, and type data.path=WORKSPACE/serving/log"
    )


def _posted(con: ibis.BaseBackend, folder: Path, scratch: Path) -> tuple[ir.Table, dict[str, int]]:
    """Return the sound events of a log, each once, and how many were left out and why."""
    files = _snapshot(folder, scratch)
    if not files:
        raise InputError(
            f"{folder}: no events logged yet. Post some to /v1/events; they are logged within "
            "`rotate_seconds` (60), and when the server stops. Then type this again"
        )
    raw = _opened(con, files, folder, COLUMNS, {"answer_id": "string"})
    once, repeated = _once(con, raw, ["user_id", "event_id"], "repeated_posts")
    sound, impossible = _sound(once)
    return sound, {"repeated": repeated, "impossible times": impossible}


def _opened(
    con: ibis.BaseBackend,
    files: Sequence[Path],
    folder: Path,
    needed: Sequence[str],
    since: Mapping[str, str],
) -> ir.Table:
    """Open a log's files; columns that came `since` with their types are null in older ones."""
    import ibis

    raw = parquet(con, files)
    if missing := [name for name in needed if name not in raw.columns]:
        raise InputError(
            f"{folder}: no column {missing[0]!r}, so not the log of a server; for your own files "
            "type data=events"
        )
    later = {
        name: raw[name].cast(kind) if name in raw.columns else ibis.null(kind)
        for name, kind in since.items()
    }
    return raw.select(*needed, **later, row=raw[ROW])


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


def _once(
    con: ibis.BaseBackend, rows: ir.Table, keys: list[str], name: str
) -> tuple[ir.Table, int]:
    """Keep the first of rows with the same keys: a post, or a file of the log, may be repeated.

    name: of a table of those that are. Also return how many went.
    """
    counted = rows.group_by(keys).aggregate(times=rows.count(), kept=rows.row.min())
    # Few are repeated, so that the join is with a small table.
    few = counted.filter(counted.times > 1)
    repeated = con.create_table(name, few, temp=True)
    extra = number((repeated.times - 1).sum())
    if not extra:
        return rows, 0
    marked = rows.left_join(repeated, keys)
    first = marked.filter(marked.kept.isnull() | (marked.kept == marked.row))
    return first.select(*rows.columns), extra


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
    return events.filter(usable).mutate(value=value), number((~usable).sum())


def _after(older: ir.Table, served: ir.Table) -> ir.Table:
    """Return both logs, the rows of the second numbered after those of the first."""
    later = served.mutate(row=served.row + number(older.count()))
    return older.union(later.select(*older.columns))
