"""RecTools: `SASRecModel.fit`, stopped by the clock, and `recommend` with viewed items filtered."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from protocol import TOP, Ints, Meter, Sequences, Settings
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

LOSSES = {"full_softmax": "softmax", "sampled_softmax": "sampled_softmax"}


def dataset(sequences: Sequences, held: int) -> Dataset:
    """Return all events but the last `held` of each user; their places stand for dates."""
    flat = sequences.flat(held)
    dates = pd.Timestamp("2000-01-01") + pd.to_timedelta(flat["places"], unit="s")
    columns = {Columns.User: flat["users"], Columns.Item: flat["items"], Columns.Datetime: dates}
    return Dataset.construct(pd.DataFrame({**columns, Columns.Weight: 1.0}))


class Clock(Callback):
    """Tells the meter of each step and stops the trainer when time is up."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __deepcopy__(self, memo: Any) -> Clock:
        # RecTools copies its trainer before it fits.
        return self

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, at: int):
        trainer.should_stop = not self.meter.step(int((batch["y"] != 0).sum()))


def model_of(settings: Settings) -> SASRecModel:
    return SASRecModel(
        n_blocks=settings.layers,
        n_heads=settings.heads,
        n_factors=settings.dim,
        dropout_rate=settings.dropout,
        session_max_len=settings.length,
        batch_size=settings.batch,
        loss=LOSSES[settings.loss],
        n_negatives=settings.negatives,
        lr=settings.lr,
    )


def rank(model: SASRecModel, history: Dataset, tested: Ints) -> Ints:
    """Return lists_QK by the library's own recommendation, then go on training."""
    model.is_fitted = True
    found = model.recommend(
        users=tested, dataset=history, k=TOP, filter_viewed=True, on_unsupported_targets="warn"
    )
    model.torch_model.train()
    lists_UK = np.zeros((int(tested.max()) + 1, TOP), np.int64)
    lists_UK[found[Columns.User], found[Columns.Rank] - 1] = found[Columns.Item]
    return lists_UK[tested]


def main() -> None:
    warnings.filterwarnings("ignore")
    settings = Settings.given()
    torch.set_num_threads(settings.threads)
    seed_everything(settings.seed)
    sequences = Sequences.load(settings.data)
    model, history = model_of(settings), dataset(sequences, held=1)
    meter = Meter(settings, lambda: rank(model, history, sequences.tested))
    model._trainer = Trainer(
        max_epochs=1_000_000,
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,
        callbacks=[Clock(meter)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.fit(dataset(sequences, held=2))
    device = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    positions = sequences.positions(settings.length)
    print(json.dumps(meter.result(positions, peak_device_gib=device)))


if __name__ == "__main__":
    main()
