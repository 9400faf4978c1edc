"""Choose a store for user state by measurement: LMDB, SQLite, RocksDB and Redis doing the same.

    python scripts/bench_state.py --folder /var/lib/recsys

Each holds users with paths of 50 events. Measured are: reading a path, one post (read the path,
put an event in its place, write it and an outbox entry, wait for the disk where it says so), and
16 posts that waited together and share one transaction. SQLite and RocksDB are written out here
only as far as that needs. Prints a table and one JSON line. A disk of its own matters: give the
one that will be used, not a file system in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from recsys.serving.state import (
    Batch,
    Bounds,
    LoggedEvent,
    Outcome,
    Trail,
    UserPath,
    decode_path,
    open_state,
    user_hash,
)

LENGTH, TOGETHER = 50, 16
"""Events a path, and posts that wait together."""
START = 1_700_000_000_000


class Store(Protocol):
    """What is measured of a store."""

    def append(self, events: Sequence[LoggedEvent]) -> list[Outcome]: ...

    def path(self, user_id: str) -> UserPath: ...

    def close(self) -> None: ...


class SQLite:
    """One table of records, one of the outbox, write-ahead log."""

    def __init__(self, folder: Path, synchronous: str) -> None:
        folder.mkdir()
        self.base = sqlite3.connect(folder / "state.db", isolation_level=None)
        for setting in ("journal_mode=wal", f"synchronous={synchronous}", "mmap_size=1073741824"):
            self.base.execute(f"pragma {setting}")
        columns = "user blob primary key, path blob, details blob"
        self.base.execute(f"create table users ({columns}) without rowid")
        self.base.execute("create table outbox (number integer primary key, event blob)")

    def append(self, events: Sequence[LoggedEvent]) -> list[Outcome]:
        self.base.execute("begin immediate")
        batch = Batch(self._trail, LENGTH)
        outcomes = [batch.add(event) for event in events]
        self.base.executemany("insert or replace into users values (?, ?, ?)", batch.changed())
        entries = ((entry,) for entry in batch.accepted)
        self.base.executemany("insert into outbox (event) values (?)", entries)
        self.base.execute("commit")
        return outcomes

    def path(self, user_id: str) -> UserPath:
        query = self.base.execute("select path from users where user = ?", (user_hash(user_id),))
        found = query.fetchone()
        return Bounds(LENGTH, 0).shown(decode_path(found[0]) if found else None, 0)

    def close(self) -> None:
        self.base.close()

    def _trail(self, key: bytes) -> Trail:
        query = self.base.execute("select path, details from users where user = ?", (key,))
        return Trail.read(*(query.fetchone() or (None, None)), 0)


class RocksDB:
    """Records and outbox under prefixes of one key space; one process only."""

    def __init__(self, folder: Path, sync: bool) -> None:
        import rocksdict

        self.base = rocksdict.Rdict(str(folder), rocksdict.Options(raw_mode=True))
        self.batch, self.options = rocksdict.WriteBatch, rocksdict.WriteOptions()
        self.options.sync = sync
        self.number = 0

    def append(self, events: Sequence[LoggedEvent]) -> list[Outcome]:
        batch = Batch(self._trail, LENGTH)
        outcomes = [batch.add(event) for event in events]
        writes = self.batch(raw_mode=True)
        for key, path, details in batch.changed():
            writes.put(b"p" + key, path)
            writes.put(b"d" + key, details)
        for entry in batch.accepted:
            self.number += 1
            writes.put(b"o" + self.number.to_bytes(8, "big"), entry)
        self.base.write(writes, self.options)
        return outcomes

    def path(self, user_id: str) -> UserPath:
        found = self.base.get(b"p" + user_hash(user_id))
        return Bounds(LENGTH, 0).shown(decode_path(found) if found else None, 0)

    def close(self) -> None:
        self.base.close()

    def _trail(self, key: bytes) -> Trail:
        return Trail.read(self.base.get(b"p" + key), self.base.get(b"d" + key), 0)


@contextmanager
def redis_server(folder: Path, appendfsync: str) -> Iterator[Store]:
    folder.mkdir()
    command = ["redis-server", "--port", "0", "--unixsocket", str(folder / "s"), "--save", ""]
    command += ["--dir", str(folder), "--appendonly", "yes", "--appendfsync", appendfsync]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for(folder / "s")
        sync = appendfsync == "always"
        address = f"unix://{folder / 's'}?timeout_ms=10000"
        with closing(open_state(address, max_events=LENGTH, keep_ms=0, sync=sync)) as state:
            yield state
    finally:
        server.terminate()
        server.wait(30)


def wait_for(path: Path) -> None:
    for _ in range(1_000):
        with socket.socket(socket.AF_UNIX) as probe:
            if path.exists() and probe.connect_ex(str(path)) == 0:
                return
        time.sleep(0.01)
    raise SystemExit("redis-server did not start; start it by hand to see why")


def candidates(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return how to open each store; the first of a pair waits for the disk."""

    def embedded(sync: bool) -> Any:
        address = f"lmdb:{folder / f'lmdb-{sync}'}"
        return closing(open_state(address, max_events=LENGTH, keep_ms=0, sync=sync))

    found = {
        "LMDB sync": lambda: embedded(True),
        "LMDB no sync": lambda: embedded(False),
        "SQLite WAL FULL": lambda: closing(SQLite(folder / "full", "full")),
        "SQLite WAL NORMAL": lambda: closing(SQLite(folder / "normal", "normal")),
        "RocksDB sync": lambda: closing(RocksDB(folder / "rocks-sync", True)),
        "RocksDB no sync": lambda: closing(RocksDB(folder / "rocks", False)),
        "Redis AOF always": lambda: redis_server(folder / "always", "always"),
        "Redis AOF everysec": lambda: redis_server(folder / "everysec", "everysec"),
    }
    if not shutil.which("redis-server"):
        found = {name: opened for name, opened in found.items() if "Redis" not in name}
    return found


