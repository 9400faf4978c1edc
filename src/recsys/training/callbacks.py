"""What happens around the steps: validation each epoch, checkpoints, and what a person sees."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    TQDMProgressBar,
)

from recsys.data.dataset import Dataset
from recsys.evaluation.protocol import evaluate
from recsys.evaluation.scorers import ModelScorer
from recsys.schema import InputError
from recsys.training.checkpoints import Bookmark
from recsys.training.memory import peak_memory_gib

EPOCH_KS = (10, 20, 100)
"""Cut-offs of each epoch's figures; the test at the end has all."""

AVERAGED_STEPS = 8
"""The average of weights takes up every eighth step's: near the same, and seldom felt."""


class Validation(Callback):
    """Measures the validation part after each epoch, and logs and prints the epoch's figures.

    `history` holds one dict of figures an epoch and travels in the checkpoint. Where weights are
    averaged, `averaging` lends the average for measuring. `monitor` names what training maximises,
    the first of `shown`.
    """

    shown: tuple[str, ...]

    def __init__(self, averaging: Callback | None = None) -> None:
        self.averaging = averaging
        self.history: list[dict[str, float]] = []

    @property
    def monitor(self) -> str:
        """The figure that the best epoch has most of."""
        return f"validation/{self.shown[0]}"

    def measure(self, module: Any) -> dict[str, float]:
        """Return validation metrics of the module's weights as they are."""
        raise NotImplementedError

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Log before checkpoints and early stopping look: Lightning calls those last."""
        trained = time.perf_counter()
        figures = {
            "train/loss": module.mean_loss,
            "train/positions_per_second": module.rate,
            "train/seconds": trained - module.started,
            "train/peak_memory_gib": peak_memory_gib(),
        }
        if self.averaging:
            self.averaging.on_validation_epoch_start(trainer, module)
        module.before_validation()
        module.model.eval()
        figures |= {f"validation/{k}": v for k, v in self.measure(module).items()}
        module.model.train()
        if self.averaging:
            self.averaging.on_validation_epoch_end(trainer, module)
        figures["validation/seconds"] = time.perf_counter() - trained
        self.history.append({"epoch": trainer.current_epoch, **figures})
        module.log_dict({k: torch.tensor(v, dtype=torch.float64) for k, v in figures.items()})
        print(self._line(trainer, figures), file=sys.stderr, flush=True)

    def _line(self, trainer: pl.Trainer, figures: dict[str, float]) -> str:
        shown = "  ".join(f"{name} {figures[f'validation/{name}']:.4f}" for name in self.shown)
        return (
            f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
            f"  loss {figures['train/loss']:.4f}"
            f"  validation {shown}"
            f"  {figures['train/positions_per_second']:,.0f} positions/s"
        )

    def best(self) -> dict[str, float]:
        """Return the best epoch's validation figures, and which epoch it was."""
        best = max(self.history, key=lambda figures: figures[self.monitor])
        named = {k.removeprefix("validation/"): v for k, v in best.items() if "validation/" in k}
        return named | {"epoch": best["epoch"]}

    @property
    def reached(self) -> float:
        """The best epoch's figure that training maximises."""
        return self.best()[self.shown[0]]

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs' figures."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the epochs' figures up again."""
        self.history = state_dict["history"]


class FullRanking(Validation):
    """Ranks all items for the validation part's users."""

    shown = ("ndcg@10", "recall@10")

    def __init__(
        self, dataset: Dataset, exclude_seen: bool, averaging: Callback | None = None
    ) -> None:
        super().__init__(averaging)
        self.dataset, self.exclude_seen = dataset, exclude_seen

    def measure(self, module: Any) -> dict[str, float]:
        """Return recall, NDCG and MRR."""
        scorer = ModelScorer(module.model, module.device)
        result = evaluate(
            self.dataset,
            scorer,
            "validation",
            exclude_seen=self.exclude_seen,
            ks=EPOCH_KS,
            details=False,
            shared=True,
        )
        return {name: value for name, value in result.metrics.items() if "/" not in name}


def averaged(epochs: float | None, steps: int) -> EMAWeightAveraging | None:
    """Return the exponential moving average of weights that reaches back so many epochs, or None.

    An epoch has `steps`. Counted in epochs, it lags as far behind on small data as on large.
    """
    if epochs is None:
        return None
    if not epochs > 0:
        raise InputError(f"averaging={epochs}: expected a number of epochs above 0, or null")
    every = min(AVERAGED_STEPS, steps)
    decay = math.exp(-every / (epochs * steps))
    return EMAWeightAveraging(use_buffers=False, decay=decay, update_every_n_steps=every)


def callbacks(
    folder: Path, validation: Validation, bookmark: Bookmark, patience: int | None
) -> list[Callback]:
    """Return validation, checkpoints (best and last), early stopping and a bar on a terminal."""
    checkpoint = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor=validation.monitor,
        mode="max",
        save_last=True,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    wanted: list[Callback] = [validation, bookmark, checkpoint]
    if validation.averaging:
        wanted.insert(0, validation.averaging)
    if patience:
        stopping = EarlyStopping(
            validation.monitor, mode="max", patience=patience, check_on_train_epoch_end=True
        )
        wanted.append(stopping)
    if sys.stderr.isatty():
        wanted.append(TQDMProgressBar(refresh_rate=10))
    return wanted
