"""Parquet files of the log: written whole or not at all, merged when many, rid of a person.

Whoever adds, merges or rewrites files of a log holds its `files.lock` (`changing`); a crash at any
point leaves what `recovered` puts right: a row is then in one file, once.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.serving.state import user_hash

EVENTS = pa.schema(
    [
        ("event_id", pa.string()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("event_type", pa.string()),
        ("timestamp", pa.timestamp("ms", tz="UTC")),
        ("value", pa.float64()),
        ("answer_id", pa.string()),
        ("received", pa.int64()),
    ]
)
ANSWERS = pa.schema(
    [
        ("answer_id", pa.string()),
        ("user_id", pa.string()),
        ("time", pa.int64()),
        ("bundle", pa.string()),
        ("arm", pa.string()),
        ("source", pa.string()),
        ("k", pa.int32()),
        ("items", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("fallback", pa.string()),
        ("propensities", pa.list_(pa.float64())),
        ("explore", pa.float64()),
        ("now", pa.int64()),
        ("context", pa.string()),
        ("weights", pa.string()),
        ("boosts", pa.string()),
        ("history", pa.string()),
        ("history_used", pa.int32()),
        ("path", pa.int64()),
    ]
)
KINDS = {"events": EVENTS, "answers": ANSWERS}
"""What is logged, a folder each; times without a unit in their type are milliseconds since 1970."""
MOMENTS = {"events": "timestamp", "answers": "time"}
"""The column by which an erasure covers a row."""
SCRATCH = ".tmp"
PLAN = "merge.json"
GROUP = 50_000
"""Rows of a row group: what one pass over a file holds in memory."""
TOGETHER = 16
"""So many files of about one size are merged into one."""
SIZES = (1 << 18, 1 << 22, 1 << 26)
"""Bytes up to which files count as of one size; larger than the last are left as they are."""
Wrong = Callable[[pa.Table], pa.Array]
"""Marks the rows of a table that are to go."""


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; yield False at once where another holds it and `wait` is off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield taken(handle, wait=wait)
    finally:
        os.close(handle)


def taken(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file for as long as it stays open; return False where another has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def changing(log_dir: Path) -> Iterator[None]:
    """Hold the right to change a log's files, after putting right what a crash left."""
    with locked(log_dir / "files.lock"):
        for kind in KINDS:
            recovered(log_dir / kind)
        yield


def recovered(folder: Path) -> None:
    """Finish a merge that was decided on; delete half-written files."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / PLAN
    if plan.is_file():
        with suppress(ValueError):  # half a plan decides nothing: the parts are all there
            _carry_out(folder, json.loads(plan.read_bytes()))
        plan.unlink()
    for left in folder.glob(f"*{SCRATCH}"):
        left.unlink()


def files(folder: Path) -> list[Path]:
    """Return a folder's Parquet files in the order of their names, oldest first."""
    return sorted(folder.glob("*.parquet"))


