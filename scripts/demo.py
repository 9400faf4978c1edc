"""The whole road on a synthetic shop: prepare, train, evaluate, export, serve, ask, stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

from rich.console import Console
from rich.table import Table

RECSYS = [sys.executable, "-m", "recsys.cli"]
EVENTS_IN_AN_AISLE = 4


def main() -> int:
    started = time.perf_counter()
    bundle = run_pipeline()
    with server(bundle) as url:
        ask_as_a_newcomer(url)
        ask_as_a_known_user(url, bundle)
        ask_while_changing_aisle(url, bundle)
    print(f"\nThe demo took {time.perf_counter() - started:.0f} s. Next, your own events:")
    print(f"  {sys.executable} -m recsys.cli run data=events data.path=events.csv")
    return 0


def run_pipeline() -> Path:
    """Run the command as a person would and return the bundle that it made."""
    command = [*RECSYS, "run", "experiment=demo", "--json"]
    print("$ recsys run experiment=demo", flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    last = ""
    for last in process.stdout:
        if not last.startswith("{"):
            print(last, end="", flush=True)
    if process.wait():
        raise SystemExit("the pipeline failed; see above")
    return Path(json.loads(last)["bundle"])


@contextmanager
def server(bundle: Path) -> Iterator[str]:
    """Serve the bundle in a process of its own on a free port; stop it at the end."""
    command = [*RECSYS, "serve", "--bundle", str(bundle), "--port", "0"]
    print(f"\n$ recsys serve --bundle {bundle.name}", flush=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    try:
        yield url_of(process.stdout)
    finally:
        process.terminate()
        process.wait(timeout=20)


def url_of(lines: Iterator[str]) -> str:
    for line in lines:
        print(line, end="", flush=True)
        if line.startswith("Listening on "):
            return line.split()[2]
    raise SystemExit("the server ended before it listened")


def ask(url: str, **request: object) -> dict:
    return post(f"{url}/v1/recommend", request)


def post(url: str, message: dict) -> dict:
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(url, json.dumps(message).encode(), headers), timeout=30) as answer:
        return dict(json.load(answer))


def show(title: str, answer: dict) -> None:
    table = Table(title=title, caption=f"{answer['source']}, {sum_ms(answer):.1f} ms in the server")
    for column in ("item", "title", "category", "score"):
        table.add_column(column)
    for item in answer["items"]:
        row = (item["item_id"], item.get("title", ""), str(item.get("category", "")))
        table.add_row(*row, f"{item['score']:.2f}")
    Console().print(table)


def sum_ms(answer: dict) -> float:
    return float(sum(v for k, v in answer["timings_ms"].items() if k != "total"))


def ask_as_a_newcomer(url: str) -> None:
    show("A newcomer: nothing known, so what is popular", ask(url, k=5))


def ask_as_a_known_user(url: str, bundle: Path) -> None:
    import pyarrow.parquet as pq

    user = pq.ParquetFile(bundle / "users.parquet").read()["user_id"][0].as_py()
    show(f"Known user {user}: from their stored path", ask(url, user_id=user, k=5))


def ask_while_changing_aisle(url: str, bundle: Path) -> None:
    """Post a walk along one aisle, then another; count the answers from each after every event."""
    first, second = two_aisles(bundle)
    path = first[1][:EVENTS_IN_AN_AISLE] + second[1][:EVENTS_IN_AN_AISLE]
    names = (first[0], second[0])
    table = Table(title="Posted events that change aisle midway: aisles of the top 10")
    visitor = f"visitor-{time.time_ns()}"
    for column in ("event", "item seen", *names, "other"):
        table.add_column(column)
    answer: dict = {}
    for count in range(1, len(path) + 1):
        post(f"{url}/v1/events", {"user_id": visitor, "item_id": path[count - 1]})
        answer = ask(url, user_id=visitor, k=10)
        aisles = [item.get("category") for item in answer["items"]]
        hits = [aisles.count(name) for name in names]
        seen = names[count > EVENTS_IN_AN_AISLE]
        table.add_row(str(count), seen, *map(str, hits), str(len(aisles) - sum(hits)))
    Console().print(table)
    show("And what it ends with", answer | {"items": answer["items"][:5]})
    show_why(url, visitor, answer["items"][:3])


def show_why(url: str, visitor: str, items: list[dict]) -> None:
    """Say what of the walk the answers' scores are owed to."""
    asked = {"user_id": visitor, "items": [item["item_id"] for item in items], "by": "category"}
    why = post(f"{url}/v1/explain", asked)
    table = Table(title="Why: what a score would lose without the events in an aisle")
    for column in ("item", "category", "score", "owed to"):
        table.add_column(column)
    for item, told in zip(items, why["items"], strict=True):
        owed = ", ".join(f"{r['name']} {r['effect']:+.2f}" for r in told["reasons"])
        table.add_row(item["item_id"], str(item.get("category")), f"{told['score']:.2f}", owed)
    Console().print(table)


def two_aisles(bundle: Path) -> list[tuple[str, list[str]]]:
    """Return the two largest categories that come first by name, with their most popular items."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(bundle / "items.parquet").read(columns=["item_id", "category"])
    aisles: dict[str, list[str]] = {}
    for row in table.to_pylist():
        aisles.setdefault(row["category"], []).append(row["item_id"])
    full = [(name, items) for name, items in sorted(aisles.items()) if len(items) >= 8]
    return [full[0], full[-1]]


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
