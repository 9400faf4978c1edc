"""Measure a catalogue of millions of items: train, export, build, serve, add and remove items.

    python scripts/bench_catalogue.py                     # 5,000,000 items of 32 dimensions
    python scripts/bench_catalogue.py --items 1000000 --dim 64 --rates 100 400

The log is made up: every item occurs, items lie in aisles, and people stay in one. `recsys prepare`
reads it; the shipped model, loss and optimizer train for some steps, from item vectors that begin
by aisle (so few steps would leave most of millions at random, as no real catalogue is). The graph
is exported and the index built and tuned as `recsys export` does it, on query vectors of that
encoder. Then `recsys serve` is asked for known users, and while it answers, items are added and
removed: a new one lies where a user's own answers do, and the time is measured from the moment of
posting until each of several connections has been answered with it. Each step is a process of its
own; one that was done is not done again where --out is the same. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import uvloop
from rich.console import Console

from bench import aisles
from bench.load import Connection, Target, milliseconds, open_loop
from bench.protocol import driver_environment
from bench_serving import Json, Running, known, recsys, sequential, shots, summary

HERE = Path(__file__).resolve().parent / "bench"
console = Console(stderr=True)


def prepared(given: argparse.Namespace, out: Path) -> str:
    """Make the log and prepare it; return the dataset's path."""
    said, log = out / "prepared.json", out / "events.parquet"
    if not said.is_file():
        if not log.is_file():
            console.print(f"{aisles.write_events(given.items, log):,} events made")
        command = [sys.executable, "-m", "recsys.cli", "prepare", "data=events"]
        command += [f"data.path={log}", f"data.name=catalogue-{given.items}", "--json"]
        said.write_text(last_line(command, {"RECSYS_HOME": str(out / "home")}))
    return str(json.loads(said.read_text())["dataset"])


def last_line(command: list[str], more: dict[str, str] | None = None) -> str:
    """Run a step in a process of its own; return the last line that it prints."""
    environment = {**driver_environment(os.cpu_count() or 1, HERE), **(more or {})}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        raise SystemExit(f"exit {answer.returncode}: {' '.join(command[:4])}")
    return answer.stdout.splitlines()[-1]


def step(script: str, given: Json) -> Json:
    command = [sys.executable, str(HERE / script), json.dumps(given)]
    return dict(json.loads(last_line(command)))


def trained(given: argparse.Namespace, out: Path, dataset: str) -> Json:
    sizes = {"dim": given.dim, "length": given.length, "steps": given.steps}
    if not (out / "trained.json").is_file():
        step("catalogue_train.py", {"out": str(out), "dataset": dataset, **sizes})
    return dict(json.loads((out / "trained.json").read_text())["figures"])


def bundled(given: argparse.Namespace, out: Path, dataset: str) -> tuple[Path, Json]:
    name = f"{given.index}-{given.recall:g}-{given.nlist or 0}-{given.shards}"
    path, said = out / f"catalogue-{name}", out / f"bundle-{name}.json"
    if not said.is_file():
        index = {"kind": given.index, "target_recall": given.recall, "shards": given.shards}
        index |= {"nlist": given.nlist} if given.nlist else {}
        asked = {"out": str(out), "dataset": dataset, "bundle": str(path), "index": index}
        said.write_text(json.dumps(step("catalogue_bundle.py", asked)))
    return path, dict(json.loads(said.read_text()))


def served(bundle: Path, given: argparse.Namespace, out: Path) -> Json:
    """Start a server on a state of its own, ask it, change its items under load."""
    users, _ = known(bundle, given.users)
    home = out / f"state-{int(time.time())}"
    home.mkdir()
    with recsys(bundle, home, given) as server:
        found: Json = {"start_seconds": server.seconds, "memory_mib": server.memory_mib()}
        found["one connection"] = sequential(server, users, given)
        for rate in given.rates:
            run = open_loop(
                server.target, shots(server.target, users), rate=rate, seconds=given.seconds, warm=2
            )
            found[f"{rate:g}/s"] = summary(uvloop.run(run))
            console.print(f"{rate:g}/s", found[f"{rate:g}/s"])
        found["items"] = uvloop.run(items_under_load(server, bundle, users, given))
        found["memory_after_mib"] = server.memory_mib()
    return found


