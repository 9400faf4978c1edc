"""User state in one LMDB directory, shared by several processes of one machine.

A read is one transaction on mapped memory, without a lock. An append is one write transaction;
writers wait for each other, and one that is killed in the middle leaves nothing behind.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import Any, ClassVar

import lmdb
import msgspec

from recsys.schema import InputError
from recsys.serving.item_log_lmdb import LmdbItemLog
from recsys.serving.state import (
    FORMAT,
    NOTHING,
    Batch,
    Bounds,
    LoggedEvent,
    Outcome,
    StateUnavailable,
    Stored,
    Token,
    Trail,
    UserPath,
    check_bounds,
    decode_event,
    decode_path,
    other_format,
    user_hash,
)

MAP_BYTES = 64 << 30
"""Room for the store: address space, not disk; the file grows as it fills."""
MAX_READERS = 1_024
SPARE_READS = 32
"""Read transactions that a process keeps for its threads to use again."""
CHECK_SECONDS = 60.0
"""How often the read slots of killed processes are given back."""
SWEEP = 512
"""Users whose records one transaction of `expire` rewrites: appends wait no longer than that."""
NAMES = (b"paths", b"details", b"outbox", b"erased", b"changes", b"numbers", b"meta")
COUNTER = b"next"
FAILURES = (lmdb.Error, msgspec.DecodeError)


@dataclass
class Opened:
    """An environment of this process: LMDB allows one a directory, so all handles share it."""

    env: lmdb.Environment
    dbs: dict[bytes, Any]
    handles: int = 0
    checked: float = 0.0

    # By process too: a forked child must open its own.
    known: ClassVar[dict[tuple[int, str], Opened]] = {}
    lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def at(cls, folder: Folder, sync: bool, map_bytes: int) -> Opened:
        """Return the environment of a directory, opened where it is not yet."""
        key = (os.getpid(), str(folder.resolve()))
        with cls.lock:
            if key not in cls.known:
                cls.known[key] = _open(folder, sync, map_bytes)
            opened = cls.known[key]
            if bool(opened.env.flags()["sync"]) != sync:
                raise InputError(f"{folder}: is open in this process with another `sync` already")
            opened.handles += 1
            return opened

    def leave(self) -> None:
        """Close the environment with its last handle."""
        with self.lock:
            self.handles -= 1
            if self.handles == 0:
                self.known.pop(next(key for key, value in self.known.items() if value is self))
                self.env.close()


class LmdbState:
    """Paths and outbox in the directory `folder`; see `UserState` for what each method does.

    sync: wait for the disk at each append. Without it an append survives this process, but where
    the machine fails, the newest events are lost and the store may be damaged. All processes that
    share a directory should agree. map_bytes: the most that the store may ever hold.
    """

    def __init__(
        self,
        folder: str | Folder,
        *,
        max_events: int = 200,
        keep_ms: int = 0,
        sync: bool = True,
        map_bytes: int = MAP_BYTES,
    ) -> None:
        check_bounds(max_events, keep_ms)
        self.bounds = Bounds(max_events, keep_ms)
        self.folder = Folder(folder)
        self._opened: Opened | None = Opened.at(self.folder, sync, map_bytes)
        self._env = self._opened.env
        dbs = self._opened.dbs
        self._paths, self._details, self._outbox, self._erased = map(dbs.get, NAMES[:4])
        changes, numbers, self._meta = map(dbs.get, NAMES[4:])
        self.items = LmdbItemLog(self._reading, self._writing, changes, numbers, self._meta)

    def append(self, events: Sequence[LoggedEvent]) -> list[Outcome]:
        """Take events in one transaction; they are durable, if `sync`, when this returns."""
        with self._writing() as txn:
            batch = Batch(lambda key: self._trail(txn, key), self.bounds.max_events)
            outcomes = [batch.add(event) for event in events]
            for key, path, details in batch.changed():
                txn.put(key, path, db=self._paths)
                txn.put(key, details, db=self._details)
            self._enqueue(txn, batch.accepted)
        self._check_readers()
        return outcomes

    def path(self, user_id: str) -> UserPath:
        """Return the newest events of a user that have not expired; a few microseconds."""
        key = user_hash(user_id)
        try:
            with self._env.begin() as txn:
                found = txn.get(key, db=self._paths)
                path = decode_path(found) if found else None
                erased = _number(txn.get(key, db=self._erased))
        except FAILURES as error:
            raise self._unavailable(error) from error
        return self.bounds.shown(path, erased)

    def kept(self, user_id: str) -> list[LoggedEvent]:
        """Return the same events in full."""
        with self._reading() as txn:
            return self._trail(txn, user_hash(user_id)).events(user_id, self.bounds)

    def erase(self, user_id: str, now: int) -> int:
        """Forget a user's events, here and in the outbox, and leave a tombstone."""
        key = user_hash(user_id)
        with self._writing() as txn:
            trail = self._trail(txn, key)
            gone = set(trail.ids) | self._unqueue(txn, user_id)
            txn.delete(key, db=self._paths)
            txn.delete(key, db=self._details)
            txn.put(key, _bytes(trail.erasure(now)), db=self._erased)
        return len(gone)

    def erased(self) -> Iterator[tuple[bytes, int]]:
        """Return the tombstones: user hash and moment."""
        with self._reading() as txn:
            return iter([(bytes(k), _number(v)) for k, v in txn.cursor(db=self._erased)])

    def expire(self, before: int) -> int:
        """Drop events older than `before`, in transactions that are short."""
        dropped = 0
        start: bytes | None = b""
        while start is not None:
            old, start = self._older(before, start)
            dropped += self._drop(old, before) if old else 0
        return dropped

    def outbox(self, limit: int) -> tuple[Token, list[LoggedEvent]]:
        """Return the oldest events that wait for the log; every process is handed the same."""
        numbers: list[int] = []
        events: list[LoggedEvent] = []
        with self._reading() as txn:
            for key, value in txn.cursor(db=self._outbox):
                if len(events) >= limit:
                    break
                numbers.append(_number(key))
                events.append(decode_event(value))
        return (Token(numbers[0], numbers[-1]) if numbers else NOTHING), events

    def shipped(self, token: Token) -> None:
        """Remove what was handed out with `token`."""
        with self._writing() as txn:
            cursor = txn.cursor(db=self._outbox)
            found = cursor.set_range(_bytes(token.first))
            while found and _number(cursor.key()) <= token.last:
                # Deleting steps to the next entry; False: that was the last.
                found = cursor.delete() and bool(cursor.key())

    def backlog(self) -> int:
        """Return how many events wait in the outbox."""
        with self._reading() as txn:
            return int(txn.stat(db=self._outbox)["entries"])

    def close(self) -> None:
        """Close the files with the last handle of this process; no call may be under way."""
        if self._opened:
            self._opened.leave()
            self._opened = None

    def _trail(self, txn: lmdb.Transaction, key: bytes) -> Trail:
        return Trail.read(
            txn.get(key, db=self._paths),
            txn.get(key, db=self._details),
            _number(txn.get(key, db=self._erased)),
        )

    def _enqueue(self, txn: lmdb.Transaction, entries: list[bytes]) -> None:
        if not entries:
            return
        # The counter outlives the entries: numbers rise though the outbox was emptied.
        first = _number(txn.get(COUNTER, db=self._meta)) or 1
        numbered = [(_bytes(first + place), entry) for place, entry in enumerate(entries)]
        txn.cursor(db=self._outbox).putmulti(numbered, append=True)
        txn.put(COUNTER, _bytes(first + len(entries)), db=self._meta)

    def _unqueue(self, txn: lmdb.Transaction, user_id: str) -> set[str]:
        """Remove a user's events from the outbox; return their ids."""
        cursor, gone = txn.cursor(db=self._outbox), set()
        found = cursor.first()
        while found:
            event = decode_event(cursor.value())
            if event.user_id == user_id:
                gone.add(event.event_id)
                found = cursor.delete() and bool(cursor.key())
            else:
                found = cursor.next()
        return gone

    def _older(self, before: int, start: bytes) -> tuple[list[bytes], bytes | None]:
        """Return users with events older than `before`, and where to go on (None: nowhere)."""
        old: list[bytes] = []
        with self._reading() as txn:
            cursor = txn.cursor(db=self._paths)
            found = cursor.set_range(start) if start else cursor.first()
            while found and len(old) < SWEEP:
                if decode_path(cursor.value()).times[0] < before:
                    old.append(bytes(cursor.key()))
                found = cursor.next()
            return old, bytes(cursor.key()) if found else None

    def _drop(self, keys: list[bytes], before: int) -> int:
        dropped = 0
        with self._writing() as txn:
            for key in keys:
                trail = self._trail(txn, key)
                dropped += trail.drop_before(before)
                for db, part in zip((self._paths, self._details), trail.packed(), strict=True):
                    txn.put(key, part, db=db) if trail.times else txn.delete(key, db=db)
        return dropped

    @contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction]:
        try:
            with self._env.begin() as txn:
                yield txn
        except FAILURES as error:
            raise self._unavailable(error) from error

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        try:
            with self._env.begin(write=True) as txn:
                yield txn
        except FAILURES as error:
            raise self._unavailable(error) from error

    def _check_readers(self) -> None:
        opened, now = self._opened, time.monotonic()
        if opened and now - opened.checked > CHECK_SECONDS:
            opened.checked = now
            opened.env.reader_check()

    def _unavailable(self, error: Exception) -> StateUnavailable:
        where = f"the user state in {self.folder}"
        if isinstance(error, lmdb.MapFullError):
            room = self._env.info()["map_size"] >> 20
            return StateUnavailable(f"{where} is full: its {room:,} MiB are in use")
        if isinstance(error, lmdb.PanicError):
            return StateUnavailable(f"{where} failed on its disk; restart the server: {error}")
        return StateUnavailable(f"{where} is not available: {error}")


