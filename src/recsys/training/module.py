"""The Lightning module around any retriever: encode, score, loss, log.

Shapes: P supervised positions, D dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from recsys.losses import ItemSide

Loss = Callable[[Tensor, Tensor, ItemSide], Tensor]
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


class RetrieverModule(pl.LightningModule):
    """Trains a `recsys.models.Retriever`; `train_count` [N + 1] counts each item's events.

    Randomness is a function of (seed, step), so a resumed run draws what an uninterrupted one does.
    """

    total_loss: Tensor

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: OptimizerFactory,
        train_count: Tensor,
        seed: int,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.make_optimizer, self.seed = model, loss, optimizer, seed
        share = train_count.float() / train_count.sum().clamp(min=1)
        self.register_buffer("share", share, persistent=False)

    def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the mean loss over the batch's supervised positions."""
        query_PD, target_P = self.model.training_pairs(batch)  # type: ignore[operator]
        loss = self.loss(query_PD, target_P, self.item_side)
        self.count(loss, len(target_P))
        self.log("train/step_loss", loss)
        self.log("positions/s", self.rate, prog_bar=True, logger=False)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer over all parameters."""
        return self.make_optimizer(self.model.parameters())

    @property
    def item_side(self) -> ItemSide:
        """The item side as the loss sees it."""
        return ItemSide(self.model.item_vectors, self.model.vectors_of, self.share)  # type: ignore

    @property
    def rate(self) -> float:
        """Supervised positions a second since the epoch began."""
        return self.positions / max(1e-9, time.perf_counter() - self.started)

    @property
    def mean_loss(self) -> float:
        """Mean loss over the epoch's positions so far."""
        return float(self.total_loss) / max(1, self.positions)

    def count(self, loss: Tensor, positions: int) -> None:
        """Add a step to the epoch's figures."""
        self.positions += positions
        self.total_loss = self.total_loss + loss.detach().double() * positions

    def on_train_epoch_start(self) -> None:
        """Start counting."""
        self.go_on(positions=0, total_loss=0.0, seconds=0.0)

    def go_on(self, positions: int, total_loss: float, seconds: float) -> None:
        """Count on from an epoch's figures so far; the first loss brings its device."""
        self.positions, self.started = positions, time.perf_counter() - seconds
        self.total_loss = torch.tensor(total_loss, dtype=torch.float64)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the epoch's figures so far."""
        checkpoint["epoch_so_far"] = {
            "positions": self.positions,
            "total_loss": float(self.total_loss),
            "seconds": time.perf_counter() - self.started,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the epoch's figures up again; the time since that checkpoint is not counted."""
        self.go_on(**checkpoint["epoch_so_far"])

    def on_train_batch_start(self, batch: dict[str, Tensor], step: int) -> None:
        """Seed this step's dropout and negatives."""
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)
