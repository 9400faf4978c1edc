"""Tables of one vector an id: whole in every process, or cut over the processes of a training.

Shapes: N rows with padding at 0, U distinct ids of a step, D dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.models.hashing import HashedTable
from recsys.schema import InputError

Cut = Literal["row_wise", "table_wise"]
Rule = Literal["rowwise_adagrad", "adagrad"]


def whole(rows: int, dim: int) -> nn.Embedding:
    """Return a table that every process holds whole, trained by the optimizer of the rest."""
    return nn.Embedding(rows, dim, padding_idx=0)


@dataclass(frozen=True)
class Sharded:
    """Makes tables that are cut over the processes of trainer=ddp, see `recsys.training.sharded`.

    by: `row_wise` gives each process an equal run of each table's rows, `table_wise` whole tables
    in turn. optimizer: the rule that the backward pass applies to them, with its own `lr`; row-wise
    Adagrad keeps one number of state a row, Adagrad one a weight.
    """

    by: Cut = "row_wise"
    optimizer: Rule = "rowwise_adagrad"
    lr: float = 0.02
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name, met, known in (("by", self.by, Cut), ("optimizer", self.optimizer, Rule)):
            if met not in get_args(known):
                expected = " or ".join(get_args(known))
                raise InputError(f"embedding.{name}={met}: expected {expected}")
        if not (self.lr > 0 and self.eps > 0):
            raise InputError(f"embedding.lr={self.lr}, eps={self.eps}: expected numbers above 0")

    def __call__(self, rows: int, dim: int) -> ShardedTable:
        """Return a table without vectors of its own."""
        if dim % 4:
            fitting = 4 * (dim // 4 + 1)
            raise InputError(f"model.dim={dim}: embedding=sharded takes 4, 8, …; use {fitting}")
        return ShardedTable(rows, dim)


class ShardedTable(nn.Module):
    """Looks up vectors that are held elsewhere, as `nn.Embedding` does with padding at 0.

    In training it answers from the rows that were fetched for a step, so that all look-ups of a
    step are one exchange between processes and one update; else from the table that it reads.
    """

    weight: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.fetched: tuple[Tensor, Tensor] | None = None
        # A buffer, so that the ONNX graph holds it; not in a checkpoint, which names its file.
        self.register_buffer("weight", None, persistent=False)

    def fetch(self, ids_U: Tensor, rows_UD: Tensor) -> None:
        """Answer from these rows; `ids_U` is sorted, without repeats, and begins with 0."""
        self.fetched = ids_U, rows_UD

    def close(self) -> None:
        """Let go of the table that was read: DDP would send it to all, as it does buffers."""
        self.weight = None  # type: ignore[assignment]

    def read(self, weight_ND: Tensor) -> None:
        """Answer from a whole table, such as one mapped from a file."""
        expected = (self.num_embeddings, self.embedding_dim)
        if tuple(weight_ND.shape) != expected:
            raise InputError(f"a table of {tuple(weight_ND.shape)}, expected {expected}")
        self.fetched, self.weight = None, weight_ND

    def forward(self, ids: Tensor) -> Tensor:
        """Return vectors [..., D] of ids [...]; padding has no gradient."""
        if self.fetched is None:
            return F.embedding(ids, self.weight)
        ids_U, rows_UD = self.fetched
        return F.embedding(torch.searchsorted(ids_U, ids), rows_UD, padding_idx=0)


MakeTable = Callable[[int, int], nn.Embedding | ShardedTable | HashedTable]
"""Of so many rows, of vectors so wide."""


def sharded_tables(model: nn.Module) -> dict[str, ShardedTable]:
    """Return a model's sharded tables by their names in it."""
    return {name: part for name, part in model.named_modules() if isinstance(part, ShardedTable)}
