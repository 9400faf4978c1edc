"""Training on data past memory: rate and memory under a limit, beside the same without one.

    sudo python scripts/bench_loading.py --folder /tmp/loading --limit-gib 1.5 --times 4

Makes a dataset whose event arrays are `times` the limit, then reads and trains each way in a
process of its own: shuffled over everything or within windows, without a limit and inside a memory
cgroup, where the page cache counts. A limited process begins without its files in the page cache.
Needs root and a cgroup (version 1 or 2) for the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.artifacts import SCHEMA_VERSIONS, write_json
from recsys.data.batches import WINDOW, Batches, PackedBatches, Steps
from recsys.data.dataset import EVENT_ARRAYS, Dataset

READ = ("items", "types", "times")
"""Arrays that training reads; `values` is a hole in its file."""
EVENTS_PER_USER, ITEMS, CHUNK = 100, 2000, 1 << 24
GIB = 1 << 30
CGROUPS = {
    "v1": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    "v2": (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
}
WAYS = {
    "global": ("global", False),
    "windows": ("window", False),
    "windows-limited": ("window", True),
    "global-limited": ("global", True),
}


def make(folder: Path, bytes_: float) -> int:
    """Write a dataset whose arrays take so many bytes; return its events."""
    users = int(bytes_ / sum(np.dtype(EVENT_ARRAYS[n]).itemsize for n in READ) / EVENTS_PER_USER)
    events = users * EVENTS_PER_USER
    (folder / "events").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, dtype in EVENT_ARRAYS.items():
        file = folder / "events" / f"{name}.npy"
        array = np.lib.format.open_memmap(file, "w+", dtype, (events,))
        for first in range(0, events if name in READ else 0, CHUNK):
            array[first : first + CHUNK] = _values(name, rng, first, min(CHUNK, events - first))
        array.flush()
        del array
    np.save(folder / "events" / "offsets.npy", np.arange(users + 1) * EVENTS_PER_USER)
    counts = np.full(ITEMS, events // ITEMS)
    ids = pa.array([f"i{i}" for i in range(ITEMS)])
    pq.write_table(
        pa.table({"item_id": ids, "count": counts, "train_count": counts}), folder / "items.parquet"
    )
    pq.write_table(pa.table({"user_id": pa.array(["u"] * users)}), folder / "users.parquet")
    manifest = {
        "kind": "dataset",
        "schema_version": SCHEMA_VERSIONS["dataset"],
        "name": "loading",
        "num_users": users,
        "num_items": ITEMS,
        "num_events": events,
        "has_time": True,
        "has_values": False,
        "event_types": ["view", "purchase"],
        "split": {"rule": "leave_one_out"},
        "item_features": {},
        "user_features": {},
        "fingerprint": f"loading-{events}",
    }
    write_json(folder / "manifest.json", manifest)
    return events


def _values(name: str, rng: np.random.Generator, first: int, count: int) -> np.ndarray:
    if name == "items":
        return rng.integers(1, ITEMS + 1, count)
    if name == "types":
        return rng.integers(1, 3, count)
    return (first + np.arange(count)) % EVENTS_PER_USER * 3_600_000 + 1_700_000_000_000


def measure(folder: Path, shuffle: str, reads: float, trains: float, size: int) -> None:
    """Read for so many seconds, then train for so many; print each rate as JSON."""
    import torch

    from recsys.data.catalogue import Catalogue
    from recsys.losses import ItemSide, sampled_softmax
    from recsys.models import Trajectory
    from recsys.training.memory import peak_memory_gib

    torch.set_num_threads(1)
    dataset = Dataset(folder)
    began = time.perf_counter()
    kind = "global" if shuffle == "global" else WINDOW
    batches = PackedBatches(dataset, size, seed=1, length=50, shuffle=kind)
    made = epochs(batches)
    next(made)
    found = {"start_seconds": time.perf_counter() - began}
    found["read"] = _rates(lambda: next(made), reads)
    model = Trajectory(Catalogue.of(dataset), max_length=50, dim=16, layers=1, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters())
    share = torch.full((ITEMS + 1,), 1 / ITEMS)

    def step() -> dict[str, torch.Tensor]:
        batch = next(made)
        query_PD, target_P = model.training_pairs(batch)
        side = ItemSide(model.item_vectors, model.vectors_of, share)
        optimizer.zero_grad()
        sampled_softmax(query_PD, target_P, side, negatives=64).backward()
        optimizer.step()
        return batch

    found["train"] = _rates(step, trains)
    print(json.dumps(found | {"peak_gib": peak_memory_gib()}))


def epochs(batches: Batches) -> Iterator[dict[str, Any]]:
    """Yield the batches of one epoch after another, without end."""
    sampler = Steps(batches.steps)
    loader = batches.loader(sampler=sampler)
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from loader


def _rates(step, seconds: float) -> dict[str, list[float]]:
    """Return positions a second in each fifth of the time, and without waiting for a core."""
    rates: dict[str, list[float]] = {"by the clock": [], "with a core of its own": []}
    for _ in range(5):
        began, waited, positions = time.perf_counter(), _waited(), 0
        while time.perf_counter() - began < seconds / 5:
            positions += int((step()["targets"] > 0).sum())
        took = time.perf_counter() - began
        rates["by the clock"].append(round(positions / took))
        rates["with a core of its own"].append(round(positions / (took - _waited() + waited)))
    return rates


def _waited() -> float:
    """Return the seconds that this thread could have run and other processes had the cores."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


