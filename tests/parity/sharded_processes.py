"""Four processes that train sharded tables in groups of two, one and four; run by the test beside.

The first writes what it found into the folder that is named, as JSON.
"""

from __future__ import annotations

import copy
import json
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing import start_processes

from recsys.losses import score, scores, softmax_among
from recsys.models.tables import Sharded, ShardedTable, sharded_tables
from recsys.training.shards import Shards, check_torchrec
from recsys.training.table_file import TableFile

CPU = torch.device("cpu")
ITEMS, USERS, DIM, STEPS, BATCH = 1001, 300, 8, 6, 32
SETTINGS = Sharded(lr=0.1)
LARGE = 1_000_001, 64
MIB = 1 << 20
ROOM = 200 * MIB
"""Beside what a process has: less than the large table, more than half of it."""


class Pairs(nn.Module):
    """Scores items by a user's vector and the mean of a history, mixed by a dense layer."""

    def __init__(self, items: nn.Module, users: nn.Module) -> None:
        super().__init__()
        self.items, self.users, self.mix = items, users, nn.Linear(DIM, DIM)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        query_BD = self.mix(self.items(batch["items"]).mean(1)) + self.users(batch["users"])
        positive_B1 = score(query_BD, self.items(batch["targets"]))
        return softmax_among(positive_B1, scores(query_BD, self.items(batch["drawn"])))


def batch_of(step: int) -> dict[str, Tensor]:
    """A step's whole batch: ids repeat, and histories have padding."""
    rng = torch.Generator().manual_seed(step)
    sizes = {"items": (BATCH, 5), "targets": (BATCH,), "drawn": (64,), "users": (BATCH,)}
    drawn = {n: torch.rand(size, generator=rng) ** 3 for n, size in sizes.items()}
    lowest = {"items": 0, "targets": 1, "drawn": 1, "users": 1}
    rows = {"users": USERS}
    return {n: (d * (rows.get(n, ITEMS) - lowest[n])).long() + lowest[n] for n, d in drawn.items()}


def part(batch: dict[str, Tensor], place: int, parts: int) -> dict[str, Tensor]:
    return {n: b if n == "drawn" else b.chunk(parts)[place] for n, b in batch.items()}


class RowwiseAdagrad:
    """The rule of FBGEMM's EXACT_ROWWISE_ADAGRAD in plain torch: one number a row of state."""

    def __init__(self, tables: list[nn.Embedding]) -> None:
        self.tables = tables
        self.states = [torch.zeros(len(table.weight)) for table in tables]

    @torch.no_grad()
    def step(self) -> None:
        for table, state_N in zip(self.tables, self.states, strict=True):
            state_N += table.weight.grad.square().mean(1)
            rate_N = SETTINGS.lr / (state_N.sqrt() + SETTINGS.eps)
            table.weight -= rate_N[:, None] * table.weight.grad
            table.weight.grad = None


def sharded(group: dist.ProcessGroup, settings: Sharded = SETTINGS) -> tuple[Pairs, Shards]:
    torch.manual_seed(0)
    model = Pairs(settings(ITEMS, DIM), settings(USERS, DIM))
    shards = Shards(sharded_tables(model), settings, CPU, group)
    shards.start(seed=3)
    return model, shards


def train(model: Pairs, shards: Shards, group: dist.ProcessGroup, steps: range) -> Iterator[float]:
    """Train by SGD on the dense part, each process on its share; yield the mean losses."""
    for step in steps:
        batch = part(batch_of(step), dist.get_rank(group), dist.get_world_size(group))
        items = [batch["items"], batch["targets"], batch["drawn"]]
        shards.fetch({"items": items, "users": [batch["users"]]})
        loss = model.loss(batch)
        loss.backward()
        for parameter in model.mix.parameters():
            dist.all_reduce(parameter.grad, group=group)
            parameter.data -= 0.1 * parameter.grad / dist.get_world_size(group)
            parameter.grad = None
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=group)
        yield mean.item() / dist.get_world_size(group)


