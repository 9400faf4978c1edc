"""Ask a server for five times what it can give, and see what becomes of those it takes.

    python scripts/overload_serving.py --bundle latest

Measures the capacity, the latency at 40 % of it, then --times the capacity for some seconds from
connections that never wait for each other, then the 40 % again. Wanted: accepted requests within 3
times the usual p99, refusals (429) within 20 ms, and the usual latency again after 2 s. The client
takes part of the machine, more than usual under the flood. One JSON line; exit code 1 where missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

import uvloop

from bench.load import Target, milliseconds, open_loop
from bench.ranked import ranked
from bench_serving import Json, Running, known, post_events, recsys, saturation, shots
from recsys.artifacts import Workspace

TICK = 0.002
CONNECTIONS = 600


class Flood(asyncio.Protocol):
    """One connection of the flood: sends when told, and notes the status and the time taken."""

    def __init__(self, spent: dict[int, list[float]], free: list[Flood]) -> None:
        self.spent, self.free, self.sent, self.left = spent, free, 0.0, 0
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.free.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self in self.free:  # a server ends those that it hears nothing from
            self.free.remove(self)

    def send(self, request: bytes) -> None:
        self.sent = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        self.spent[int(head[9:12])].append(time.perf_counter() - self.sent)
        self.received = b""
        self.free.append(self)


async def flood(target: Target, requests: list[bytes], rate: float, seconds: float) -> Json:
    """Send `rate` requests a second, each on a connection that is free, and count by status."""
    spent: dict[int, list[float]] = defaultdict(list)
    free: list[Flood] = []
    loop, stream = asyncio.get_running_loop(), cycle(requests)
    for _ in range(CONNECTIONS):
        await loop.create_connection(lambda: Flood(spent, free), target.host, target.port)
    started, sent, missed = time.perf_counter(), 0, 0
    while (now := time.perf_counter() - started) < seconds:
        due = int(now * rate) - sent
        possible = min(due, len(free))
        for _ in range(possible):
            free.pop().send(next(stream))
        missed += due - possible
        sent += due
        await asyncio.sleep(TICK)
    await asyncio.sleep(1)
    found = {str(status): {"count": len(s), **milliseconds(s)} for status, s in spent.items()}
    return {"sent_per_second": round((sent - missed) / seconds, 1), **found}


async def usual(server: Running, users: list[str], rate: float, seconds: float) -> Json:
    run = await open_loop(
        server.target, shots(server.target, users), rate=rate, seconds=seconds, warm=1
    )
    return {
        **milliseconds([s for spent in run.latencies.values() for s in spent]),
        **run.outcomes(),
    }


def measured(server: Running, users: list[str], given: argparse.Namespace) -> Json:
    capacity = float(saturation(server, users, given)["per_second"])
    before = uvloop.run(usual(server, users, 0.4 * capacity, given.seconds))
    requests = [next(stream).request for stream in [shots(server.target, users)] for _ in users]
    rate = given.times * capacity
    during = uvloop.run(flood(server.target, requests, rate, given.seconds))
    time.sleep(1)  # with the second that the flood waits for its last answers
    after = uvloop.run(usual(server, users, 0.4 * capacity, given.seconds))
    return {"capacity": capacity, "before": before, "during": during, "after": after}


def missed(found: Json) -> bool:
    accepted, refused = found["during"].get("200", {}), found["during"].get("429", {})
    usual_p99 = found["before"]["p99_ms"]
    late = accepted.get("p99_ms", 1e9) > 3 * usual_p99 or refused.get("p99_ms", 1e9) > 20
    return bool(late or found["after"]["p99_ms"] > 1.5 * usual_p99)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", default="latest", help="name in the workspace, or path")
    parser.add_argument("--workspace", help="where named bundles live (RECSYS_HOME, ./workspace)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--queue-ms", type=int, default=20, help="as of recsys serve")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--times", type=float, default=5)
    parser.add_argument("--connections", type=int, nargs="+", default=[16])
    given = parser.parse_args()
    bundle = Workspace(given.workspace).find("bundle", given.bundle).resolve()
    with tempfile.TemporaryDirectory(dir=bundle.parent, prefix=".overload-") as folder:
        two = ranked(bundle, Path(folder) / "ranked")
        home = Path(folder) / "state"
        home.mkdir()
        with recsys(two, home, given) as server:
            users, items = known(bundle, 2_000)
            post_events(server, users, items, 3)
            found = measured(server, users, given)
    print(json.dumps(found))
    return int(missed(found))


if __name__ == "__main__":
    sys.exit(main())
