"""Batches that alternate a Lightning training with a bare loop over the same model and batches.

`recsys train batches._target_=alternating.AlternatingBatches`: Lightning asks for one batch after
another; between two blocks of `block` steps the bare loop takes the same steps on a model of its
own, in the same process. A line a pair goes to `pairs.jsonl` in the run: seconds and positions.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from hydra.utils import instantiate
from torch import Tensor

from recsys.data.batches import PackedBatches, Shuffle, Step
from recsys.data.dataset import Dataset
from recsys.losses import ItemSide
from recsys.training.runs import build_model, read_config

PAIRS = "pairs.jsonl"


class BareLoop:
    """The least that trains the run's model: pairs, loss, gradients, step."""

    def __init__(self, run: Path, dataset: Dataset) -> None:
        config = read_config(run)
        self.model = build_model(config, dataset).train()
        count = torch.from_numpy(dataset.train_count).float()
        self.side = ItemSide(self.model.item_vectors, self.model.vectors_of, count / count.sum())
        self.loss = instantiate(config.loss)
        self.optimizer = instantiate(config.optimizer)(self.model.parameters())

    def step(self, batch: dict[str, Tensor]) -> int:
        """Train on one batch; return how many positions it had."""
        query_PD, target_P = self.model.training_pairs(batch)
        loss = self.loss(query_PD, target_P, self.side)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return len(target_P)


class AlternatingBatches(PackedBatches):
    """Packed batches that time the steps between them, and the bare loop's."""

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        seed: int,
        length: int,
        windows: Literal["last", "all"],
        run: str,
        horizon: int = 1,
        shuffle: Shuffle = "auto",
        block: int = 5,
    ) -> None:
        super().__init__(dataset, size, seed, length, windows, horizon, shuffle)
        self.run, self.block, self.began = Path(run), block, 0.0

    @cached_property
    def bare(self) -> BareLoop:
        """Made when the run's config is there."""
        return BareLoop(self.run, self.dataset)

    def __getitem__(self, index: Step) -> dict[str, Tensor]:
        epoch, step = index
        if step % self.block == 0:
            self._pair(epoch, step, perf_counter() - self.began)
            self.began = perf_counter()
        return super().__getitem__(index)

    def _pair(self, epoch: int, step: int, lightning: float) -> None:
        # An epoch's first block is left out: its loader starts, and may run a batch ahead.
        if step < 2 * self.block:
            return
        bare, batch = self.bare, super().__getitem__
        started = perf_counter()
        steps = range(step - self.block, step)
        positions = sum([bare.step(batch((epoch, at))) for at in steps])
        pair = {"lightning": lightning, "bare": perf_counter() - started, "positions": positions}
        with (self.run / PAIRS).open("a") as report:
            report.write(json.dumps(pair) + "\n")
