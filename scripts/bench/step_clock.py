"""Lightning's profiler as a stop-watch of `recsys train`: a block of steps, and its waits for data.

    recsys train +trainer.profiler._target_=step_clock.StepClock +trainer.profiler.file=out.json \
        +trainer.profiler.warm=5 +trainer.profiler.steps=20
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import torch
from pytorch_lightning.profilers import Profiler

from recsys.training.memory import peak_memory_gib

FETCH = "[_TrainingEpochLoop].train_dataloader_next"


class StepClock(Profiler):
    """Times `steps` steps after `warm` ones, writes the figures, and stops as Ctrl-C would.

    The device is waited for at both ends of the block and nowhere between, so that what runs at
    the same time still does. `waited` is how long the loop waited for batches; `starved` counts of
    that only the waits at whose end the device had nothing left to do.
    """

    def __init__(self, file: str, warm: int, steps: int) -> None:
        super().__init__()
        self.file, self.warm, self.steps = Path(file), warm, steps
        self.taken, self.waited, self.starved = 0, 0.0, 0.0
        self.asked = self.began = perf_counter()
        self.queued: torch.cuda.Event | None = None

    def start(self, action_name: str) -> None:
        """Mark what the device has been given so far when a batch is asked for."""
        if action_name != FETCH:
            return
        if torch.cuda.is_available():
            self.queued = torch.cuda.Event()
            self.queued.record()
        self.asked = perf_counter()

    def stop(self, action_name: str) -> None:
        """Count the wait when a batch has come; the block begins and ends here."""
        if action_name != FETCH:
            return
        spent = perf_counter() - self.asked
        if self.taken > self.warm:
            self.waited += spent
            self.starved += spent if self.queued is None or self.queued.query() else 0.0
        if self.taken == self.warm:
            self.began = moment()
        if self.taken == self.warm + self.steps:
            self._finish(moment() - self.began)
        self.taken += 1

    def _finish(self, seconds: float) -> None:
        figures = {"steps": self.steps, "seconds": seconds}
        figures |= {"waited": self.waited, "starved": self.starved}
        self.file.write_text(json.dumps({**figures, **peaks()}))
        raise KeyboardInterrupt


def moment() -> float:
    """Return the time when all that the device was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def peaks() -> dict[str, float]:
    """Return peak memory of the process, and of the device as tensors and as taken from it."""
    host = {"peak_memory_gib": peak_memory_gib()}
    if not torch.cuda.is_available():
        return host
    tensors, taken = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return host | {"peak_device_gib": tensors / 2**30, "reserved_device_gib": taken / 2**30}
