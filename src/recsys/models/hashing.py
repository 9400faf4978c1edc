"""Tables in which ids share rows: for more ids than there is memory, or ids that go on coming.

Shapes: N ids with padding at 0, K hashes, D dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recsys.schema import InputError

PRIME = (1 << 31) - 1
"""Products of two numbers below it fit int64, in torch and in an ONNX graph alike."""
FACTORS = (
    *(1826701614, 1367864807, 1097657232, 579362556),
    *(661058652, 87989973, 161576975, 35492827),
)
SHIFTS = (
    *(376383646, 1746484539, 1394609702, 1960127675),
    *(1081530687, 1302740408, 2084654369, 1566581935),
)
"""Drawn once: a trained table means nothing with others."""


@dataclass(frozen=True)
class Hashed:
    """Makes tables of `rows` rows, of which each id's vector is the sum of `hashes`.

    With two hashes nearly every id has a vector of its own where many share each row. A dataset may
    grow by any number of ids: the table stays. Source: Serrà and Karatzoglou 2017, Getting Deep
    Recommenders Fit: Bloom Embeddings, section 3.
    """

    rows: int = 1_000_000
    hashes: int = 2

    def __post_init__(self) -> None:
        if not 2 <= self.rows < PRIME:
            raise InputError(f"embedding.rows={self.rows}: expected 2 to {PRIME - 1:,}")
        if not 1 <= self.hashes <= len(FACTORS):
            raise InputError(f"embedding.hashes={self.hashes}: expected 1 to {len(FACTORS)}")

    def __call__(self, ids: int, dim: int) -> HashedTable:
        """Return a table for so many ids, padding included."""
        return HashedTable(ids, dim, self.rows, self.hashes)


class HashedTable(nn.Module):
    """Looks up the sum of an id's rows, as `nn.Embedding` looks up its one; id 0 is padding.

    Where the rows are follows from the id alone: not from the seed, the number of ids, or the
    process.

    >>> table = HashedTable(1_000, 4, rows=10, hashes=2)
    >>> table.weight.shape, int(table.weight[0].count_nonzero())
    (torch.Size([1000, 4]), 0)
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, rows: int, hashes: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.rows, self.hashes = nn.Embedding(rows, embedding_dim), hashes

    @property
    def weight(self) -> Tensor:
        """Return every id's vector: [N, D]."""
        return self(torch.arange(self.num_embeddings, device=self.rows.weight.device))

    def places(self, ids: Tensor) -> Tensor:
        """Return the rows of ids [...], by universal hashing: int64 [..., K].

        Source: Carter and Wegman 1979, Universal Classes of Hash Functions, section 3.
        """
        each = list(zip(FACTORS, SHIFTS, strict=True))[: self.hashes]
        mixed = [
            (ids * factor + shift) % PRIME % self.rows.num_embeddings for factor, shift in each
        ]
        return torch.stack(mixed, dim=-1)

    def forward(self, ids: Tensor) -> Tensor:
        """Return vectors [..., D] of ids [...]."""
        vectors = self.rows(self.places(ids)).sum(dim=-2)
        return vectors * (ids > 0).unsqueeze(-1)


@dataclass(frozen=True)
class Collisions:
    """How a table's ids share its rows.

    crowd: ids of the fullest row; twins: ids that share all their rows with another id, so that
    nothing tells these apart.
    """

    ids: int
    rows: int
    crowd: int
    twins: int

    @classmethod
    def of(cls, table: HashedTable) -> Collisions:
        """Count them."""
        places_NK = table.places(torch.arange(1, table.num_embeddings)).sort(dim=1).values.numpy()
        rows = table.rows.num_embeddings
        crowd = np.bincount(places_NK.ravel(), minlength=rows).max()
        _, count = np.unique(places_NK, axis=0, return_counts=True)
        twins = count[count > 1].sum()
        return cls(len(places_NK), rows, int(crowd), int(twins))

    def __str__(self) -> str:
        return (
            f"{self.ids:,} ids share {self.rows:,} rows, at most {self.crowd:,} one of them; "
            f"{self.twins:,} share all their rows with another"
        )


def collisions(model: nn.Module) -> dict[str, Collisions]:
    """Return how ids collide in each hashed table of a model, by the table's name."""
    parts = model.named_modules()
    return {name: Collisions.of(part) for name, part in parts if isinstance(part, HashedTable)}
