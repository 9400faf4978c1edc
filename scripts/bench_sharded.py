"""Memory and time of one table of ids: whole under Adam, and cut over processes by TorchRec.

A step looks up `--ids` ids, drawn as a popular head has it, and updates their rows. Each system has
its own processes; memory is what the fullest of them came to have beyond what it began with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import start_processes

from recsys.models.tables import Sharded, ShardedTable
from recsys.training.memory import peak_memory_gib
from recsys.training.shards import Shards, check_torchrec

Step = Callable[[torch.Tensor], None]


def whole(rows: int, dim: int) -> Step:
    """An embedding with Adam, as embedding=dense trains it."""
    table = nn.Embedding(rows, dim)
    adam = torch.optim.Adam(table.parameters(), fused=True)

    def step(ids: torch.Tensor) -> None:
        table(ids).square().sum().backward()
        adam.step()
        adam.zero_grad()

    return step


def sharded(rows: int, dim: int) -> Step:
    """A part of the table in each process."""
    table = ShardedTable(rows, dim)
    shards = Shards({"items": table}, Sharded(), torch.device("cpu"))
    shards.start(seed=1)

    def step(ids: torch.Tensor) -> None:
        shards.fetch({"items": [ids]})
        table(ids).square().sum().backward()

    return step


def measure(rank: int, world: int, name: str, asked: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    before, started = peak_memory_gib(), time.perf_counter()
    step = {"whole": whole, "sharded": sharded}[name](asked.rows, asked.dim)
    made, seconds = time.perf_counter() - started, []
    generator = torch.Generator().manual_seed(rank)
    for _ in range(asked.steps):
        place = torch.rand(asked.ids // world, generator=generator) ** 4
        ids = 1 + (place * (asked.rows - 1)).long()
        started = time.perf_counter()
        step(ids)
        seconds.append(time.perf_counter() - started)
    held = torch.tensor(peak_memory_gib() - before)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    found = {"system": name, "processes": world, "seconds to make": round(made, 1)}
    found |= {"ms a step": round(1e3 * statistics.median(seconds), 1), "GiB": round(held.item(), 2)}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ids", type=int, default=20_000, help="ids of a step, of all processes")
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args()
    check_torchrec()
    for name, world in (("whole", 1), ("sharded", 1), ("sharded", 2), ("sharded", 4)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            words = (world, name, asked, folder)
            start_processes(measure, words, nprocs=world, start_method="fork")
            print((folder / "found.json").read_text(), flush=True)


if __name__ == "__main__":
    main()
