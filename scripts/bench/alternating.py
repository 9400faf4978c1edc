"""Batches that alternate a Lightning training with a bare loop over the same model and batches.

`recsys train batches._target_=alternating.AlternatingBatches`: Lightning asks for one batch after
another; between two blocks of `block` steps the bare loop takes the same steps on a model of its
own, in the same process. A line a pair goes to `report`: seconds of both, and positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from recsys.data.batches import PackedBatches, Step
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset
from recsys.losses import ItemSide, full_softmax
from recsys.models import Trajectory


class BareLoop:
    """The least that trains the model: pairs, loss, gradients, step."""

    def __init__(self, dataset: Dataset, length: int, dropout: float) -> None:
        catalogue = Catalogue.of(dataset)
        self.model = Trajectory(catalogue, max_length=length, dropout=dropout)
        count = torch.from_numpy(catalogue.train_count).float()
        self.side = ItemSide(self.model.item_vectors, self.model.vectors_of, count / count.sum())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def step(self, batch: dict[str, Tensor]) -> int:
        """Train on one batch; return how many positions it had."""
        query_PD, target_P = self.model.training_pairs(batch)
        loss = full_softmax(query_PD, target_P, self.side)
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
        windows: str,
        dropout: float,
        report: str,
        block: int = 10,
    ) -> None:
        super().__init__(dataset, size, seed, length, windows)  # type: ignore[arg-type]
        self.bare = BareLoop(dataset, length, dropout)
        self.report, self.block, self.began = Path(report), block, 0.0

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
        started, batch = perf_counter(), super().__getitem__
        steps = range(step - self.block, step)
        positions = sum([self.bare.step(batch((epoch, at))) for at in steps])
        pair = {"lightning": lightning, "bare": perf_counter() - started, "positions": positions}
        with self.report.open("a") as report:
            report.write(json.dumps(pair) + "\n")
