"""Checkpoints within an epoch: the loader's place, and files that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException

from recsys import peers
from recsys.data.batches import Steps
from recsys.schema import InputError

END_SECONDS = 20
"""A step, and the checkpoint after it, may take so long once a process was told to end."""


class Bookmark(Callback):
    """Keeps the loader's place in every checkpoint, and writes one within an epoch now and then.

    The place is after the batches trained on, whatever the loader's workers have read ahead. A
    checkpoint is due `minutes` after the epoch's start or the last one, every `steps`, and at
    SIGTERM, with which schedulers announce that a machine is wanted back. Several processes, each
    told in a step of its own, then end after the same one; Lightning's own handler would have them
    speak with each other from within the signal. Who waits for one that died never ends its step,
    and is ended after `END_SECONDS`.
    """

    def __init__(
        self, sampler: Steps, file: Path, minutes: float | None = None, steps: int | None = None
    ) -> None:
        self.sampler, self.file, self.minutes, self.steps = sampler, file, minutes, steps
        self.place, self.since, self.told = (0, 0), time.monotonic(), False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Hear SIGTERM, where there are several processes, in place of Lightning."""
        if peers.world() > 1:
            signal.signal(signal.SIGTERM, self._hear)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Leave the signal to the system: what follows the training keeps no place."""
        if peers.world() > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Count the minutes anew: the epoch before ended with a checkpoint."""
        self.since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, step: int
    ) -> None:
        """Move on by a batch; the last one is left to the checkpoint after the validation."""
        epoch, last = trainer.current_epoch, trainer.is_last_batch
        self.place = (epoch + 1, 0) if last else (epoch, step + 1)
        # Never while gradients of several batches are being added up.
        if last or (step + 1) % trainer.accumulate_grad_batches:
            return
        late, told = self._agreed(trainer)
        if told or late or (self.steps and trainer.global_step % self.steps == 0):
            trainer.save_checkpoint(self.file)
            self.since = time.monotonic()
        if told and peers.world() > 1:  # of one process, Lightning ends the training itself
            raise SIGTERMException

    def _agreed(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Return whether it is time to write, and whether anybody was told to end.

        The first process's clock counts.
        """
        passed = time.monotonic() - self.since
        late = self.minutes is not None and peers.first() and passed >= 60 * self.minutes
        told = self.told or trainer.received_sigterm
        if peers.world() == 1:
            return late, told
        late, told = peers.total(torch.tensor([late, told], dtype=torch.int64)).tolist()
        return bool(late), bool(told)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        signal.alarm(END_SECONDS)

    def state_dict(self) -> dict[str, Any]:
        """Return the next batch to train on."""
        return {"place": self.place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the loader begin there."""
        epoch, step = self.sampler.epoch, self.sampler.first = state_dict["place"]
        print(f"goes on at epoch {epoch + 1}, step {step + 1}", file=sys.stderr, flush=True)


class WholeCheckpoints(TorchCheckpointIO):
    """Replaces a checkpoint in one go, so that a kill while writing leaves the one before.

    Lightning's own writing copies from the system's temporary folder where that is another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside `path`, then rename; raises InputError where the disk is full."""
        scratch = Path(path).with_name(".unfinished")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except (OSError, RuntimeError) as error:
            if not _is_full(error):
                raise
            raise InputError(_full(Path(path))) from error
        finally:
            scratch.unlink(missing_ok=True)


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error; torch writes its own over the system's."""
    if error is None:
        return False
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or _is_full(error.__cause__ or error.__context__)


def _full(path: Path) -> str:
    run, free = path.parent.parent, shutil.disk_usage(path.parent).free / 2**20
    kept = "the one before is whole" if path.is_file() else "there is none before it"
    return (
        f"{path}: no space left to write this checkpoint ({free:,.0f} MiB free); {kept}. Free "
        f"some, or move the workspace to a larger disk, then recsys train resume={run.name}"
    )