def event(user: int, number: int) -> LoggedEvent:
    """An event as shops post them: ids of usual length, each later than the last."""
    moment = START + number * 1_000
    name, item = f"{user:08x}-{number:027x}", f"item-{(user + number) % 99_991}"
    return LoggedEvent(name, f"user-{user}", item, "view", moment, moment, 1.5, name)


class Bench:
    """Measures one store; every event that it appends is new."""

    def __init__(self, store: Store, users: int) -> None:
        self.store, self.users, self.number = store, users, LENGTH
        for first in range(0, users, 100):
            block = range(first, min(first + 100, users))
            store.append([event(user, number) for user in block for number in range(LENGTH)])

    def read(self, turn: int) -> None:
        assert len(self.store.path(f"user-{turn * 7_919 % self.users}").items) == LENGTH

    def post(self, turn: int) -> None:
        self._append(turn, 1)

    def posts(self, turn: int) -> None:
        self._append(turn, TOGETHER)

    def post_and_read(self, turn: int) -> None:
        self._append(turn, 1)
        self.read(turn)

    def _append(self, turn: int, count: int) -> None:
        self.number += 1
        users = [(turn * 7_919 + place) % self.users for place in range(count)]
        outcomes = self.store.append([event(user, self.number) for user in users])
        assert outcomes == ["accepted"] * count


def timed(work: Callable[[int], None], seconds: float) -> dict[str, float]:
    """Repeat `work` for so many seconds; milliseconds at the median and the 99th percentile."""
    spent: list[float] = []
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        work(len(spent))
        spent.append((time.perf_counter() - began) * 1_000)
    middle, high = np.percentile(spent, [50, 99])
    return {"p50_ms": float(middle), "p99_ms": float(high), "per_second": 1_000 / np.mean(spent)}


def measure(store: Store, users: int, seconds: float) -> dict[str, float]:
    bench = Bench(store, users)
    read, one = timed(bench.read, seconds), timed(bench.post, seconds)
    both, many = timed(bench.post_and_read, seconds), timed(bench.posts, seconds)
    return {
        "read_p50_us": round(read["p50_ms"] * 1_000, 1),
        "read_p99_us": round(read["p99_ms"] * 1_000, 1),
        "post_p50_ms": round(one["p50_ms"], 3),
        "post_p99_ms": round(one["p99_ms"], 3),
        "both_p50_ms": round(both["p50_ms"], 3),
        "both_p99_ms": round(both["p99_ms"], 3),
        "events_per_second_1": round(one["per_second"]),
        f"events_per_second_{TOGETHER}": round(many["per_second"] * TOGETHER),
    }


def table(results: dict[str, dict[str, float]]) -> Table:
    shown = Table(title=f"Paths of {LENGTH} events")
    shown.add_column("store", no_wrap=True)
    for name in next(iter(results.values())):
        shown.add_column(name.replace("_", " "), justify="right")
    for store, figures in results.items():
        shown.add_row(store, *(f"{value:,}" for value in figures.values()))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--users", type=int, default=5_000)
    parser.add_argument("--seconds", type=float, default=3, help="for each measurement")
    parser.add_argument("--only", default="", help="stores whose names begin so")
    given = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for name, opened in candidates(Path(folder)).items():
            if name.startswith(given.only):
                with opened() as store:
                    results[name] = measure(store, given.users, given.seconds)
    Console(width=140).print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
