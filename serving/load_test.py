"""Put a server under load and print what it answered how fast.

    python serving/load_test.py --url http://127.0.0.1:8000 --rate 400 --seconds 30 --users 1000

With --rate, requests are sent at random moments, so many a second on average, whatever comes back;
latency counts from the moment meant. Without it, --connections ask one after another each. Nothing
is tried again. The API key is read from RECSYS_API_KEY. Events are posted for the users that the
recommendations are for: keep that off a server whose paths matter. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from bench.load import (
    Refused,
    Reply,
    Result,
    Shot,
    Target,
    Tick,
    closed_loop,
    open_loop,
)

KEY = "RECSYS_API_KEY"
OPEN, CLOSED = 256, 8
POPULAR = 100
"""Items to post events of, where none are given: what the server recommends to a newcomer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, 1 where nothing was answered, and 2 where something given is wrong."""
    given = parsed(arguments)
    try:
        target = Target.of(given.url, os.environ.get(KEY))
        users = ids(given.users, "load-{}")
        items = uvloop.run(prepared(target, given))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shots = mixed(target, users, items, share=given.events, k=given.k, seed=given.seed)
    result = measured(target, shots, given)
    Console().print(table(result, given))
    print(json.dumps({"url": given.url, "rate": given.rate, **result.summary()}))
    return 0 if result.outcomes()["ok"] else 1


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--rate", type=positive, help="requests a second; without it, as many as come back")
    add("--connections", type=count, help="open at most (256), or asking in turn (8)")
    add("--seconds", type=positive, default=30.0, help="how long (30)")
    add("--warm", type=float, default=2.0, help="seconds beforehand that do not count (2)")
    add("--users", default="1000", help="how many are made up, or a file with one id a line")
    add("--items", help="a file of item ids for events; default: the server's popular ones")
    add("--events", type=share, default=0.0, help="share of requests that post an event (0)")
    add("--k", type=int, default=10, help="items of an answer (10)")
    add("--timeout", type=positive, default=10.0, help="seconds until an answer is given up (10)")
    add("--seed", type=int, default=0, help="of the moments and the users (0)")
    return parser.parse_args(arguments)


def count(text: str) -> int:
    """Read a whole number above 0."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def positive(text: str) -> float:
    """Read a number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to 1")
    return value


def ids(given: str, pattern: str) -> list[str]:
    """Return the ids of a file, or as many made up as the number says."""
    if given.isdecimal() and int(given):
        return [pattern.format(number) for number in range(int(given))]
    try:
        found = Path(given).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{given!r} is neither a number above 0 nor a file of ids") from error
    if kept := [line.strip() for line in found if line.strip()]:
        return kept
    raise Refused(f"{given}: no ids; expected one a line")


async def prepared(target: Target, given: argparse.Namespace) -> list[str]:
    """Return the items to post events of; raise Refused where the server does not answer."""
    body = json.dumps({"k": POPULAR}).encode()
    request = target.request("POST", "/v1/recommend", body)
    try:
        connection = await target.connect()
        reply = await connection.ask(request)
    except OSError as error:
        raise Refused(f"no server answers at {given.url}: {error}; set --url") from error
    connection.close()
    if reply.status != 200:
        raise Refused(explained(reply, given.url))
    return ids(given.items, "{}") if given.items else popular(reply, given.url)


def popular(reply: Reply, url: str) -> list[str]:
    """Return the items of an answer."""
    try:
        return [item["item_id"] for item in json.loads(reply.body)["items"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"what answers at {url} is no recsys server; set --url") from error


def explained(reply: Reply, url: str) -> str:
    """Return what to do about a refusal of the first request."""
    hint = f"; export {KEY}=…" if reply.status in (401, 403) else ""
    hint = "; is it a recsys server? set --url" if reply.status in (404, 405) else hint
    return f"{url} answers {reply.status}: {reply.body[:200].decode(errors='replace')}{hint}"


def mixed(
    target: Target, users: list[str], items: list[str], *, share: float, k: int, seed: int
) -> Iterator[Shot]:
    """Yield requests without end: a share of them events, each with an id of its own."""
    draw, run, number = random.Random(seed), uuid.uuid4().hex[:12], 0
    while True:
        user = draw.choice(users)
        if draw.random() < share:
            number += 1
            event = {"user_id": user, "item_id": draw.choice(items), "event_id": f"{run}-{number}"}
            yield Shot("events", target.request("POST", "/v1/events", encoded(event)))
        else:
            body = encoded({"user_id": user, "k": k})
            yield Shot("recommend", target.request("POST", "/v1/recommend", body))


def encoded(value: Mapping[str, object]) -> bytes:
    """Return JSON."""
    return json.dumps(value).encode()


def measured(target: Target, shots: Iterator[Shot], given: argparse.Namespace) -> Result:
    """Run the load with a progress bar on the terminal."""
    columns = [*Progress.get_default_columns(), TextColumn("{task.fields[now]}")]
    # Drawing takes the interpreter from the load for a moment: twice a second is enough.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        return uvloop.run(load(target, shots, given, ticking(progress, given.seconds)))


async def load(
    target: Target, shots: Iterator[Shot], given: argparse.Namespace, tick: Tick
) -> Result:
    """Run the open or the closed loop."""
    if given.rate is None:
        return await closed_loop(
            target,
            shots,
            connections=given.connections or CLOSED,
            seconds=given.seconds,
            warm=given.warm,
            timeout=given.timeout,
            tick=tick,
        )
    return await open_loop(
        target,
        shots,
        rate=given.rate,
        seconds=given.seconds,
        warm=given.warm,
        connections=given.connections or OPEN,
        timeout=given.timeout,
        seed=given.seed,
        tick=tick,
    )


def ticking(progress: Progress, seconds: float) -> Tick:
    """Return what moves the bar, at most four times a second."""
    bar = progress.add_task("load", total=seconds, now="")
    shown = 0.0

    def tick(result: Result) -> None:
        nonlocal shown
        if (now := time.perf_counter()) - shown > 0.25:
            shown = now
            rate = result.count / result.seconds if result.seconds > 0 else 0.0
            progress.update(bar, completed=max(result.seconds, 0), now=f"{rate:,.0f} answers/s")

    return tick


def table(result: Result, given: argparse.Namespace) -> Table:
    """Return kinds and outcomes as a table."""
    how = f"{given.rate:g}/s meant" if given.rate else f"{given.connections or CLOSED} connections"
    late = result.summary()["client_lag_p99_ms"]
    shown = Table(title=f"{given.url}: {how}, {result.seconds:.0f} s")
    for name in ("kind", "outcome"):
        shown.add_column(name, no_wrap=True)
    for name in ("count", "/s", "p50 ms", "p90 ms", "p99 ms", "max ms"):
        shown.add_column(name, justify="right")
    for row in result.rows():
        shown.add_row(
            *(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values())
        )
    shown.caption = f"99 % of requests left this client at most {late} ms late" if late else None
    return shown


if __name__ == "__main__":
    sys.exit(main())
