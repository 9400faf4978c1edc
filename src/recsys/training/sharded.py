"""Training a retriever whose tables of ids are cut over the processes, and its checkpoints.

Shapes: P positions, C candidates.
"""

from __future__ import annotations

import math
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from recsys import peers
from recsys.artifacts import LAST
from recsys.losses import ItemSide
from recsys.models.tables import Sharded, sharded_tables
from recsys.schema import InputError
from recsys.training.module import Loss, RetrieverModule
from recsys.training.runs import TABLES, short_name
from recsys.training.shards import Shards


class ShardedRetriever(RetrieverModule):
    """Trains a retriever with `Shards` of its tables; DDP and the optimizer have the rest.

    The tables, with their rule's state, are written as one file for each step that a checkpoint or
    a validation needs, and checkpoints name it.
    """

    def __init__(self, *parts: Any, sharding: Sharded, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.sharding, self.file = sharding, Path()
        self.shards: Shards | None = None

    def setup(self, stage: str) -> None:
        """Make this process's part, on its device."""
        device = self.trainer.strategy.root_device
        self.shards = Shards(sharded_tables(self.model), self.sharding, device)
        self.shards.start(self.seed)

    def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Look up all that the step reads, then train as ever."""
        assert self.shards is not None
        items = self.item_side(batch)
        assert items.generator is not None
        before = items.generator.get_state()
        candidate_C = read_by(self.loss, items, batch["targets"])
        items.generator.set_state(before)  # so that the loss draws the same
        wanted = {"items": [batch["items"], batch["targets"], candidate_C]}
        if "users" in self.shards.tables:
            wanted["users"] = [batch["users"]]
        self.shards.fetch(wanted)
        return super().training_step(batch, step)

    def before_validation(self) -> None:
        """Let the model read whole tables from their file."""
        assert self.shards is not None
        self.shards.read(self._written())

    def on_train_epoch_start(self) -> None:
        """Train on fetched rows again."""
        super().on_train_epoch_start()
        for table in sharded_tables(self.model).values():
            table.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the tables beside, in all processes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[TABLES] = self._written().name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this process's rows of the tables up again."""
        super().on_load_checkpoint(checkpoint)
        assert self.shards is not None
        self.shards.load(self._folder / checkpoint[TABLES])

    def on_fit_end(self) -> None:
        """Leave the files that checkpoints name."""
        self._drop_others()

    @property
    def _folder(self) -> Path:
        return Path(self.trainer.default_root_dir) / LAST.parent

    def _written(self) -> Path:
        """Return the file of the tables as they are, written once a step."""
        file = self._folder / f"tables-{self.global_step}.safetensors"
        if file != self.file:
            assert self.shards is not None
            self.shards.save(file)
            self.file = file
            self._drop_others()
        return file

    def _drop_others(self) -> None:
        if not peers.first():
            return
        checkpoints = self._folder.glob("*.ckpt")
        named = [torch.load(file, mmap=True, weights_only=True)[TABLES] for file in checkpoints]
        for file in self._folder.glob("tables-*.safetensors"):
            if file.name not in (*named, self.file.name):
                file.unlink()


def read_by(loss: Loss, items: ItemSide, targets: Tensor) -> Tensor:
    """Return the items beside its own targets that a loss is going to read: [C].

    Raises InputError for a loss that reads every item.
    """
    settings = {name: one.default for name, one in signature(loss).parameters.items()}
    if "negatives" in settings:
        positions = int((targets > 0).sum())
        draws = math.ceil(positions / settings["shared"]) if "shared" in settings else 1
        asked = settings["negatives"], settings.get("by", "uniform")
        return torch.cat([items.sample(*asked)[0] for _ in range(max(1, draws))])
    _check_loss(loss)
    others, _ = items.gather(targets[targets > 0])
    return torch.cat([others, items.sample(settings["uniform_negatives"], "uniform")[0]])


def check_sharding(config: DictConfig, loss: Loss) -> None:
    """Raise InputError for settings that have no effect on sharded tables, or cannot have."""
    _check_loss(loss)
    trainer, schedule = config.trainer, config.get("schedule")
    if not str(trainer.get("strategy", "auto")).startswith("ddp"):
        raise InputError("embedding=sharded cuts tables over processes: add trainer=ddp")
    idle = {
        "trainer.gradient_clip_val": (trainer.get("gradient_clip_val"), None),
        "trainer.accumulate_grad_batches": (trainer.get("accumulate_grad_batches", 1), 1),
        "averaging": (config.averaging, None),
        "schedule": (schedule and short_name(schedule._target_), None),
        "item_start": (config.item_start, "random"),
    }
    for name, (met, expected) in idle.items():
        if met != expected:
            wanted = "null" if expected is None else expected
            raise InputError(
                f"{name}={met} does not reach sharded tables, which are drawn and updated where "
                f"they are; type {name}={wanted}, or embedding=dense"
            )


def _check_loss(loss: Loss) -> None:
    settings = {name: one.default for name, one in signature(loss).parameters.items()}
    every, instead = f"loss={getattr(loss, 'func', loss).__name__}", "loss=sampled_softmax"
    if settings.get("by") == "adaptive":
        every, instead = "loss.by=adaptive", "loss.by=popularity"
    elif {"negatives", "uniform_negatives"} & set(settings):
        return
    raise InputError(
        f"{every} scores every item in each step, and no process has all vectors with "
        f"embedding=sharded; type {instead}"
    )