def _open(folder: Folder, sync: bool, map_bytes: int) -> Opened:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        env = lmdb.open(
            str(folder),
            map_size=map_bytes,
            max_dbs=len(NAMES),
            max_readers=MAX_READERS,
            max_spare_txns=SPARE_READS,
            sync=sync,
        )
    except (lmdb.Error, OSError) as error:
        raise _refused(folder, error) from error
    try:
        return _checked(folder, env)
    except BaseException:
        env.close()
        raise


def _refused(folder: Folder, error: Exception) -> InputError:
    if isinstance(error, (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError)):
        return InputError(
            f"{folder}: data.mdb is damaged or no LMDB file ({error}); move the directory away to "
            "begin anew, or set `state` to another one"
        )
    return InputError(
        f"{folder}: cannot keep the user state here ({error}); expected a directory that this "
        "process may write: set `state=lmdb:DIR`"
    )


def _checked(folder: Folder, env: lmdb.Environment) -> Opened:
    """Return the environment with its tables, made where it is new, or raise InputError."""
    try:
        with env.begin(write=True) as txn:
            empty = txn.stat()["entries"] == 0
            if not empty and txn.get(NAMES[-1]) is None:
                raise InputError(f"{folder}: an LMDB store, but not of recsys; choose another one")
            dbs = {name: env.open_db(name, txn=txn) for name in NAMES}
            if empty:
                txn.put(b"format", FORMAT, db=dbs[b"meta"])
            met = txn.get(b"format", b"none", db=dbs[b"meta"])
            if met != FORMAT:
                raise other_format(str(folder), met)
        env.reader_check()
    except lmdb.Error as error:
        raise _refused(folder, error) from error
    return Opened(env, dbs)


def _bytes(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _number(value: Stored) -> int:
    return int.from_bytes(value, "big") if value else 0
