"""Break a server under load, and count what was lost: nothing may be.

    python scripts/fault_serving.py --bundles A B                  # all of it, some ten minutes
    python scripts/fault_serving.py --bundles A B --only swaps     # or a part

A and B hold the same items with different vectors. While 200 answers and 200
events a second go to a real `recsys serve`, bundles are swapped, damaged ones offered, workers and
whole servers killed with SIGKILL. At the end every acknowledged event must be there once, in its
user's path and in the Parquet log, and every answer must be one bundle's own. One JSON line; exit
code 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import uvloop
from rich.console import Console

from bench.load import Pool, Reply, Target
from recsys.index.bundle import Bundle

PORT = 8123
USERS = 400
PATIENCE = 30
"""Seconds within which a restarted server must answer, before the script gives up."""
console = Console()
Json = dict[str, Any]


@dataclass
class Seen:
    """What came back: outcomes by kind, acknowledged events, wrong answers, gaps in service."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    acknowledged: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    mixed: list[str] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    last_ok: float = field(default_factory=time.monotonic)
    longest_gap: float = 0.0

    def ok(self) -> None:
        now = time.monotonic()
        self.longest_gap = max(self.longest_gap, now - self.last_ok)
        self.last_ok = now

    def errors(self) -> Json:
        return {f"{kind}: {how}": n for (kind, how), n in self.outcomes.items() if how != "ok"}

    def fives(self) -> int:
        return sum(n for (_, how), n in self.outcomes.items() if how.startswith("5"))


class Server:
    """One `recsys serve` on a fixed port and state, started again after a kill."""

    def __init__(self, home: Path, *flags: str, port: int = PORT) -> None:
        self.home, self.flags, self.port = home, flags, port
        self.log = (home / f"server-{port}.log").open("ab")
        self.process: subprocess.Popen[bytes] | None = None
        self.target = Target.of(f"http://127.0.0.1:{port}")

    def start(self) -> None:
        command = [sys.executable, "-m", "recsys.cli", "serve", "--port", str(self.port)]
        command += ["--rotate-seconds", "5", *self.flags]
        environment = {**os.environ, "RECSYS_HOME": str(self.home)}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)

    def workers(self) -> list[psutil.Process]:
        assert self.process
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    async def call(self, method: str, path: str, body: Json | None = None) -> Reply:
        """Ask once on a connection of its own."""
        connection = await self.target.connect()
        try:
            data = json.dumps(body).encode() if body is not None else b""
            return await connection.ask(self.target.request(method, path, data))
        finally:
            connection.close()

    async def ready(self) -> float:
        """Return the seconds until it answers."""
        started = time.monotonic()
        while time.monotonic() < started + PATIENCE:
            try:
                if (await self.call("GET", "/readyz")).status == 200:
                    return time.monotonic() - started
            except OSError:
                pass
            await asyncio.sleep(0.01)
        raise SystemExit(f"no server after {PATIENCE} s; its log is {self.log.name}")


@asynccontextmanager
async def load(
    server: Server, seen: Seen, expected: dict[str, list[list[str]]], rate: float = 200
) -> AsyncIterator[None]:
    """Ask and post in the background, `rate` of each a second."""
    pool = Pool(server.target, 256)
    running = [
        asyncio.create_task(every(rate, lambda n: ask(pool, server, seen, expected, n))),
        asyncio.create_task(every(rate, lambda n: post(pool, server, seen, n))),
    ]
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.sleep(0.5)
        pool.close()


