"""The log of a server: every answer given and every event accepted, as Parquet files.

A worker appends its answers to a journal, a plain file; the shipper, one for a folder, turns closed
journals into Parquet and moves accepted events there from the user state's outbox. What a reader
sees under `events` and `answers` is whole files only; `recsys prepare data=served` reads them.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pyarrow as pa
import structlog

from recsys.serving import parts
from recsys.serving.parts import ANSWERS, EVENTS, end_of, erase
from recsys.serving.state import LoggedEvent, Token, UserState

__all__ = ["AnswerJournal", "LoggedAnswer", "Shipper", "Sink", "erase"]

log = structlog.get_logger("recsys.serving.log")
MAGIC = b"recsysJ1"
"""How a journal of this version begins."""
FRAME = struct.Struct("<II")
"""Before each record: its length and its CRC-32."""
FLUSH_SECONDS = 0.05
FLUSH_BYTES = 64 << 10
RETRY_SECONDS = 1.0
"""How long a journal that could not be written is left alone."""
TAKEOVER_SECONDS = 5.0
"""How often a shipper looks whether the one that works is gone."""
LAST_SECONDS = 2.0
"""How long one that ends waits for another that works, and may be about to end as well."""
SLICE = 64
PAUSE = 0.001
"""After so many records a short sleep, so that the answering threads need not wait for this one."""


class LoggedAnswer(msgspec.Struct, frozen=True, array_like=True):
    """One answer as it was given: items in their order, best first, and who chose them.

    From `propensities` on, what it takes to learn from the answer and to score its items again:
    how probable each item was at its place (None: nothing was left to chance) and the share of
    places explored; the moment asked for, in milliseconds; what the request brought, as JSON (of
    its own history the newest events); the number of events that were read, and their checksum.
    """

    answer_id: str
    user_id: str | None
    time: int
    bundle: str
    arm: str
    source: str
    k: int
    items: list[str]
    scores: list[float]
    fallback: str | None = None
    propensities: list[float] | None = None
    explore: float | None = None
    now: int | None = None
    context: str | None = None
    weights: str | None = None
    boosts: str | None = None
    history: str | None = None
    history_used: int | None = None
    path: int | None = None


class Sink(Protocol):
    """Where records go beside the Parquet files."""

    def send(self, kind: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Deliver records of `events` or `answers`; return once they are safe, or raise."""
        ...