def synced(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_part(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables as one Parquet file, on the disk when this returns; return its rows.

    Where there are no rows, an older file of that name goes. Raises OSError on a full disk, and
    then nothing has changed.
    """
    scratch = path.with_name(path.name + SCRATCH)
    rows = written(scratch, tables, schema)
    if rows:
        scratch.replace(path)
    else:
        scratch.unlink()
        path.unlink(missing_ok=True)
    synced(path.parent)
    return rows


def written(scratch: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables as one Parquet file, on the disk when this returns, else gone; return rows."""
    rows = 0
    try:
        with pq.ParquetWriter(scratch, schema, compression="zstd") as writer:
            for table in _grouped(of_schema(table, schema) for table in tables):
                writer.write_table(table, row_group_size=GROUP)
                rows += len(table)
        synced(scratch)
    except BaseException:
        scratch.unlink(missing_ok=True)  # on a full disk the room is needed
        raise
    return rows


def of_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return rows of an older version with nothing in the columns that came since."""
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join small tables, so that a row group has some GROUP rows."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += len(table)
        if rows >= GROUP:
            yield pa.concat_tables(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def read_part(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield a file's row groups."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)


def merged(log_dir: Path, kind: str) -> bool:
    """Merge some files of about one size into one, if there are enough; return whether it did."""
    folder = log_dir / kind
    with changing(log_dir):
        there = files(folder)
        # The newest events stay at the end: that is where the shipper looks for them.
        parts = _of_one_size(sorted(there, key=last_row) if kind == "events" else there)
        if not parts:
            return False
        name = _joint_name(kind, parts)
        scratch = folder / (name + SCRATCH)
        written(scratch, (table for part in parts for table in read_part(part)), KINDS[kind])
        plan = {"scratch": scratch.name, "name": name, "parts": [part.name for part in parts]}
        _decide(folder / PLAN, plan)
        _carry_out(folder, plan)
        (folder / PLAN).unlink()
    return True


def _of_one_size(there: Sequence[Path]) -> list[Path]:
    """Return the oldest TOGETHER files of a size that has so many, or none."""
    sizes = [part.stat().st_size for part in there]
    for low, high in itertools.pairwise((0, *SIZES)):
        alike = [part for part, size in zip(there, sizes, strict=True) if low <= size < high]
        if len(alike) >= TOGETHER:
            return alike[:TOGETHER]
    return []


def _joint_name(kind: str, parts: Sequence[Path]) -> str:
    first = min(part.stem.split("-")[1] for part in parts)
    if kind == "answers":
        return f"answers-{first}-{secrets.token_hex(6)}.parquet"
    return f"events-{first}-{last_row(parts[-1]):016d}.parquet"


def last_row(part: Path) -> int:
    """Return the number of the last event that a file's name promises.

    >>> last_row(Path("events-0000000000000007-0000000000000011.parquet"))
    11
    """
    return int(part.stem.split("-")[2])


def _decide(path: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan of a merge: from here on the merged file counts, and its parts do not."""
    scratch = path.with_name(path.name + SCRATCH)
    scratch.write_text(json.dumps(plan))
    synced(scratch)
    scratch.replace(path)
    synced(path.parent)


def _carry_out(folder: Path, plan: Mapping[str, Any]) -> None:
    scratch = folder / plan["scratch"]
    if scratch.exists():
        scratch.replace(folder / plan["name"])
    for part in plan["parts"]:
        if part != plan["name"]:
            (folder / part).unlink(missing_ok=True)
    synced(folder)


def without(log_dir: Path, kind: str, wrong: Wrong) -> int:
    """Rewrite each file that has rows which are `wrong`, without them; return how many went.

    `wrong` is asked about the columns user_id and the kind's moment. The caller holds `changing`.
    """
    dropped = 0
    for path in files(log_dir / kind):
        found = sum(_count(wrong(table)) for table in read_part(path, ["user_id", MOMENTS[kind]]))
        if found:
            kept = (table.filter(pc.invert(wrong(table))) for table in read_part(path))
            write_part(path, kept, KINDS[kind])
            dropped += found
    return dropped


def _count(marks: pa.Array) -> int:
    return int(pc.sum(marks).as_py() or 0)


def of_user(user_id: str) -> Wrong:
    """Mark every row of one user."""
    return lambda table: pc.fill_null(pc.equal(table["user_id"], user_id), False)


def of_erased(kind: str, erased: Mapping[bytes, int]) -> Wrong:
    """Mark the rows that an erasure covers; `erased` as `UserState.erased` tells it."""

    def wrong(table: pa.Table) -> pa.Array:
        users, times = table["user_id"], table[MOMENTS[kind]].cast(pa.int64())
        marks = pa.chunked_array([pa.repeat(False, len(table))])
        for user in pc.unique(users).to_pylist():
            if end := end_of(kind, user, erased):
                of_them = pc.fill_null(pc.equal(users, user), False)
                marks = pc.or_(marks, pc.and_(of_them, pc.less(times, end)))
        return marks

    return wrong


def end_of(kind: str, user_id: str | None, erased: Mapping[bytes, int]) -> int:
    """Return before which moment a user's rows are to go; 0 for a user who was never erased.

    An event of the erasure's own millisecond came after it, as the user state tells them apart;
    an answer of that millisecond may have been given before.

    >>> end_of("events", "u1", {user_hash("u1"): 5}), end_of("answers", "u1", {user_hash("u1"): 5})
    (5, 6)
    """
    if user_id is None or not erased:
        return 0
    moment = erased.get(user_hash(user_id))
    return 0 if moment is None else moment + (kind == "answers")


def erase(log_dir: Path, user_id: str) -> int:
    """Take every row of a user out of the log's files; return how many there were.

    Seconds for a large log: not for the event loop. Answers that are still in a journal follow
    when it is turned into Parquet, by the tombstone that the user state keeps.
    """
    with changing(log_dir):
        return sum(without(log_dir, kind, of_user(user_id)) for kind in KINDS)
