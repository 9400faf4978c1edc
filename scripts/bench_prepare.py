"""Time `prepare` on a generated log: rows a second and peak memory of a process of its own.

python scripts/bench_prepare.py --events 20e6
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
import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 1_000_000
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
import json, resource, sys
from recsys.artifacts import Workspace
from recsys.data.prepare import PrepareSettings, prepare
from recsys.data.sources.events import Events
asked = json.loads(sys.argv[1])
dataset = prepare(
    PrepareSettings(**asked["settings"]), Events(), {"rule": asked["split"]},
    Workspace(asked["workspace"]),
)
used = resource.getrusage(resource.RUSAGE_SELF)
said = {"peak_kib": used.ru_maxrss, "cpu_seconds": used.ru_utime + used.ru_stime}
print(json.dumps({"manifest": dataset.manifest, **said}))
"""


def generate(file: Path, events: int, users: int, items: int, seed: int) -> None:
    """Write a log in order of time, as a shop's would be, never holding more than one batch."""
    rng = np.random.default_rng(seed)
    user_ids = pa.array([f"user-{user:09d}" for user in range(users)])
    item_ids = pa.array([f"item-{item:07d}" for item in range(items)])
    types = pa.array(["view", "favourite", "cart", "purchase"])
    now = 1_700_000_000_000
    with pq.ParquetWriter(file, SCHEMA) as writer:
        for start in range(0, events, BATCH):
            size = min(BATCH, events - start)
            times = now + np.cumsum(rng.integers(0, 300, size))
            now = int(times[-1])
            columns = [
                user_ids.take(pa.array((users * rng.random(size) ** 1.5).astype(np.int64))),
                item_ids.take(pa.array((items * rng.random(size) ** 3).astype(np.int64))),
                pa.array(times),
                types.take(pa.array(np.minimum(rng.geometric(0.7, size) - 1, 3))),
                pa.array(rng.random(size, dtype=np.float32)),
            ]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


def measure(log: Path, workspace: Path, settings: dict[str, object], split: str) -> dict:
    """Prepare `log` in a fresh process; return seconds, rows a second and peak MiB."""
    asked = {"settings": settings, "split": split, "workspace": str(workspace)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.perf_counter()
    answer = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(asked)],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    said = json.loads(answer.stdout.splitlines()[-1])
    manifest = said["manifest"]
    return {
        "source_rows": manifest["source_rows"],
        "log_mb": round(log.stat().st_size / 1e6),
        "users": manifest["num_users"],
        "items": manifest["num_items"],
        "events": manifest["num_events"],
        "dropped": manifest["dropped"],
        "seconds": manifest["seconds"],
        "process_seconds": round(seconds, 1),
        "rows_a_second": round(manifest["source_rows"] / manifest["seconds"]),
        "cpu_seconds": round(said["cpu_seconds"], 1),
        "peak_mib": round(said["peak_kib"] / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", type=float, default=20e6)
    parser.add_argument("--users", type=float, help="default: a twentieth of the events")
    parser.add_argument("--items", type=float, default=100_000)
    parser.add_argument("--split", default="leave_one_out", choices=("leave_one_out", "temporal"))
    parser.add_argument("--k-core", type=int, help="default: none, but minimum counts of 5")
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where to work; default: a temporary folder here")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    events = int(chosen.events)
    users = int(chosen.users or max(10, events // 20))
    # Not /tmp by default: it is often memory, and would not count.
    with tempfile.TemporaryDirectory(dir=chosen.folder or Path.cwd(), prefix=".bench-") as work:
        log = Path(work) / "log.parquet"
        generate(log, events, users, int(chosen.items), chosen.seed)
        settings = {
            "name": "bench",
            "path": str(log),
            "min_user_events": 5,
            "min_item_events": 5,
            "k_core": chosen.k_core,
            "memory_limit": chosen.memory_limit,
            "threads": chosen.threads,
        }
        print(json.dumps(measure(log, Path(work) / "workspace", settings, chosen.split), indent=1))


if __name__ == "__main__":
    main()
