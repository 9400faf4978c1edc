"""One point of the cost curves: seconds a step and peak memory of a process of its own."""

from __future__ import annotations

import json
import statistics
import sys
from time import perf_counter

import numpy as np
import torch
from hydra.utils import instantiate
from protocol import peak_memory_gib
from torch import Tensor

from recsys.data.catalogue import Catalogue
from recsys.history import Histories, pack
from recsys.launch import configure
from recsys.losses import ItemSide
from recsys.optimizers import LazyAdam
from recsys.training.memory import keep_large_buffers


def batches(items: int, length: int, rows: int, steps: int) -> list[dict[str, Tensor]]:
    """Return `steps` batches of `rows` full histories of uniform items."""
    rng = np.random.default_rng(0)
    size, offsets = rows * (length + 1), np.arange(rows + 1) * (length + 1)
    made = []
    for _ in range(steps):
        drawn = rng.integers(1, items + 1, size)
        arrays = pack(
            Histories(drawn, np.ones(size, np.int8), np.zeros(size, np.int64), offsets), length
        )
        made.append({name: torch.from_numpy(array) for name, array in arrays.items()})
    return made


class Trainer:
    """The shipped model, loss and optimizer on random batches."""

    def __init__(self, items: int, length: int, loss: str) -> None:
        counts = np.concatenate([[0], np.ones(items, np.int64)])
        optimizer = "adam" if loss == "full_softmax" else "lazy_adam"
        config = configure([f"loss={loss}", f"model.max_length={length}", f"optimizer={optimizer}"])
        self.model = instantiate(config.model, catalogue=Catalogue(items, 1, counts))
        share = torch.from_numpy(counts).float() / items
        self.side = ItemSide(self.model.item_vectors, self.model.vectors_of, share)
        self.loss = instantiate(config.loss)
        self.optimizer = instantiate(config.optimizer)(self.model.parameters())
        if isinstance(self.optimizer, LazyAdam):
            self.optimizer.prepare(self.model)

    def step(self, batch: dict[str, Tensor]) -> float:
        """Train on one batch; return the seconds it took."""
        started = perf_counter()
        loss = self.loss(*self.model.training_pairs(batch), self.side)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return perf_counter() - started


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    keep_large_buffers()
    items, length, rows = given["items"], given["length"], given["rows"]
    trainer = Trainer(items, length, given["loss"])
    # The first step only warms up: it makes the optimizer's moments.
    _, *spent = [trainer.step(b) for b in batches(items, length, rows, given["steps"] + 1)]
    seconds = statistics.median(spent)
    figures = {"seconds_a_step": seconds, "positions_per_second": rows * length / seconds}
    print(json.dumps({**figures, "peak_memory_gib": peak_memory_gib()}))


if __name__ == "__main__":
    main()
