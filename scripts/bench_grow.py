"""Time `grow.onto` by the size of the old dataset and of the new day, beside preparing it all.

python scripts/bench_grow.py --old 1e6 1e7 --day 1e4 1e5 1e6
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bench_prepare import BATCH, SCHEMA, generate
from recsys.artifacts import Workspace
from recsys.data.grow import Growth, grow
from recsys.data.prepare import prepare
from recsys.data.sources.events import Events

SPLIT = {"rule": "temporal"}


def cut(log: Path, places: list[int], parts: list[Path]) -> None:
    """Write the rows of a folder's files from each place up to the next to a file of their own."""
    seen = 0
    with ExitStack() as stack:
        files = [stack.enter_context(pq.ParquetWriter(part, SCHEMA)) for part in parts]
        read = (pq.ParquetFile(file).iter_batches(BATCH) for file in sorted(log.iterdir()))
        for batch in chain.from_iterable(read):
            ends = [min(max(place - seen, 0), len(batch)) for place in places]
            for out, (first, last) in zip(files, pairwise(ends), strict=True):
                out.write_batch(batch.slice(first, last - first))
            seen += len(batch)


def settings(file: Path, memory: str) -> dict[str, object]:
    return {"name": file.stem, "path": str(file), "memory_limit": memory}


class Clock:
    """Seconds since it was made, by the wall and of the processor."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}


def measure(root: Path, old: int, days: list[int], memory: str, sizes: tuple[int, int]) -> None:
    """Print what preparing the old log takes, and growing it by each day, and that up to the merge.

    The days follow each other in the log; each is put onto the old dataset.
    """
    whole, base = root / "whole", root / "base.parquet"
    logs = [root / f"day-{day}.parquet" for day in days]
    places = [0, old, *(old + sum(days[: n + 1]) for n in range(len(days)))]
    generate(whole, places[-1], *sizes, 0)
    cut(whole, places, [base, *logs])
    workspace, clock = Workspace(root / "workspace"), Clock()
    dataset = prepare(settings(base, memory), Events(), SPLIT, workspace)
    print(json.dumps({"old": old, **clock.read()}), flush=True)
    for day, log in zip(days, logs, strict=True):
        clock, stages = Clock(), {}
        growth = Growth(str(dataset.path))

        def stage(name: str, clock: Clock = clock, stages: dict[str, Any] = stages) -> None:
            stages[name] = clock.read()["cpu_seconds"]

        grow(growth, settings(log, memory), Events(), workspace, stage)
        up_to = {"cpu_seconds_reading": stages["merging"]}
        print(json.dumps({"old": old, "day": day, **clock.read(), **up_to}), flush=True)


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
        with tempfile.TemporaryDirectory() as root:
            measure(Path(root), int(old), [int(d) for d in arguments.day], arguments.memory, sizes)


if __name__ == "__main__":
    main()
