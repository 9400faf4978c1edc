"""The Lightning modules: encode, score, loss, log.

Shapes: P supervised positions, D dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from recsys import peers
from recsys.data.batches import IDLE
from recsys.losses import ItemSide, contrastive
from recsys.optimizers import LazyAdam
from recsys.schema import EVENT_TYPES, InputError, type_code

Loss = Callable[..., Tensor]
BAR_STEPS = 10
"""Steps between two readings of the rate on a terminal."""
RANK_SEEDS = 1 << 40
"""Distance between the seeds of two processes in one step."""
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer, int], LRScheduler]


@dataclass(frozen=True)
class Objective:
    """What a training wants beside the next item.

    contrastive: weight of `losses.contrastive` between two readings of each path, which differ by
    dropout. type_weights: what each event type weighs as a target, by name; 1 where not named.
    """

    contrastive: float = 0.0
    type_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, weight in (self.type_weights or {}).items():
            type_code(name)
            if weight < 0:
                raise InputError(f"objective.type_weights.{name}={weight}: expected 0 or more")

    def weights(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return each supervised position's weight [P], None where all are 1.

        Their mean over the positions of all processes is 1.
        """
        if not self.type_weights:
            return None
        targets = batch["targets"]
        table = torch.ones(len(EVENT_TYPES) + 1, device=targets.device)
        for name, weight in self.type_weights.items():
            table[type_code(name)] = weight
        weight_P = table[batch["target_types"][targets > 0]]
        mine_P = weight_P[:0] if IDLE in batch else weight_P
        sums = peers.total(torch.stack([mine_P.sum(), mine_P.new_tensor(len(mine_P))]))
        return weight_P / (sums[0] / sums[1]).clamp(min=1e-6)


class SeededModule(pl.LightningModule):
    """Counts, shows and seeds the steps of a training, whatever it trains.

    Randomness is a function of (seed, step), so a resumed run draws what an uninterrupted one does.
    Where several processes train, each has dropout of its own, and they draw the same negatives;
    the loss of a step in one of them is such that the mean over all is the batch's.
    """

    total_loss: Tensor
    schedule: Schedule | None = None
    """How the learning rate moves, given the optimizer and the number of steps."""

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory, seed: int) -> None:
        super().__init__()
        self.model, self.make_optimizer, self.seed = model, optimizer, seed
        self.negatives = torch.Generator()

    def show(self, loss: Tensor, step: int) -> None:
        """Log and show where it is due only: Lightning takes a millisecond for each value."""
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/step_loss", peers.average(loss.detach()))
            if self.schedule is not None:
                self.log("train/rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        if step % BAR_STEPS == 0 and self.trainer.progress_bar_callback:
            self.log("positions/s", self.rate, prog_bar=True, logger=False)

    def configure_optimizers(self) -> Any:
        """Return the optimizer over all parameters, and how its rate moves, step by step."""
        optimizer = self.make_optimizer(self.parameters())
        if isinstance(optimizer, LazyAdam):
            optimizer.prepare(self.model)
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    @property
    def rate(self) -> float:
        """Supervised positions a second since the epoch began."""
        return self.positions / max(1e-9, time.perf_counter() - self.started)

    @property
    def mean_loss(self) -> float:
        """Mean loss over the epoch's positions so far; all processes ask for it together."""
        return float(peers.average(self.total_loss)) / max(1, self.positions)

    def of_all(self, batch: Mapping[str, Tensor], count: int) -> tuple[int, int]:
        """Return how much this process has of a step that counts so many, and all together."""
        mine = 0 if IDLE in batch else count
        return mine, peers.number(mine)

    def count(self, loss: Tensor, positions: int) -> None:
        """Add a step with so many positions in all processes to the epoch's figures."""
        self.positions += positions
        self.total_loss = torch.add(self.total_loss, loss.detach(), alpha=positions)

    def on_train_epoch_start(self) -> None:
        """Start counting."""
        self.go_on(positions=0, total_loss=0.0, seconds=0.0)

    def before_validation(self) -> None:
        """Make ready, in all processes, what the model is read from; most need nothing."""

    def go_on(self, positions: int, total_loss: float, seconds: float) -> None:
        """Count on from an epoch's figures so far; the first loss brings its device."""
        self.positions, self.started = positions, time.perf_counter() - seconds
        self.total_loss = torch.tensor(total_loss, dtype=torch.float64)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the epoch's figures so far."""
        checkpoint["epoch_so_far"] = {
            "positions": self.positions,
            "total_loss": float(peers.average(self.total_loss)),
            "seconds": time.perf_counter() - self.started,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the epoch's figures up again; the time since that checkpoint is not counted."""
        self.go_on(**checkpoint["epoch_so_far"])

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Copy a batch to the device; on a CPU it is there."""
        if device.type == "cpu":
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_train_batch_start(self, batch: dict[str, Tensor], step: int) -> None:
        """Seed this step's dropout and negatives."""
        seed = self.seed * 1_000_003 + self.global_step
        own = seed + peers.rank() * RANK_SEEDS
        torch.default_generator.manual_seed(own)  # a tenth of the time of torch.manual_seed
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(own)
        self.negatives.manual_seed(seed)


class RetrieverModule(SeededModule):
    """Trains a `recsys.models.Retriever`; `train_count` [N + 1] counts each item's events."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: OptimizerFactory,
        train_count: Tensor,
        seed: int,
        objective: Objective | None = None,
    ) -> None:
        super().__init__(model, optimizer, seed)
        self.objective, self.loss = objective or Objective(), loss
        share = train_count.float() / train_count.sum().clamp(min=1)
        self.register_buffer("share", share, persistent=False)

    def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the mean loss over the batch's supervised positions."""
        query_PD, target_P = self.model.training_pairs(batch)  # type: ignore[operator]
        weight_P = self.objective.weights(batch)
        loss = self.loss(query_PD, target_P, self.item_side(batch), weight_P=weight_P)
        if self.objective.contrastive:
            again_PD, _ = self.model.training_pairs(batch)  # type: ignore[operator]
            loss = loss + self.objective.contrastive * contrastive(query_PD, again_PD, target_P)
        mine, everyone = self.of_all(batch, len(target_P))
        if peers.world() > 1:
            loss = loss * (mine * peers.world() / max(1, everyone))
        self.count(loss, everyone)
        self.show(loss, step)
        return loss

    def item_side(self, batch: Mapping[str, Tensor]) -> ItemSide:
        """Return the item side as the loss sees it."""

        def gather(target_P: Tensor) -> tuple[Tensor, int]:
            parts = peers.gathered(target_P[:0] if IDLE in batch else target_P)
            return torch.cat(parts), sum(len(part) for part in parts[: peers.rank()])

        of, every = self.model.vectors_of, self.model.item_vectors
        return ItemSide(every, of, self.share, self.negatives, gather)  # type: ignore[arg-type]
