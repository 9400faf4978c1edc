"""Time `prepare` on a generated log: rows a second and peak memory of all its processes.

python scripts/bench_prepare.py --events 20e6
python scripts/bench_prepare.py --events 100e6 --users 5e6 --items 1e6
python scripts/bench_prepare.py --events 20e6 --engine spark --memory-limit 4GB
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 1_000_000
EVENTS_A_FILE = 10_000_000
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("event_type", pa.string()),
        ("value", pa.float32()),
    ]
)
CHILD = """
import json, resource, sys, time
from recsys.artifacts import Workspace
from recsys.data.prepare import PrepareSettings, prepare
from recsys.data.sources.events import Events
asked, began = json.loads(sys.argv[1]), time.monotonic()
dataset = prepare(
    PrepareSettings(**asked["settings"]), Events(), {"rule": asked["split"]},
    Workspace(asked["workspace"]),
    lambda name: print(f"{time.monotonic() - began:6.0f} s {name}", file=sys.stderr, flush=True),
)
mine, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({
    "manifest": {name: dataset.manifest[name] for name in asked["facts"]},
    "peak_kib": mine.ru_maxrss,
    "cpu_seconds": sum(one.ru_utime + one.ru_stime for one in (mine, theirs)),
}))
"""
FACTS = ("num_users", "num_items", "num_events", "source_rows", "dropped", "seconds", "fingerprint")


def generate(folder: Path, events: int, users: int, items: int, seed: int) -> None:
    """Write a log in order of time, as a shop's would be, never holding more than one batch.

    An item's share of events goes as one over its place in the order of popularity.
    """
    rng = np.random.default_rng(seed)
    user_ids = pa.array([f"user-{user:09d}" for user in rng.permutation(users)])
    item_ids = pa.array([f"item-{item:07d}" for item in rng.permutation(items)])
    types = pa.array(["view", "favourite", "cart", "purchase"])
    now = 1_700_000_000_000
    folder.mkdir()
    for place, first in enumerate(range(0, events, EVENTS_A_FILE)):
        last = min(first + EVENTS_A_FILE, events)
        with pq.ParquetWriter(folder / f"part-{place:04d}.parquet", SCHEMA) as writer:
            for start in range(first, last, BATCH):
                size = min(BATCH, last - start)
                times = now + np.cumsum(rng.integers(0, 60, size))
                now = int(times[-1])
                columns = [
                    user_ids.take(pa.array((users * rng.random(size) ** 1.5).astype(np.int64))),
                    item_ids.take(pa.array((items ** rng.random(size)).astype(np.int64) - 1)),
                    pa.array(times),
                    types.take(pa.array(np.minimum(rng.geometric(0.7, size) - 1, 3))),
                    pa.array(rng.random(size, dtype=np.float32)),
                ]
                writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


def measure(log: Path, workspace: Path, settings: dict[str, object], split: str) -> dict:
    """Prepare `log` in a fresh process; return seconds, rows a second and peak MiB."""
    asked = {"settings": settings, "split": split, "workspace": str(workspace), "facts": FACTS}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.perf_counter()
    command = [sys.executable, "-c", CHILD, json.dumps(asked)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        together = watch(child)
        answer = child.stdout.read()
    if child.returncode:
        sys.exit(child.returncode)
    said = json.loads(answer.splitlines()[-1])
    manifest = said["manifest"]
    return {
        **manifest,
        "log_mb": round(sum(file.stat().st_size for file in log.iterdir()) / 1e6),
        "process_seconds": round(time.perf_counter() - began, 1),
        "rows_a_second": round(manifest["source_rows"] / manifest["seconds"]),
        "cpu_seconds": round(said["cpu_seconds"], 1),
        "peak_mib": round(max(said["peak_kib"] / 1024, together / 2**20)),
    }


def watch(child: subprocess.Popen) -> int:
    """Return the most bytes that a process and those it started held together, twice a second."""
    most = 0
    while child.poll() is None:
        try:
            first = psutil.Process(child.pid)
            held = [one.memory_info().rss for one in (first, *first.children(recursive=True))]
            most = max(most, sum(held))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.5)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", type=float, default=20e6)
    parser.add_argument("--users", type=float, help="default: a twentieth of the events")
    parser.add_argument("--items", type=float, default=100_000)
    parser.add_argument("--split", default="leave_one_out", choices=("leave_one_out", "temporal"))
    parser.add_argument("--k-core", type=int, help="default: none, but minimum counts of 5")
    parser.add_argument("--engine", default="duckdb", choices=("duckdb", "spark"))
    parser.add_argument("--log", help="folder of the log, made where it is not there, and kept")
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where to work; default: a temporary folder here")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    events = int(chosen.events)
    users = int(chosen.users or max(10, events // 20))
    # Not /tmp by default: it is often memory, and would not count.
    with tempfile.TemporaryDirectory(dir=chosen.folder or Path.cwd(), prefix=".bench-") as work:
        log = Path(chosen.log or Path(work) / "log").absolute()
        if not log.is_dir():
            generate(log, events, users, int(chosen.items), chosen.seed)
        settings = {
            "name": "bench",
            "path": str(log),
            "min_user_events": 5,
            "min_item_events": 5,
            "k_core": chosen.k_core,
            "engine": chosen.engine,
            "memory_limit": chosen.memory_limit,
            "threads": chosen.threads,
        }
        print(json.dumps(measure(log, Path(work) / "workspace", settings, chosen.split), indent=1))


if __name__ == "__main__":
    main()