class AnswerJournal:
    """One worker's answers, in a file that outlives the process, a few hundredths behind it.

    log_dir: the log's folder. A journal is closed, and so becomes Parquet, after `rotate_seconds`
    or `rotate_mib`. sync: wait for the disk at each write, so that the machine may fail too.
    memory_mib: what waits while the disk is full; past it answers are dropped and counted.
    recorded, dropped: counts of answers. `record` is for one thread; it never raises.
    """

    def __init__(
        self,
        log_dir: Path,
        *,
        rotate_seconds: float = 60,
        rotate_mib: float = 64,
        sync: bool = False,
        memory_mib: float = 16,
    ) -> None:
        self.folder = Path(log_dir) / "journal"
        self.rotate_seconds, self.rotate_bytes = rotate_seconds, int(rotate_mib * (1 << 20))
        self.sync, self.bound = sync, int(memory_mib * (1 << 20))
        self.recorded = self.dropped = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self._waiting: deque[bytes] = deque()
        # Bytes ever taken, framed and written: a counter that two threads wrote would lose some.
        self._taken = self._framed = self._given = 0
        self._unwritten = bytearray()
        self._file: _JournalFile | None = None
        self._complaint = Complaint("answers_not_logged")
        self._retry_at = 0.0
        self._wake, self._stop = threading.Event(), threading.Event()
        self._flushing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def record(self, answer: LoggedAnswer) -> None:
        """Take one answer; it is in the file within 50 ms."""
        waiting = self._taken - self._given
        try:
            body = self._encode(answer)
        except (UnicodeError, ValueError, OverflowError):  # text that is no UTF-8
            self.dropped += 1
            return
        if waiting > self.bound:
            self.dropped += 1
            return
        self._waiting.append(body)
        self._taken += len(body)
        self.recorded += 1
        if self._taken - self._framed > FLUSH_BYTES and not self._wake.is_set():
            self._wake.set()

    def flush(self) -> None:
        """Write what waits; a full disk is not an error here, it is tried again."""
        with self._flushing:
            self._frame()
            if self._unwritten and time.monotonic() >= self._retry_at:
                self._write()
            if self._file and self._file.is_due(self.rotate_seconds, self.rotate_bytes):
                self._close_file()
            if not self._unwritten:
                self._given = self._framed

    def close(self) -> None:
        """Write what waits and close the journal; answers that come later count as dropped."""
        self.bound = -1
        self._stop.set()
        self._wake.set()
        self._thread.join()
        self._retry_at = 0.0
        self.flush()
        with self._flushing:
            self._close_file()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            try:
                self.flush()
            except Exception as error:  # this thread must not end
                self._complaint(error, dropped=self.dropped)

    def _frame(self) -> None:
        while self._waiting:
            body = self._waiting.popleft()
            self._unwritten += FRAME.pack(len(body), zlib.crc32(body))
            self._unwritten += body
            self._framed += len(body)

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = _JournalFile(self.folder)
            self._file.append(self._unwritten, self.sync)
            self._unwritten = bytearray()
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._complaint(error, dropped=self.dropped)

    def _close_file(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


class _JournalFile:
    """One open journal; its lock says that its process lives and has not closed it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.handle = -1
        while self.handle < 0:
            self.path = folder / f"answers-{time.time_ns():019d}-{os.getpid()}.journal"
            self.handle = _opened(self.path)
        self.size, self.born = 0, time.monotonic()

    def append(self, frames: bytearray, sync: bool) -> None:
        """Write frames, all or none: a half-written one would hide those after it."""
        data = memoryview(bytes(frames) if self.size else MAGIC + frames)
        try:
            done = 0
            while done < len(data):
                done += os.write(self.handle, data[done:])
            if sync:
                os.fsync(self.handle)
        except OSError:
            os.ftruncate(self.handle, self.size)
            raise
        self.size += done

    def is_due(self, seconds: float, size: int) -> bool:
        return self.size > 0 and (time.monotonic() - self.born >= seconds or self.size >= size)

    def close(self) -> None:
        os.close(self.handle)


def _opened(path: Path) -> int:
    """Create and lock a file; return -1 where the shipper took it for an abandoned one."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
    if parts.taken(handle) and path.exists():
        return handle
    os.close(handle)
    return -1


class Complaint:
    """Says what is wrong at most once a minute, with how often it was since."""

    def __init__(self, event: str) -> None:
        self.event, self.times, self.last = event, 0, -60.0

    def __call__(self, error: Exception, **facts: Any) -> None:
        """Log an error, unless one was logged within the last minute."""
        self.times += 1
        if time.monotonic() - self.last >= 60:
            log.error(self.event, error=str(error), times=self.times, **facts)
            self.times, self.last = 0, time.monotonic()


class Shipper:
    """Turns journals and the outbox into Parquet files, and merges small ones: a thread.

    Any number may run on one log; only one works, and another takes over when it is gone. A sink
    gets every record first: while it refuses, events stay in the outbox and answers in journals.
    shipped, converted: events and answers now in Parquet. torn: journals with a damaged end.
    failures: steps that failed and are tried again after `rotate_seconds`.
    """

    def __init__(
        self,
        log_dir: Path,
        state: UserState | None = None,
        *,
        rotate_seconds: float = 60,
        rotate_rows: int = 50_000,
        sink: Sink | None = None,
    ) -> None:
        self.log_dir, self.state, self.sink = Path(log_dir), state, sink
        self.rotate_seconds, self.rotate_rows = rotate_seconds, rotate_rows
        self.shipped = self.converted = self.torn = self.failures = 0
        self._complaint = Complaint("log_behind")
        # A predecessor may have died between writing a file and saying so to the outbox.
        self._unsure = True
        self._sent: set[tuple[str, str]] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to work in the background."""
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 30) -> None:
        """Bring out what is there, and end; the state may be closed after that."""
        self._stop.set()
        if self._thread:
            self._thread.join(seconds)

    def round(self) -> bool:
        """Do every step once; return whether all went well. For whoever holds the lock."""
        # A journal left beside its finished file is settled before that file can be merged away.
        ready = self._try(self.convert)
        steps = [self.ship, self.forget, *([self.merge] if ready else [])]
        return all([ready, *(self._try(step) for step in steps)])

    def convert(self) -> int:
        """Turn closed journals, also those of dead processes, into Parquet; return the answers."""
        before = self.converted
        for path in sorted((self.log_dir / "journal").glob("*.journal")):
            handle = os.open(path, os.O_RDWR)
            try:
                if parts.taken(handle):
                    self._convert(path)
            finally:
                os.close(handle)
        return self.converted - before

    def ship(self) -> int:
        """Move the outbox into Parquet files of at most `rotate_rows` events; return how many."""
        before, full = self.shipped, self.state is not None
        while full and self.state:
            token, events = self.state.outbox(self.rotate_rows)
            if not events:
                break
            self._send_events(events)
            with parts.changing(self.log_dir):
                self._ship(token, events)
            full = len(events) >= self.rotate_rows
        return self.shipped - before

    def forget(self) -> int:
        """Take out rows of users erased since the last round, elsewhere or before a crash."""
        path, erased = self.log_dir / "erased.json", self._erased()
        done = _json(path)
        new = {user: moment for user, moment in erased.items() if done.get(user.hex()) != moment}
        if not new:
            return 0
        with parts.changing(self.log_dir):
            rows = sum(
                parts.without(self.log_dir, kind, parts.of_erased(kind, new))
                for kind in parts.KINDS
            )
            scratch = path.with_name(path.name + parts.SCRATCH)
            scratch.write_text(json.dumps({user.hex(): erased[user] for user in erased}))
            scratch.replace(path)
        return rows

    def merge(self) -> None:
        """Merge files while there are many of about one size."""
        for kind in parts.KINDS:
            while not self._stop.is_set() and parts.merged(self.log_dir, kind):
                pass

    def _run(self) -> None:
        while not self._stop.is_set():
            self._try(self._lead)
            self._stop.wait(min(self.rotate_seconds, TAKEOVER_SECONDS))
        # Another that ends now may have looked for journals before this worker's was closed.
        until = time.monotonic() + LAST_SECONDS
        while not self._try(self._lead) and time.monotonic() < until:
            time.sleep(LAST_SECONDS / 20)

    def _lead(self) -> bool:
        """Work round after round until told to end; return False at once where another does."""
        with parts.locked(self.log_dir / "shipper.lock", wait=False) as leads:
            while leads:
                self.round()
                if self._stop.wait(self.rotate_seconds):
                    break
        return leads

    def _try(self, step: Callable[[], object]) -> bool:
        """Return whether a step neither failed nor answered False."""
        try:
            return step() is not False
        except Exception as error:  # a full disk, a state or a broker that is away: try again
            self.failures += 1
            self._complaint(error, step=step.__name__)
            return False

    def _erased(self) -> dict[bytes, int]:
        return dict(self.state.erased()) if self.state else {}

    def _convert(self, path: Path) -> None:
        """Turn one journal, which is locked, into the Parquet file that its name decides."""
        part = self.log_dir / "answers" / f"{path.stem}.parquet"
        if not part.exists():
            journal = JournalReader(path)
            if not journal.readable:
                log.error("journal_unreadable", name=path.name)
                path.rename(path.with_suffix(".unreadable"))
                return
            if self.sink:
                self.sink.send("answers", self._answers(journal))
            self._write_answers(journal, part)
        path.unlink()

    def _answers(self, journal: JournalReader) -> Iterator[dict[str, Any]]:
        erased = self._erased()
        for rows in journal.slices():
            for row in _kept_answers(rows, erased):
                yield dict(zip(ANSWERS.names, row, strict=True))

    def _write_answers(self, journal: JournalReader, part: Path) -> None:
        with parts.changing(self.log_dir):
            erased = self._erased()  # again: while the sink was busy there may have been more
            kept = (_kept_answers(rows, erased) for rows in journal.slices())
            tables = (_table(rows, ANSWERS) for rows in kept if rows)
            self.converted += parts.write_part(part, tables, ANSWERS)
        self.torn += journal.torn

    def _send_events(self, events: Sequence[LoggedEvent]) -> None:
        """Give the sink what it has not had; after a failure here it may get some again."""
        new = [event for event in events if _key(event) not in self._sent]
        if self.sink and new:
            self.sink.send("events", [msgspec.structs.asdict(event) for event in new])
            self._sent |= {_key(event) for event in new}

    def _ship(self, token: Token, events: Sequence[LoggedEvent]) -> None:
        assert self.state is not None
        folder = self.log_dir / "events"
        known = _last_written(folder, self.rotate_rows) if self._unsure else set()
        self._unsure = True
        erased = self._erased()
        new = [
            event
            for event in events
            if _key(event) not in known
            and event.timestamp >= end_of("events", event.user_id, erased)
        ]
        if new:
            parts.write_part(folder / _name(folder, len(new)), _event_tables(new), EVENTS)
        self.state.shipped(token)
        self._unsure, self._sent = False, set()
        self.shipped += len(new)


def _json(path: Path) -> dict[str, int]:
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):  # half a file: all is looked at once more
        return {}


def _key(event: LoggedEvent) -> tuple[str, str]:
    return event.user_id, event.event_id


def _name(folder: Path, rows: int) -> str:
    """Return the name of the next file of events: the numbers of its first and last row.

    Numbers grow without end and begin at the microsecond, so that no name comes twice, also where
    older files were moved away.
    """
    last = max(map(parts.last_row, parts.files(folder)), default=0)
    first = max(last + 1, time.time_ns() // 1_000)
    return f"events-{first:016d}-{first + rows - 1:016d}.parquet"


def _last_written(folder: Path, rows: int) -> set[tuple[str, str]]:
    """Return user and event ids of the newest `rows` events or so, which one file ends with."""
    import pyarrow.parquet as pq

    if not (there := parts.files(folder)):
        return set()
    keys: set[tuple[str, str]] = set()
    with pq.ParquetFile(max(there, key=parts.last_row)) as file:
        for group in reversed(range(file.num_row_groups)):
            table = file.read_row_group(group, columns=["user_id", "event_id"])
            keys |= set(zip(*(table[c].to_pylist() for c in ("user_id", "event_id")), strict=True))
            if len(keys) >= rows:
                break
    return keys


def _kept_answers(
    rows: Sequence[Sequence[Any]], erased: Mapping[bytes, int]
) -> Sequence[Sequence[Any]]:
    if not erased:
        return rows
    user, moment = ANSWERS.names.index("user_id"), ANSWERS.names.index("time")
    return [row for row in rows if row[moment] >= end_of("answers", row[user], erased)]


def _event_tables(events: Sequence[LoggedEvent]) -> Iterator[pa.Table]:
    for start in range(0, len(events), SLICE):
        some = events[start : start + SLICE]
        yield _table([[getattr(event, name) for name in EVENTS.names] for event in some], EVENTS)
        time.sleep(PAUSE)


def _table(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _whole(row: list[Any]) -> list[Any]:
    """Return a record of an older version with nothing in the columns that came since."""
    return row + [None] * (len(ANSWERS) - len(row))


class JournalReader:
    """Reads a journal's whole records; `torn` says that something after them was not whole."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.readable = self.data[: len(MAGIC)] == MAGIC[: len(self.data)]
        self.torn = False

    def slices(self) -> Iterator[list[list[Any]]]:
        """Yield records in `LoggedAnswer`'s order, SLICE at a time."""
        rows, place = [], len(MAGIC)
        decode = msgspec.msgpack.Decoder(list).decode
        while body := self._body(place):
            rows.append(_whole(decode(body)))
            place += FRAME.size + len(body)
            if len(rows) == SLICE:
                yield rows
                rows = []
                time.sleep(PAUSE)
        self.torn = place < len(self.data)
        if rows:
            yield rows

    def _body(self, place: int) -> bytes:
        """Return the record whose frame begins at `place`, or nothing where it is not whole."""
        start = place + FRAME.size
        if start > len(self.data):
            return b""
        length, checksum = FRAME.unpack_from(self.data, place)
        body = self.data[start : start + length]
        return body if len(body) == length and zlib.crc32(body) == checksum else b""
