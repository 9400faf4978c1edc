"""Measure a served bundle: start, memory, latency, throughput, filters, events; beside others.

    python scripts/bench_serving.py --bundle latest              # ours: with a ranker and without
    python scripts/bench_serving.py --bundle latest --beside     # and bare, FastAPI, LitServe

Everything that `recsys serve` does is on: paths, the log, limits, metrics. The client runs on the
same machine, and its work is part of the figures. It asks for known users in turn, each with some
posted events. Two stages: a stand-in ranker over 200 candidates (scripts/bench/ranked.py). At
saturation and over one connection wrk asks where it is installed (Debian's package wrk), since a
client in Python would take a third of two cores, and of a millisecond. Prints a table and one JSON
object; --only names some of the parts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import uvloop
from rich.console import Console
from rich.table import Table

from bench.load import Pool, Shot, Target, closed_loop, milliseconds, open_loop
from bench.ranked import ranked
from recsys.artifacts import Workspace

Json = dict[str, Any]
HERE = Path(__file__).parent
PARTS = ("sequential", "saturation", "open", "filters", "events")
LUA = """
local users = {}
for line in io.lines(os.getenv("BENCH_USERS")) do users[#users + 1] = line end
local at = tonumber(os.getenv("BENCH_SEED"))
request = function()
  at = at % #users + 1
  return wrk.format("POST", "/v1/recommend", {["content-type"] = "application/json"},
    '{"user_id": "' .. users[at] .. '", "k": 10}')
end
"""
OTHERS = {"bare": "bare", "FastAPI": "fastapi", "LitServe": "litserve"}
"""For --beside; two of them are to be installed by hand: pip install fastapi litserve."""
console = Console(stderr=True)


class Running:
    """A server process with what it needs to be asked."""

    def __init__(self, process: subprocess.Popen[str], url: str, seconds: float) -> None:
        self.process, self.target, self.url, self.seconds = process, Target.of(url), url, seconds

    def memory_mib(self) -> float:
        """Memory of all its processes, a page that n share counted 1/n each."""
        parent = psutil.Process(self.process.pid)
        family = [parent, *parent.children(recursive=True)]
        return round(sum(one.memory_full_info().pss for one in family) / 2**20, 1)


@contextmanager
def recsys(bundle: Path, home: Path, given: argparse.Namespace) -> Iterator[Running]:
    """Run `recsys serve` on a state of its own."""
    command = [sys.executable, "-m", "recsys.cli", "serve", "--bundle", str(bundle), "--port", "0"]
    command += ["--workers", str(given.workers), "--threads", str(given.threads)]
    command += ["--state", str(home), "--grace-seconds", "0", "--keep-days", "36500"]
    command += ["--queue-ms", str(given.queue_ms)]
    with (home.parent / "server.log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout
        printed = [process.stdout.readline() for _ in range(4)]
        if not printed[1]:
            raise SystemExit((home.parent / "server.log").read_text())
        seconds = float(printed[2].split()[2])
        yield Running(process, printed[1].split()[2], seconds)
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def plain(name: str, bundle: Path, given: argparse.Namespace) -> Iterator[Running]:
    """Run the same work behind another framework."""
    port, started = 8_411, time.monotonic()
    command = [sys.executable, str(HERE / "bench" / f"plain_{name}.py"), str(bundle), str(port)]
    process = subprocess.Popen(
        [*command, str(given.workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    server = Running(process, f"http://127.0.0.1:{port}", 0.0)
    try:
        while not answers(server, known(bundle, 1)[0][0]):
            if process.poll() is not None or time.monotonic() > started + 120:
                raise SystemExit(f"{name} did not start: run {' '.join(command)} 1")
            time.sleep(0.1)
        server.seconds = round(time.monotonic() - started, 2)
        yield server
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        for one in [*family, psutil.Process(process.pid)]:
            one.kill()
        process.wait(60)


def answers(server: Running, user: str) -> bool:
    async def ask() -> int:
        connection = await server.target.connect()
        body = json.dumps({"user_id": user, "k": 10}).encode()
        reply = await connection.ask(server.target.request("POST", "/v1/recommend", body))
        connection.close()
        return reply.status

    try:
        return asyncio.run(ask()) == 200
    except OSError:
        return False


def shots(target: Target, users: list[str], **asked: Any) -> Iterator[Shot]:
    """Yield requests for the users in turn, without end."""
    for user in itertools.cycle(users):
        body = json.dumps({"user_id": user, "k": 10, **asked}).encode()
        yield Shot("recommend", target.request("POST", "/v1/recommend", body))


def post_events(server: Running, users: list[str], items: list[str], each: int) -> None:
    """Give every user some events of today, so that answers read live paths."""
    draw = random.Random(0)

    async def post() -> None:
        connection = await server.target.connect()
        for at in range(0, len(users), 500):
            events = [
                {"user_id": user, "item_id": draw.choice(items), "event_id": f"{user}-{n}"}
                for user in users[at : at + 500]
                for n in range(each)
            ]
            request = server.target.request("POST", "/v1/events", json.dumps(events).encode())
            reply = await connection.ask(request)
            if reply.status != 200:
                raise SystemExit(f"events were refused: {reply.body!r}")
        connection.close()

    uvloop.run(post())


def sequential(server: Running, users: list[str], given: argparse.Namespace) -> Json:
    """One connection, one request after another."""
    if shutil.which("wrk"):
        return with_wrk(server, users, 1, given)
    run = closed_loop(
        server.target, shots(server.target, users), connections=1, seconds=given.seconds, warm=1
    )
    return summary(uvloop.run(run))


def saturation(server: Running, users: list[str], given: argparse.Namespace) -> Json:
    """As many answers as it gives: the best of some numbers of connections."""
    rows = [saturated(server, users, count, given) for count in given.connections]
    return max(rows, key=lambda row: float(row["per_second"]))


def saturated(server: Running, users: list[str], count: int, given: argparse.Namespace) -> Json:
    if shutil.which("wrk"):
        return {"connections": count, **with_wrk(server, users, count, given)}
    run = closed_loop(
        server.target,
        shots(server.target, users),
        connections=count,
        seconds=given.seconds,
        warm=1,
    )
    return {"connections": count, "client": "python", **summary(uvloop.run(run))}


def with_wrk(server: Running, users: list[str], count: int, given: argparse.Namespace) -> Json:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ask.lua").write_text(LUA)
        (Path(folder) / "users").write_text("\n".join(users))
        asked = {"BENCH_USERS": f"{folder}/users", "BENCH_SEED": str(random.randrange(len(users)))}
        command = ["wrk", "-t1", f"-c{count}", f"-d{given.seconds:g}s", "--latency"]
        command += ["-s", f"{folder}/ask.lua", server.url]
        out = subprocess.run(
            command, env={**os.environ, **asked}, capture_output=True, text=True, check=True
        ).stdout
    if "Non-2xx" in out:
        raise SystemExit(f"the server refused some requests:\n{out}")
    found = {name: re.search(rf"{name}\s+([\d.]+)(us|ms|s)", out) for name in ("50%", "99%")}
    scale = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    times = {k: float(m[1]) * scale[m[2]] for k, m in found.items() if m}
    rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert rate
    return {
        "client": "wrk",
        "per_second": round(float(rate[1]), 1),
        "p50_ms": round(times["50%"], 3),
        "p99_ms": round(times["99%"], 3),
    }


def open_rates(server: Running, users: list[str], given: argparse.Namespace) -> Json:
    """Random arrivals at some rates; latency from the moment meant."""
    found = {}
    for rate in given.rates:
        run = open_loop(
            server.target, shots(server.target, users), rate=rate, seconds=given.seconds, warm=2
        )
        found[f"{rate:g}/s"] = summary(uvloop.run(run))
    return found


def filters(server: Running, users: list[str], bundle: Path, given: argparse.Namespace) -> Json:
    """Category filters near 10 % and 1 % of the items, 100 answers a second of each."""
    found = {}
    for share, names in categories(bundle).items():
        stream = shots(server.target, users, allow_categories=names)
        run = open_loop(server.target, stream, rate=100, seconds=given.seconds, warm=2)
        found[share] = summary(uvloop.run(run))
    return found


def categories(bundle: Path) -> dict[str, list[str]]:
    """Return category lists that hold about a tenth and a hundredth of the items."""
    items = pq.ParquetFile(bundle / "items.parquet")
    if "category" not in items.schema_arrow.names:
        console.print("filters: not measured, the bundle's items have no category")
        return {}
    table = items.read(["category"])["category"].to_pylist()
    names, counts = np.unique(np.array(table, str), return_counts=True)
    chosen = {}
    for share in (0.1, 0.01):
        enough = np.searchsorted(np.cumsum(counts), share * len(table)) + 1
        part = counts[:enough].sum() / len(table)
        chosen[f"{part:.1%} of the items"] = names[:enough].tolist()
    return chosen


def events(server: Running, users: list[str], items: list[str], given: argparse.Namespace) -> Json:
    """Post an event and ask at once, 200 users a second: milliseconds of both together."""
    both: list[float] = []
    draw = random.Random(1)

    async def one(meant: float, user: str) -> None:
        event = {"user_id": user, "item_id": draw.choice(items)}
        post = server.target.request("POST", "/v1/events", json.dumps(event).encode())
        ask = server.target.request("POST", "/v1/recommend", b'{"user_id": "%s"}' % user.encode())
        assert (await pool.ask(post)).status == 200
        reply = await pool.ask(ask)
        both.append(time.perf_counter() - meant)
        assert json.loads(reply.body)["source"] == "model"

    pool = Pool(server.target, 64)

    async def run() -> None:
        await pool.fill(16)
        tasks, at = [], time.perf_counter()
        for number in range(int(200 * given.seconds)):
            at += draw.expovariate(200)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            user = f"fresh-{number % 1000}"
            tasks.append(asyncio.create_task(one(at, user)))
        await asyncio.gather(*tasks)

    uvloop.run(run())
    return milliseconds(both[len(both) // 10 :])


def summary(result: Any) -> Json:
    """Return rate and quantiles of what was answered; stop where anything was refused."""
    if set(result.outcomes()) != {"ok"}:
        raise SystemExit(f"not all were answered: {result.outcomes()}")
    rows = [s for spent in result.latencies.values() for s in spent]
    found = {"per_second": round(len(rows) / result.seconds, 1), **milliseconds(rows)}
    lag = result.summary()["client_lag_p99_ms"]
    return {**found, "client_lag_p99_ms": lag} if lag is not None else found


def ours(bundle: Path, given: argparse.Namespace, folder: Path) -> Json:
    users, items = known(bundle, given.users)
    home = folder / f"state-{bundle.name}"
    home.mkdir()
    with recsys(bundle, home, given) as server:
        post_events(server, users, items, given.posted)
        found: Json = {"start_seconds": server.seconds, "memory_mib": server.memory_mib()}
        measure = {
            "sequential": lambda: sequential(server, users, given),
            "saturation": lambda: saturation(server, users, given),
            "open": lambda: open_rates(server, users, given),
            "filters": lambda: filters(server, users, bundle, given),
            "events": lambda: events(server, users, items, given),
        }
        for name in (part for part in PARTS if part in given.only):
            found[name] = measure[name]()
            console.print(bundle.name, name, found[name])
        found["memory_after_mib"] = server.memory_mib()
    return found


def others(name: str, bundle: Path, given: argparse.Namespace) -> Json:
    users, _ = known(bundle, given.users)
    with plain(name, bundle, given) as server:
        found: Json = {"start_seconds": server.seconds, "memory_mib": server.memory_mib()}
        found["sequential"] = sequential(server, users, given)
        found["saturation"] = saturation(server, users, given)
        found["open"] = open_rates(server, users, given)
        console.print(name, found)
    return found


def known(bundle: Path, count: int) -> tuple[list[str], list[str]]:
    """Return ids of users with long histories first, and of items."""
    users = pq.ParquetFile(bundle / "users.parquet").read()["user_id"].to_pylist()
    offsets = np.load(bundle / "events" / "offsets.npy")
    longest = np.argsort(-np.diff(offsets), kind="stable")[:count]
    items = pq.ParquetFile(bundle / "items.parquet").read(["item_id"])["item_id"].to_pylist()
    return [str(users[row]) for row in longest], [str(item) for item in items]


def table(report: Json) -> Table:
    shown = Table(title="answers: per second and milliseconds")
    for column in ("server", "part", "per second", "p50", "p99"):
        shown.add_column(column, justify="left" if column in ("server", "part") else "right")
    for server, found in report.items():
        for part, row in found.items():
            rows = {part: row} if isinstance(row, dict) and "p99_ms" in row else row
            for name, figures in rows.items() if isinstance(rows, dict) else ():
                rate = figures.get("per_second", "")
                cells = (rate, figures["p50_ms"], figures["p99_ms"])
                shown.add_row(server, name, *map(str, cells))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", default="latest", help="name in the workspace, or path")
    parser.add_argument("--workspace", help="where named bundles live (RECSYS_HOME, ./workspace)")
    parser.add_argument("--seconds", type=float, default=15, help="of each part")
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rates", type=float, nargs="+", default=[400, 800])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--queue-ms", type=int, default=50, help="as of recsys serve")
    parser.add_argument("--users", type=int, default=5_000, help="different users asked for")
    parser.add_argument("--posted", type=int, default=3, help="events posted of each beforehand")
    parser.add_argument("--stages", nargs="+", default=["two", "one"], choices=["two", "one"])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--beside", nargs="*", choices=OTHERS, help="others as well: all, or those named"
    )
    given = parser.parse_args()
    bundle = Workspace(given.workspace).find("bundle", given.bundle).resolve()
    report: Json = {}
    with tempfile.TemporaryDirectory(dir=bundle.parent, prefix=".bench-") as folder:
        two = ranked(bundle, Path(folder) / f"{bundle.name}-ranked")
        if "two" in given.stages:
            report["recsys, two stages"] = ours(two, given, Path(folder))
        if "one" in given.stages:
            report["recsys, retrieval"] = ours(bundle, given, Path(folder))
        for name in () if given.beside is None else given.beside or OTHERS:
            report[f"{name}, two stages"] = others(OTHERS[name], two, given)
    Console().print(table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
