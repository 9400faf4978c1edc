"""How large what a server keeps is: paths in LMDB and Redis, and the Parquet log.

    python scripts/bench_bytes.py

Made-up users with paths of 50 events, ids as long as shops have them: 32 random digits for an
event and an answer, 12 characters for a user, 11 for an item; answers of ten items. Bytes an event,
and of the log an answer, too. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import redis

from bench_state import LENGTH, START, redis_server
from recsys.serving.parts import ANSWERS, EVENTS, write_part
from recsys.serving.state import LoggedEvent, UserState, open_state

KINDS = ("view", "view", "view", "favourite", "cart", "purchase")
K = 10


def events_of(user: int, rng: np.random.Generator) -> list[LoggedEvent]:
    """A user's path: a few seconds to minutes between events, popular items more often."""
    times = START + np.cumsum(rng.integers(1_000, 300_000, LENGTH))
    items = rng.zipf(1.2, LENGTH) % 100_000_000
    return [
        LoggedEvent(
            rng.bytes(16).hex(),
            f"user-{user:07d}",
            f"it{item:09d}",
            KINDS[rng.integers(len(KINDS))],
            int(time),
            int(time) + 80,
        )
        for time, item in zip(times, items, strict=True)
    ]


def fill(state: UserState, users: int) -> None:
    """Post all paths, and let the log have taken them."""
    rng = np.random.default_rng(1)
    for user in range(users):
        state.append(events_of(user, rng))
        if user % 50 == 49 or user == users - 1:
            while (given := state.outbox(10_000))[1]:
                state.shipped(given[0])


def lmdb_bytes(folder: Path, users: int) -> float:
    with closing(open_state(f"lmdb:{folder}", max_events=LENGTH, keep_ms=0, sync=False)) as state:
        fill(state, users)
    used = sum(file.stat().st_blocks * 512 for file in folder.rglob("*.mdb"))
    return used / users / LENGTH


def redis_bytes(folder: Path, users: int) -> float:
    with redis_server(folder, "everysec") as state:
        client = redis.Redis(unix_socket_path=str(folder / "s"))
        empty = client.info("memory")["used_memory"]
        fill(state, users)  # type: ignore[arg-type]
        return (client.info("memory")["used_memory"] - empty) / users / LENGTH


def log_bytes(folder: Path, users: int) -> Iterator[tuple[str, float]]:
    rng = np.random.default_rng(1)
    events = [event for user in range(users) for event in events_of(user, rng)]
    events.sort(key=lambda event: event.received)
    columns = [[getattr(event, name) for event in events] for name in EVENTS.names]
    yield "events", _written(folder, columns, EVENTS) / len(events)
    rows = [_answer(event, rng) for event in events[:: len(events) // 20_000 or 1]]
    yield "answers", _written(folder, list(zip(*rows, strict=True)), ANSWERS) / len(rows)


def _answer(event: LoggedEvent, rng: np.random.Generator) -> list[object]:
    items = [f"it{item:09d}" for item in rng.zipf(1.2, K) % 100_000_000]
    scores = np.sort(rng.random(K).astype(np.float32))[::-1].tolist()
    row = [rng.bytes(16).hex(), event.user_id, event.received, "shop-1", "champion", "model", K]
    row += [items, scores, None, None, None, event.received, None, None, None, None]
    return [*row, LENGTH, int(rng.integers(2**32))]


def _written(folder: Path, columns: list[object], schema: pa.Schema) -> int:
    arrays = [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
    path = folder / "part.parquet"
    write_part(path, [pa.Table.from_arrays(arrays, schema=schema)], schema)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=4_000)
    users = parser.parse_args().users
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"LMDB, an event": lmdb_bytes(folder / "lmdb", users)}
        if shutil.which("redis-server"):
            found["Redis, an event"] = redis_bytes(folder / "redis", users)
        log = dict(log_bytes(folder, users))
    found |= {"log, an event": log["events"], "log, an answer": log["answers"]}
    print(json.dumps({name: round(size, 1) for name, size in found.items()}))


if __name__ == "__main__":
    main()
