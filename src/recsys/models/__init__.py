"""Plain modules that turn a history into query vectors; each is one module and one YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from recsys.models.ranker import Calibrated, Ranker
from recsys.models.trajectory import Trajectory
from recsys.models.two_tower import TwoTower

__all__ = ["Calibrated", "Ranker", "Retriever", "Trajectory", "TwoTower"]


class Retriever(Protocol):
    """What training, evaluation and export ask of a model."""

    layout: str
    """Which batches train it: `packed` rows or `pairs` of history and target."""
    inputs: tuple[str, ...]
    """Arrays that `forward` reads, in order: names of `history.encode`'s result, or `users`."""
    max_length: int

    def forward(self, *arrays: Tensor) -> Tensor:
        """Return queries_BHD for right-padded histories."""

    def training_pairs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return query_PD and target_P of a training batch."""

    def item_vectors(self) -> Tensor:
        """Return vectors_ND [N + 1, D]; row 0 is padding."""

    def vectors_of(self, items: Tensor) -> Tensor:
        """Return vectors [..., D] of item indices [...]."""