def train_dense(model: Pairs, rule: RowwiseAdagrad, steps: range) -> Iterator[float]:
    for step in steps:
        loss = model.loss(batch_of(step))
        loss.backward()
        for parameter in model.mix.parameters():
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
        rule.step()
        yield loss.item()


def dense_of(model: Pairs, file: TableFile) -> Pairs:
    """The same model with whole tables that start as the file has them."""
    tables = {}
    for name in ("items", "users"):
        rows = file.rows(name).clone()
        tables[name] = nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=0)
    dense = Pairs(**tables)
    dense.mix = copy.deepcopy(model.mix)
    return dense


def farthest(file: TableFile, dense: Pairs, rule: RowwiseAdagrad) -> float:
    """The largest difference of a vector or a state."""
    expected = {"items": dense.items.weight, "users": dense.users.weight}
    expected |= {"items.momentum1": rule.states[0], "users.momentum1": rule.states[1]}
    return max(float((file.rows(n) - e).abs().max().detach()) for n, e in expected.items())


def parity(folder: Path, pair: dist.ProcessGroup, settings: Sharded) -> dict:
    """Two processes beside one that holds all."""
    model, shards = sharded(pair, settings)
    first, last = folder / f"start-{settings.by}", folder / f"two-{settings.by}"
    shards.save(first)
    dense = dense_of(model, TableFile(first))
    rule = RowwiseAdagrad([dense.items, dense.users])
    dense_losses = list(train_dense(dense, rule, range(STEPS)))
    losses = list(train(model, shards, pair, range(STEPS)))
    shards.save(last)
    torch.save(model.mix.state_dict(), folder / "mix")
    more = list(train(model, shards, pair, range(STEPS, 2 * STEPS)))
    far = farthest(TableFile(last), dense, rule)
    return {"dense": dense_losses, "sharded": losses, "farthest": far, "went_on": more}


def resumed(folder: Path, group: dist.ProcessGroup) -> list[float]:
    """Go on from the checkpoint of two processes in a group of another size."""
    model, shards = sharded(group)
    shards.load(folder / "two-row_wise")
    model.mix.load_state_dict(torch.load(folder / "mix", weights_only=True))
    return list(train(model, shards, group, range(STEPS, 2 * STEPS)))


def limited(pair: dist.ProcessGroup) -> dict:
    """Under a limit of data memory that the large table exceeds, train it whole and sharded."""
    held = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = int(held[1]) * 1024 + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        nn.Embedding(*LARGE)
        whole = "trained"
    except RuntimeError as error:
        whole = str(error)
    table = ShardedTable(*LARGE)
    shards = Shards({"items": table}, SETTINGS, CPU, pair)
    shards.start(seed=1)
    ids = torch.tensor([1, 500_000, LARGE[0] - 1])
    shards.fetch({"items": [ids]})
    before = table(ids).detach().clone()
    table(ids).square().sum().backward()
    shards.fetch({"items": [ids]})
    moved = float((table(ids) - before).abs().min().detach())
    return {"limit": limit, "table": 4 * LARGE[0] * LARGE[1], "whole": whole, "moved": moved}


def main(rank: int, folder: Path) -> None:
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=4)
    found = {}
    one, pair, four = (dist.new_group(list(range(size))) for size in (1, 2, 4))
    if rank < 2:
        for by in ("table_wise", "row_wise"):
            found[by] = parity(folder, pair, Sharded(by=by, lr=SETTINGS.lr))
    dist.barrier()
    found["four"] = resumed(folder, four)
    if rank < 2:
        found["limited"] = limited(pair)
    if rank == 0:
        found["one"] = resumed(folder, one)
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    check_torchrec()  # imported once, before the processes part
    start_processes(main, (Path(sys.argv[1]),), nprocs=4, start_method="fork")