async def every(rate: float, act: Callable[[int], Any]) -> None:
    """Start `act` at random moments, `rate` a second on average, without waiting for its end."""
    draw, tasks, at, number = random.Random(0), set(), time.monotonic(), 0
    while True:
        at += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        task = asyncio.create_task(act(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1


async def ask(pool: Pool, server: Server, seen: Seen, expected: dict[str, Any], n: int) -> None:
    """Ask for one of the known histories; the answer must be the one of the bundle it names."""
    histories = expected["histories"]
    place = n % len(histories)
    body = json.dumps({"history": histories[place], "k": 10}).encode()
    reply = await asked(pool, server, seen, "recommend", "/v1/recommend", body)
    if reply is None or reply.outcome != "ok":
        return
    answer = json.loads(reply.body)
    seen.versions[answer["bundle"]] += 1
    if [item["item_id"] for item in answer["items"]] != expected[answer["bundle"]][place]:
        seen.mixed.append(answer["bundle"])


async def post(pool: Pool, server: Server, seen: Seen, n: int) -> None:
    """Post one event, again with the same id where no answer came: as a client would."""
    event_id = f"{os.getpid()}-{id(seen)}-{n}"
    user = f"user-{n % USERS}"
    event = {"event_id": event_id, "user_id": user, "item_id": f"item-{n}"}
    for _ in range(40):
        body = json.dumps(event).encode()
        reply = await asked(pool, server, seen, "events", "/v1/events", body)
        if reply is not None and reply.status == 200:
            seen.acknowledged[user].add(event_id)
            return
        await asyncio.sleep(0.25)


async def asked(
    pool: Pool, server: Server, seen: Seen, kind: str, path: str, body: bytes
) -> Reply | None:
    try:
        async with asyncio.timeout(10):
            reply = await pool.ask(server.target.request("POST", path, body))
    except (OSError, TimeoutError) as error:
        seen.outcomes[kind, type(error).__name__] += 1
        return None
    how = "ok" if reply.status == 200 else str(reply.status)
    seen.outcomes[kind, how] += 1
    if how == "ok":
        seen.ok()
    return reply


async def swaps(server: Server, bundles: list[Path], seen: Seen, count: int) -> Json:
    """Swap bundles `count` times, and offer a damaged one every tenth."""
    refused = 0
    for turn in range(count):
        if turn % 10 == 5:
            with damaged(bundles[0], server.home) as bad:
                reply = await server.call("POST", "/admin/bundles", {"bundle": str(bad)})
            refused += reply.status == 422
        body = {"bundle": str(bundles[(turn + 1) % len(bundles)])}
        reply = await server.call("POST", "/admin/bundles", body)
        assert reply.status == 200, reply.body
        await asyncio.sleep(0.1)
    return {"swaps": count, "damaged_offered": (count + 4) // 10, "damaged_refused": refused}


class damaged:
    """A copy of a bundle with one byte flipped."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.path = bundle, folder / "damaged"

    def __enter__(self) -> Path:
        shutil.copytree(self.bundle, self.path)
        file = self.path / "item_vectors.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path)


async def kill_workers(server: Server, count: int) -> Json:
    """Kill one worker after another; wait each time until there are as many as before."""
    wanted, back = len(server.workers()), []
    draw = random.Random(1)
    for _ in range(count):
        await asyncio.sleep(draw.uniform(0.3, 0.8))
        victim = draw.choice(server.workers())
        started = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.005)
        await server.ready()
        back.append(time.monotonic() - started)
        while len(server.workers()) < wanted:
            await asyncio.sleep(0.02)
        await asyncio.sleep(1.5)
    return {"workers_killed": count, "longest_until_answering_s": round(max(back), 3)}


async def kill_servers(server: Server, count: int) -> Json:
    """Kill the whole server, workers first seen and the parent, and start it again."""
    back = []
    for _ in range(count):
        await asyncio.sleep(2)
        started = time.monotonic()
        server.kill()
        server.start()
        await server.ready()
        back.append(time.monotonic() - started)
    return {"servers_killed": count, "longest_until_ready_s": round(max(back), 3)}


async def drain(server: Server, histories: list[list[str]], count: int = 200) -> Json:
    """Send SIGTERM while `count` requests are on their way, and count the answers."""
    connections = await asyncio.gather(*(server.target.connect() for _ in range(count)))
    body = [json.dumps({"history": histories[n % len(histories)]}).encode() for n in range(count)]
    requests = [server.target.request("POST", "/v1/recommend", b) for b in body]
    replies = [asyncio.ensure_future(c.ask(r)) for c, r in zip(connections, requests, strict=True)]
    await asyncio.sleep(0)
    assert server.process
    server.process.terminate()
    found = await asyncio.gather(*replies, return_exceptions=True)
    answered = sum(isinstance(one, Reply) and one.status == 200 for one in found)
    code = await asyncio.to_thread(server.process.wait, 60)
    return {"in_flight_at_sigterm": count, "answered": answered, "exit_code": code}


async def memory(server: Server, bundles: list[Path], count: int) -> Json:
    """Swap `count` times at rest and compare the workers' memory with that after ten."""
    sizes = []
    for turn in range(count):
        body = {"bundle": str(bundles[(turn + 1) % len(bundles)])}
        assert (await server.call("POST", "/admin/bundles", body)).status == 200
        if turn + 1 in (10, count):
            await asyncio.sleep(3)
            sizes.append(sum(worker.memory_info().rss for worker in server.workers()) / 2**20)
    after_10, after_all = sizes
    grown = round(after_all / after_10 - 1, 4)
    return {"swaps": count, "mib_after_10": round(after_10), "growth": grown}


async def audit(server: Server, seen: Seen) -> Json:
    """Compare what was acknowledged with what is kept, in the paths and in the log."""
    kept: Counter[str] = Counter()
    for user in list(seen.acknowledged):
        reply = await server.call("GET", f"/v1/users/{user}")
        kept.update(event["event_id"] for event in json.loads(reply.body)["events"])
    await asyncio.sleep(8)  # until the log has what was accepted last
    logged: Counter[str] = Counter()
    for file in (server.home / "serving" / "log" / "events").glob("*.parquet"):
        logged.update(pq.read_table(file, columns=["event_id"])["event_id"].to_pylist())
    wanted = set().union(*seen.acknowledged.values())
    return {
        "acknowledged": len(wanted),
        "lost_from_paths": len(wanted - set(kept)),
        "twice_in_paths": sum(n > 1 for n in kept.values()),
        "lost_from_log": len(wanted - set(logged)),
        "twice_in_log": sum(n > 1 for n in logged.values()),
    }


def copied(bundle: Path, folder: Path) -> Path:
    """Return a copy of a bundle elsewhere: one that is loaded anew when its turn comes."""
    return Path(shutil.copytree(bundle, folder / bundle.name))


def expectations(bundles: list[Path], count: int = 50) -> dict[str, Any]:
    """Return histories, and each bundle's own answers to them."""
    from recsys.serving.engine import Engine
    from recsys.serving.messages import RecommendRequest

    draw = random.Random(0)
    ids = [str(i) for i in Bundle.open(bundles[0]).item_ids[1:]]
    found: dict[str, Any] = {"histories": [draw.sample(ids, 5) for _ in range(count)]}
    for path in bundles:
        engine = Engine.load(path)
        answers = [engine.recommend([RecommendRequest(history=h)])[0] for h in found["histories"]]
        found[engine.version] = [[item.item_id for item in answer.items] for answer in answers]
    return found


async def all_of_it(given: argparse.Namespace, home: Path) -> Json:
    given_bundles = [Path(path).resolve() for path in given.bundles]
    expected = expectations(given_bundles)
    bundles = [*given_bundles, *(copied(path, home / "copies") for path in given_bundles)]
    # Room for all that are in flight at once: this is about faults, not about overload.
    flags = ("--workers", str(given.workers), "--queue", "200", "--queue-ms", "60000")
    server = Server(home, "--bundle", str(bundles[0]), *flags)
    server.start()
    report: Json = {"ready_s": round(await server.ready(), 2)}
    parts: dict[str, Callable[[Seen], Any]] = {
        "swaps": lambda seen: swaps(server, bundles, seen, given.swaps),
        "workers": lambda seen: kill_workers(server, given.worker_kills),
        "servers": lambda seen: kill_servers(server, given.server_kills),
    }
    for name, part in parts.items():
        if name not in given.only:
            continue
        seen = Seen()
        async with load(server, seen, expected):
            await asyncio.sleep(1)
            done = await part(seen)
            await asyncio.sleep(2)
        done |= {"five_hundreds": seen.fives(), "errors": seen.errors()}
        done |= {"answers": seen.outcomes["recommend", "ok"], "mixed_answers": len(seen.mixed)}
        done |= {"versions": dict(seen.versions), "longest_gap_s": round(seen.longest_gap, 3)}
        report[name] = done | await audit(server, seen)
        console.print(name, report[name])
    if "memory" in given.only:
        report["memory"] = await memory(server, bundles, given.memory_swaps)
        console.print("memory", report["memory"])
    if "drain" in given.only:
        report["drain"] = await drain(server, expected["histories"])
        console.print("drain", report["drain"])
    server.stop()
    return report


def lost(report: Json) -> bool:
    """Return whether anything was lost, doubled, mixed or refused that should not be."""
    losses = ("lost_from_paths", "twice_in_paths", "lost_from_log", "twice_in_log", "mixed_answers")
    parts = [part for part in report.values() if isinstance(part, dict)]
    bad = any(part.get(name, 0) for part in parts for name in losses)
    swapped = report.get("swaps", {})
    bad |= swapped.get("five_hundreds", 0) > 0
    bad |= swapped.get("damaged_offered", 0) != swapped.get("damaged_refused", 0)
    drained = report.get("drain", {})
    return bool(bad or drained.get("answered", 0) != drained.get("in_flight_at_sigterm", 0))


def main() -> int:
    parts = ["swaps", "workers", "servers", "memory", "drain"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--bundles", nargs=2, required=True, help="two bundles of one item table")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--worker-kills", type=int, default=20)
    parser.add_argument("--server-kills", type=int, default=5)
    parser.add_argument("--memory-swaps", type=int, default=1_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        report = uvloop.run(all_of_it(given, Path(home)))
    print(json.dumps(report))
    return int(lost(report))


if __name__ == "__main__":
    sys.exit(main())