async def items_under_load(
    server: Running, bundle: Path, users: list[str], given: argparse.Namespace
) -> Json:
    """Add and remove items in turn while the server is asked at the first rate."""
    from recsys.index.bundle import Bundle

    opened = Bundle.open(bundle, verify=False)
    vectors_ND, index = opened.vectors_ND, opened.item_index
    seconds = given.seconds + 2 * given.changes
    load = asyncio.create_task(
        open_loop(
            server.target,
            shots(server.target, users),
            rate=given.rates[0],
            seconds=seconds,
            warm=1,
        )
    )
    await asyncio.sleep(2)
    connections = [await server.target.connect() for _ in range(given.pollers)]
    appeared, after_removal = [], 0
    for number, user in enumerate(itertools.islice(itertools.cycle(users), given.changes)):
        near = [index[one] for one in await answered(connections[0], server.target, user)]
        vector_D = 3 * vectors_ND[np.array(near) - 1].mean(axis=0)
        name = f"new-{number}"
        posted = time.perf_counter()
        body = json.dumps({"item_id": name, "vector": vector_D.tolist()}).encode()
        await sent(connections[0], server.target.request("POST", "/v1/items", body))
        await asyncio.gather(*(until(c, server.target, user, name) for c in connections))
        appeared.append(time.perf_counter() - posted)
        await sent(connections[0], server.target.request("DELETE", f"/v1/items/{name}"))
        lists = await asyncio.gather(*(answered(c, server.target, user) for c in connections))
        after_removal += sum(name in one for one in lists)
        await asyncio.sleep(0.5)
    for connection in connections:
        connection.close()
    run = await load
    return {
        "changes": given.changes,
        "until all connections had it": milliseconds(appeared),
        "median_ms": round(1e3 * statistics.median(appeared), 1),
        "answers with a removed item": after_removal,
        "meanwhile": summary(run),
    }


async def answered(connection: Connection, target: Target, user: str) -> list[str]:
    body = json.dumps({"user_id": user, "k": 10}).encode()
    reply = await sent(connection, target.request("POST", "/v1/recommend", body))
    return [item["item_id"] for item in reply["items"]]


async def until(connection: Connection, target: Target, user: str, name: str) -> None:
    while name not in await answered(connection, target, user):
        await asyncio.sleep(0.005)


async def sent(connection: Connection, request: bytes) -> Json:
    reply = await connection.ask(request)
    if reply.status != 200:
        raise SystemExit(f"refused: {reply.body[:200]!r}")
    return dict(json.loads(reply.body))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=5_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--length", type=int, default=50, help="of a history")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--index", default="ivf_pq", help="kind, as in index=")
    parser.add_argument("--recall", type=float, default=0.97, help="recall@100 to tune for")
    parser.add_argument("--nlist", type=int, help="inverted lists; default: 4 √items")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--users", type=int, default=1_000, help="asked for in turn")
    parser.add_argument("--rates", type=float, nargs="+", default=[50, 100])
    parser.add_argument("--seconds", type=float, default=15, help="of each part")
    parser.add_argument("--changes", type=int, default=10, help="items added and removed")
    parser.add_argument("--pollers", type=int, default=8, help="connections that look for them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--queue-ms", type=int, default=50, help="as of recsys serve")
    parser.add_argument("--until", choices=("prepare", "train", "bundle", "serve"), default="serve")
    parser.add_argument("--out", default="workspace/benchmarks/catalogue")
    given = parser.parse_args()
    out = Path(given.out).resolve() / f"{given.items}-{given.dim}"
    out.mkdir(parents=True, exist_ok=True)
    report: Json = {"arguments": vars(given), "cores": os.cpu_count()}
    dataset = prepared(given, out)
    if given.until in ("train", "bundle", "serve"):
        report["train"] = trained(given, out, dataset)
    if given.until in ("bundle", "serve"):
        bundle, report["bundle"] = bundled(given, out, dataset)
    if given.until == "serve":
        report["serve"] = served(bundle, given, out)
    (out / "catalogue.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
