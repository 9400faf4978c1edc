"""Time `grow.onto` by the size of the old dataset and of the new day, beside preparing it all.

python scripts/bench_grow.py --old 1e6 1e7 --day 1e4 1e5 1e6
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from bench_prepare import BATCH, SCHEMA, generate
from recsys.artifacts import Workspace
from recsys.data.grow import Growth, grow
from recsys.data.prepare import prepare
from recsys.data.sources.events import Events

SPLIT = {"rule": "temporal"}


def cut(file: Path, first: int, base: Path, day: Path) -> None:
    """Write the first rows of a log to one file and the rest to another."""
    seen = 0
    with pq.ParquetWriter(base, SCHEMA) as old, pq.ParquetWriter(day, SCHEMA) as new:
        for batch in pq.ParquetFile(file).iter_batches(BATCH):
            place = min(max(first - seen, 0), len(batch))
            old.write_batch(batch.slice(0, place))
            new.write_batch(batch.slice(place))
            seen += len(batch)


def settings(file: Path, memory: str) -> dict[str, object]:
    return {"name": file.stem, "path": str(file), "memory_limit": memory}


def measure(
    root: Path, old: int, day: int, memory: str, users: int, items: int
) -> dict[str, float]:
    """Return seconds of preparing the old log, of growing it, and of that before the merge."""
    whole, base, new = (root / f"{name}.parquet" for name in ("whole", "base", "day"))
    generate(whole, old + day, users, items, 0)
    cut(whole, old, base, new)
    workspace, stages = Workspace(root / "workspace"), {}
    began = time.perf_counter()
    dataset = prepare(settings(base, memory), Events(), SPLIT, workspace)
    prepared = time.perf_counter()
    grow(
        Growth(str(dataset.path)),
        settings(new, memory),
        Events(),
        workspace,
        lambda stage: stages.setdefault(stage, time.perf_counter()),
    )
    return {
        "old": old,
        "day": day,
        "prepare_old_seconds": prepared - began,
        "grow_seconds": time.perf_counter() - prepared,
        "of_which_reading_the_day": stages["merging"] - prepared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--day", type=float, nargs="+", default=[1e4, 1e5, 1e6])
    parser.add_argument("--users", type=float, default=1e5)
    parser.add_argument("--items", type=float, default=1e4)
    parser.add_argument("--memory", default="2GB")
    arguments = parser.parse_args()
    sizes = int(arguments.users), int(arguments.items)
    for old in arguments.old:
        for day in arguments.day:
            with tempfile.TemporaryDirectory() as root:
                found = measure(Path(root), int(old), int(day), arguments.memory, *sizes)
            print(json.dumps({k: round(v, 2) for k, v in found.items()}), flush=True)


if __name__ == "__main__":
    main()