@contextmanager
def limited(limit: int | None) -> Iterator[tuple[Path, str] | None]:
    """Yield a memory cgroup, and the file of its use, or None without a limit."""
    if limit is None:
        yield None
        return
    root, most, used = next(c for c in CGROUPS.values() if (c[0] / _first_file(c)).exists())
    group = root / f"recsys-loading-{os.getpid()}"
    group.mkdir()
    (group / most).write_text(str(limit))
    try:
        yield group, used
    finally:
        group.rmdir()


def _first_file(cgroup: tuple[Path, str, str]) -> str:
    return cgroup[1] if cgroup[1] == "memory.limit_in_bytes" else "cgroup.subtree_control"


def run(arguments: argparse.Namespace, shuffle: str, limit: int | None) -> dict:
    """Measure one way in a process of its own; return its figures and the cgroup's largest use."""
    forget = os.POSIX_FADV_DONTNEED if limit else os.POSIX_FADV_WILLNEED
    for file in (arguments.folder / "events").glob("*.npy"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, forget)
    words = ["--measure", shuffle, "--folder", str(arguments.folder)]
    words += ["--reads", str(arguments.reads), "--trains", str(arguments.trains)]
    words += ["--size", str(arguments.size)]
    with limited(limit) as group:
        enter = None
        if group is not None:
            place = group[0] / "cgroup.procs"
            enter = lambda: place.write_text(str(os.getpid()))  # noqa: E731
        process = subprocess.Popen(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, preexec_fn=enter
        )
        used = []
        while process.poll() is None:
            if group is not None:
                used.append(int((group[0] / group[1]).read_text()) / GIB)
            time.sleep(0.5)
        said = process.stdout.read() if process.stdout else ""
    if process.returncode:
        return {"ended with": process.returncode}
    found = json.loads(said.splitlines()[-1])
    return found | ({"cgroup_gib": max(used)} if used else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("loading-bench"))
    parser.add_argument("--limit-gib", type=float, default=1.5)
    parser.add_argument("--times", type=float, default=4, help="arrays, as times of the limit")
    parser.add_argument("--reads", type=float, default=120, help="seconds of reading alone")
    parser.add_argument("--trains", type=float, default=40, help="seconds of training")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--size", type=int, default=128, help="histories a batch")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        times = arguments.reads, arguments.trains
        measure(arguments.folder, arguments.measure, *times, arguments.size)
        return
    limit = int(arguments.limit_gib * GIB)
    try:
        events = make(arguments.folder, limit * arguments.times)
        print(f"{events:,} events, {limit * arguments.times / GIB:.1f} GiB of arrays", flush=True)
        for shuffle, is_limited in (WAYS[name] for name in arguments.ways):
            found = run(arguments, shuffle, limit if is_limited else None)
            where = f"{arguments.limit_gib:g} GiB" if is_limited else "no limit"
            print(f"{shuffle:7} {where:9} {json.dumps(_rounded(found))}", flush=True)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def _rounded(found: dict) -> dict:
    return {k: v if isinstance(v, dict | int) else round(v, 3) for k, v in found.items()}


if __name__ == "__main__":
    main()
