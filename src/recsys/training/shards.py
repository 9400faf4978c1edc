"""Training tables that no process holds whole: TorchRec looks rows up and updates them in place.

Shapes: N rows of a table, U distinct ids of a step, D dim. Every process calls these in step with
the others. Source: Ivchenko et al. 2022 (TorchRec).
"""

from __future__ import annotations

import importlib
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from recsys.models.tables import Sharded, ShardedTable
from recsys.schema import InputError
from recsys.training.start import SPREAD
from recsys.training.table_file import TableFile, read_tables

PINS = {"2.13": "1.8.0"}
"""TorchRec and FBGEMM that load on a torch; others fail with missing symbols."""
BESIDE = ("tensordict", "pyre-extensions")
"""What TorchRec imports; its own list of requirements would bring a CUDA build of FBGEMM."""
CHUNK = 1 << 14
"""Rows that one seed draws."""
STATE = "momentum1"
STATE_DIMENSIONS = {"rowwise_adagrad": 1, "adagrad": 2}
PREFIX = "table_"
"""Of names inside TorchRec, where a table cannot be called `items`."""


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a tensor [N, …] that this process holds."""

    name: str
    first: int
    values: Tensor


class Shards:
    """This process's part of some tables, with the state of the rule that trains them."""

    def __init__(
        self,
        tables: Mapping[str, ShardedTable],
        settings: Sharded,
        device: torch.device,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        check_torchrec()
        self.tables, self.settings, self.device = dict(tables), settings, device
        # A group of its own: DDP's exchanges run at the same time as those of a backward pass.
        self.group = group or distributed.new_group()
        self.collection = self._sharded()

    def _sharded(self) -> Any:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec import EmbeddingCollection, EmbeddingConfig
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.types import ShardingEnv

        configs = [
            EmbeddingConfig(
                name=_inner(name),
                feature_names=[name],
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
            )
            for name, table in self.tables.items()
        ]
        whole = EmbeddingCollection(device=torch.device("meta"), tables=configs)
        rule = getattr(EmbOptimType, f"EXACT_{self.settings.optimizer.upper()}")
        fused = {"optimizer": rule, "learning_rate": self.settings.lr, "eps": self.settings.eps}
        sharder = EmbeddingCollectionSharder(fused_params=fused)
        env = ShardingEnv.from_process_group(self.group)
        plan = _plan(whole, sharder, self.settings, env.world_size, self.device.type)
        return sharder.shard(whole, plan, env, self.device)

    def start(self, seed: int) -> None:
        """Draw the vectors; a row's are the same however many processes there are."""
        for rows in self.weights():
            for at in range(0, len(rows.values), CHUNK):
                some = rows.values[at : at + CHUNK]
                some.copy_(_drawn(seed, rows.name, rows.first + at, len(some), some.shape[1]))

    def fetch(self, ids: Mapping[str, Sequence[Tensor]]) -> None:
        """Look all ids of a step up at once; the backward pass then updates each row once."""
        from torchrec import KeyedJaggedTensor

        padding = torch.zeros(1, dtype=torch.int64, device=self.device)
        distinct = [
            torch.cat([padding, *(i.flatten() for i in ids[name])]).unique() for name in self.tables
        ]
        lengths = torch.tensor([len(ids_U) for ids_U in distinct], device=self.device)
        asked = KeyedJaggedTensor(list(self.tables), torch.cat(distinct), lengths=lengths)
        found = self.collection(asked)
        for (name, table), ids_U in zip(self.tables.items(), distinct, strict=True):
            table.fetch(ids_U, found[name].values())

    def save(self, path: Path) -> None:
        """Write the tables and the state of their rule as one file, whole or not at all."""
        scratch = path.with_name(".tables.unfinished")
        mine = list(self.rows())
        if distributed.get_rank(self.group) == 0:
            TableFile.create(scratch, self._shapes)
        distributed.barrier(self.group)
        for rows in mine:
            TableFile(scratch).write(rows.name, rows.first, rows.values)
        distributed.barrier(self.group)
        if distributed.get_rank(self.group) == 0:
            scratch.replace(path)
        distributed.barrier(self.group)

    def load(self, path: Path) -> None:
        """Take this process's rows from a file, however many processes wrote it."""
        file = TableFile(path)
        if file.shapes != self._shapes:
            raise InputError(
                f"{path} holds {file.shapes}, this training {self._shapes}; resume with the "
                "dataset and settings that it was trained with"
            )
        for rows in self.rows():
            last = rows.first + len(rows.values)
            rows.values.copy_(file.rows(rows.name)[rows.first : last])

    def read(self, path: Path) -> None:
        """Let the tables answer from a file, so that evaluation needs no exchange."""
        read_tables(self.tables, path)

    def weights(self) -> Iterator[Rows]:
        """Return the vectors that this process holds."""
        for key, tensor in self.collection.state_dict().items():
            yield from _rows(_outer(key.split(".")[1]), tensor)

    def rows(self) -> Iterator[Rows]:
        """Return the vectors that this process holds, and their rule's state."""
        yield from self.weights()
        for entries in self.collection.fused_optimizer.state_dict()["state"].values():
            for key, tensor in entries.items():
                yield from _rows(_outer(key), tensor)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole tensors' shapes by name."""
        tables = self.tables.items()
        vectors = {name: (t.num_embeddings, t.embedding_dim) for name, t in tables}
        depth = STATE_DIMENSIONS[self.settings.optimizer]
        return vectors | {f"{name}.{STATE}": shape[:depth] for name, shape in vectors.items()}


def _rows(name: str, tensor: Any) -> Iterator[Rows]:
    for shard in tensor.local_shards():
        yield Rows(name, shard.metadata.shard_offsets[0], shard.tensor)


def _drawn(seed: int, name: str, first: int, count: int, dim: int) -> Tensor:
    """Return the first vectors of neighbouring rows [count, D], drawn in runs of `CHUNK` rows."""
    runs = []
    for run in range(first // CHUNK, (first + count - 1) // CHUNK + 1):
        drawn = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{run}".encode()))
        runs.append(torch.empty(CHUNK, dim).normal_(std=SPREAD, generator=drawn))
    offset = first % CHUNK
    vectors = torch.cat(runs)[offset : offset + count]
    vectors[: max(0, 1 - first)] = 0  # padding
    return vectors


def _plan(whole: Any, sharder: Any, settings: Sharded, world: int, device: str) -> Any:
    from torchrec.distributed.sharding_plan import (
        construct_module_sharding_plan,
        row_wise,
        table_wise,
    )

    kernel = {"compute_kernel": "fused"}
    cuts = {
        config.name: row_wise(**kernel)
        if settings.by == "row_wise"
        else table_wise(rank=place % world, **kernel)
        for place, config in enumerate(whole.embedding_configs())
    }
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return construct_module_sharding_plan(whole, cuts, sharder, local, world, device)


def check_torchrec() -> None:
    """Raise InputError where TorchRec is missing, does not fit torch, or does not load."""
    torch_version = torch.__version__.split("+")[0]
    fbgemm = "fbgemm-gpu" if torch.version.cuda else "fbgemm-gpu-cpu"
    pin = PINS.get(torch_version.rpartition(".")[0])
    if pin is None:
        raise InputError(
            f"embedding=sharded is tried with torch {', '.join(PINS)} alone, this is torch "
            f"{torch_version}; use embedding=dense, or install torch {max(PINS)}"
        )
    found = {name: _version(name) for name in ("torchrec", fbgemm)}
    problem = _load_problem() if all(there == pin for there in found.values()) else ""
    if problem is not None:
        there = ", ".join(f"{name} {met or 'not installed'}" for name, met in found.items())
        raise InputError(
            f"embedding=sharded on torch {torch_version} needs torchrec {pin} and {fbgemm} {pin}; "
            f"found {there}{problem}. Type\n"
            f"  pip install {fbgemm}=={pin} {' '.join(BESIDE)}\n"
            f"  pip install --no-deps torchrec=={pin}"
        )


def _version(package: str) -> str | None:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def _load_problem() -> str | None:
    # It names what it leaves alone, on every import.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        importlib.import_module("torchrec.distributed.embedding")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f", which do not load ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def _inner(name: str) -> str:
    return f"{PREFIX}{name}"


def _outer(key: str) -> str:
    return key.removeprefix(PREFIX)
