"""Measure a served bundle: start time, resident memory, latency one at a time, throughput.

    python scripts/bench_serving.py --bundle latest

The client runs beside the server on the same machine, and its work is part of the figures. It asks
for known users in turn, seen items left out. Prints one JSON object at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pyarrow.parquet as pq
import uvloop

from recsys.artifacts import Workspace

HEAD = "POST /v1/recommend HTTP/1.1\r\nHost: bench\r\nContent-Length: {}\r\n\r\n"


class Client:
    """One kept connection that sends ready-made requests and reads whole answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> bytes:
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await self.reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server refused: {body.decode()}")
        return body


def requests_for(bundle: Path, count: int, k: int) -> list[bytes]:
    """Return ready-made requests of the bundle's users in turn, of newcomers where it has none."""
    users = pq.ParquetFile(bundle / "users.parquet").read()["user_id"].to_pylist()[:count]
    bodies = [msgspec.json.encode({"user_id": user, "k": k}) for user in users or [""]]
    bodies = bodies if users else [msgspec.json.encode({"k": k})]
    return [HEAD.format(len(body)).encode() + body for body in bodies]


async def one_at_a_time(port: int, requests: list[bytes], count: int) -> dict[str, float]:
    client = await Client.open(port)
    spent = []
    for number in range(count):
        started = time.perf_counter()
        await client.ask(requests[number % len(requests)])
        spent.append((time.perf_counter() - started) * 1000)
    return percentiles(spent)


async def closed_loop(
    port: int, requests: list[bytes], connections: int, seconds: float
) -> dict[str, float]:
    spent: list[float] = []
    started = time.perf_counter()

    async def ask_on(client: Client, place: int) -> None:
        while (sent := time.perf_counter()) < started + seconds:
            await client.ask(requests[place % len(requests)])
            spent.append((time.perf_counter() - sent) * 1000)
            place += connections

    clients = [await Client.open(port) for _ in range(connections)]
    await asyncio.gather(*(ask_on(client, place) for place, client in enumerate(clients)))
    rate = len(spent) / (time.perf_counter() - started)
    return {"answers_per_second": round(rate, 1), **percentiles(spent)}


async def stages(port: int, requests: list[bytes], count: int = 200) -> dict[str, float]:
    """Return the median of each stage as the answers report them."""
    client = await Client.open(port)
    answers = [json.loads(await client.ask(r)) for r in (requests * count)[:count]]
    names = answers[0]["timings_ms"]
    return {n: round(float(np.median([a["timings_ms"][n] for a in answers])), 3) for n in names}


def percentiles(spent: list[float]) -> dict[str, float]:
    names, values = ("p50_ms", "p99_ms"), np.percentile(spent, [50, 99])
    return {name: round(float(value), 3) for name, value in zip(names, values, strict=True)}


def measure(bundle: Path, given: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "recsys.serving", "--bundle", str(bundle), "--port", "0"]
    command += ["--threads", str(given.threads)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            return figures(server, requests_for(bundle, given.users, given.k), given)
        finally:
            server.terminate()
            server.wait(30)


def figures(
    server: subprocess.Popen[str], requests: list[bytes], given: argparse.Namespace
) -> dict[str, Any]:
    assert server.stdout
    printed = [server.stdout.readline().rstrip() for _ in range(4)]
    if not printed[1]:
        raise SystemExit("the server did not start; start it by hand to see why")
    print("\n".join(printed[:3]))
    port, seconds = int(printed[1].split()[2].rsplit(":", 1)[1]), float(printed[2].split()[2])
    uvloop.run(one_at_a_time(port, requests, 200))  # warm
    return {
        "start_seconds": seconds,
        "sequential": uvloop.run(one_at_a_time(port, requests, given.requests)),
        "closed_loop": uvloop.run(closed_loop(port, requests, given.connections, given.seconds)),
        "stages_p50_ms": uvloop.run(stages(port, requests)),
        "resident_mib": round(psutil.Process(server.pid).memory_info().rss / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", default="latest", help="name in the workspace, or path")
    parser.add_argument("--workspace", help="where named bundles live (RECSYS_HOME, ./workspace)")
    parser.add_argument("--requests", type=int, default=2_000, help="asked one at a time")
    parser.add_argument("--connections", type=int, default=8, help="asking at once")
    parser.add_argument("--seconds", type=float, default=10, help="how long those ask")
    parser.add_argument("--threads", type=int, default=2, help="of the server")
    parser.add_argument("--users", type=int, default=10_000, help="different users asked for")
    parser.add_argument("--k", type=int, default=10)
    given = parser.parse_args()
    found = measure(Workspace(given.workspace).find("bundle", given.bundle), given)
    print(f"One at a time: {found['sequential']}")
    print(f"{given.connections} connections: {found['closed_loop']}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
