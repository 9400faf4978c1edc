"""One training: from a config and a dataset to a run directory."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from recsys.artifacts import MANIFEST, Workspace, read_manifest, write_json, write_manifest
from recsys.data.batches import Batches, Steps
from recsys.data.dataset import Dataset
from recsys.schema import InputError
from recsys.training.callbacks import Validation, callbacks
from recsys.training.checkpoints import Bookmark, WholeCheckpoints
from recsys.training.memory import keep_large_buffers
from recsys.training.module import SeededModule
from recsys.training.runs import BEST, LAST, dataset_of, read_config, short_name
from recsys.training.tracking import Tracker, make_tracker

MADE_BY_MANIFEST = ("kind", "schema_version", "recsys_version", "created", "files", "fingerprint")
STATE = "run.json"
"""What an unfinished run needs to go on: written at its start, before the first step."""


class Measured(Protocol):
    """What a test found."""

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Figures by part: `test`, `validation`, and others beside them."""

    @property
    def logged(self) -> dict[str, float]:
        """The figures that MLflow shows."""

    @property
    def files(self) -> list[Path]:
        """Plots and tables."""

    @property
    def servable(self) -> bool:
        """Whether a bundle can be made of the run."""

    def show(self, console: Console, slices: bool = False) -> None:
        """Print what was found."""


class Job(Protocol):
    """What differs between trainings: what is trained, on what, and how it is measured.

    lineage: what the run's manifest is to say beside the dataset.
    """

    lineage: dict[str, Any]

    @property
    def dataset(self) -> Dataset:
        """What it trains on."""

    @property
    def module(self) -> SeededModule:
        """What Lightning trains."""

    @property
    def batches(self) -> Batches:
        """What it is fed."""

    @property
    def validation(self) -> Validation:
        """What happens after each epoch."""

    def begin(self, folder: Path) -> None:
        """Do what a new training needs once, before its first step."""

    def test(self, folder: Path) -> Measured:
        """Measure the best weights on the test part."""


@dataclass(frozen=True)
class Trained:
    """A finished training: its run directory, how it did, and what it had to maximise."""

    run: Path
    tested: Any
    seconds: float
    reached: float


def train(config: DictConfig, dataset: Dataset, workspace: Workspace) -> Trained:
    """Train a new run, or raise InputError before anything is written."""
    name = config.name or f"{short_name(config.model._target_)}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = workspace.folder("run") / name
    if folder.exists():
        raise InputError(f"run {name!r} exists already: choose another name=, or resume={name}")
    job = _assemble(config, dataset, workspace)
    (folder / LAST).parent.mkdir(parents=True)
    job.begin(folder)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    tracker = _tracker(config, folder, workspace, None)
    lineage = {
        "name": dataset.name,
        "path": str(dataset.path.resolve()),
        "fingerprint": dataset.fingerprint,
    }
    state = {"name": name, "mlflow_run_id": tracker.run_id, "dataset": lineage, **job.lineage}
    write_json(folder / STATE, state)
    return _run(config, folder, state, job, tracker, workspace)


def resume(folder: Path, workspace: Workspace) -> Trained:
    """Go on with an interrupted run, in the same MLflow run, at the batch after its checkpoint."""
    config = read_config(folder)
    if (folder / MANIFEST).is_file():
        raise InputError(
            f"run {folder.name} is finished; evaluate it: recsys evaluate {folder}, or train a new "
            f"run from its weights on new days: resume_from={folder.name} data.dataset=GROWN"
        )
    if not (folder / STATE).is_file():
        raise InputError(f"{folder}: no {STATE} in it; train it anew")
    state = _read_state(folder)
    job = _assemble(config, dataset_of(state["dataset"]), workspace)
    tracker = _tracker(config, folder, workspace, state["mlflow_run_id"])
    return _run(config, folder, state, job, tracker, workspace)


def retest(folder: Path, workspace: Workspace) -> Trained:
    """Test a finished run's best weights again."""
    started = time.perf_counter()
    manifest = read_manifest(folder, "run")
    job = _assemble(read_config(folder), dataset_of(manifest["dataset"]), workspace)
    job.validation.history = manifest["history"]
    tested = job.test(folder)
    facts = {k: v for k, v in manifest.items() if k not in MADE_BY_MANIFEST}
    write_manifest(folder, "run", **{**facts, "metrics": tested.metrics})
    return Trained(folder, tested, time.perf_counter() - started, job.validation.reached)


def _assemble(config: DictConfig, dataset: Dataset, workspace: Workspace) -> Job:
    """Make all that a setting could be wrong for, before anything is written."""
    _check_device(config.trainer.accelerator)
    pl.seed_everything(config.seed, verbose=False)
    if config.get("resume_from") is not None:
        from recsys.training.warm import ContinuedJob

        return ContinuedJob(config, dataset, workspace)
    model, batches = (get_object(config[part]._target_) for part in ("model", "batches"))
    if batches.layout != model.layout:
        raise InputError(
            f"model {short_name(config.model._target_)} trains on {model.layout} batches, not on "
            f"{batches.layout}: batches={model.layout}"
        )
    if model.layout == "shown":
        from recsys.training.ranking import RankingJob

        return RankingJob(config, dataset, workspace)
    from recsys.training.retrieval import RetrievalJob

    return RetrievalJob(config, dataset)


def _check_device(accelerator: str) -> None:
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(
            f"trainer.accelerator={accelerator}: torch {torch.__version__} sees no CUDA device; "
            "use trainer=cpu, or install a CUDA build of torch and check nvidia-smi"
        )


def _run(
    config: DictConfig,
    folder: Path,
    state: Mapping[str, Any],
    job: Job,
    tracker: Tracker,
    workspace: Workspace,
) -> Trained:
    started = time.perf_counter()
    tracker.start(config, job.dataset, job.lineage)
    _fit(config, folder, job, tracker)
    seconds = time.perf_counter() - started
    facts = {
        **state,
        "model": short_name(config.model._target_),
        "epochs": len(job.validation.history),
        "train_seconds": seconds,
        "history": job.validation.history,
    }
    tested = job.test(folder)
    write_manifest(folder, "run", **facts, metrics=tested.metrics)
    workspace.mark_latest("run", folder)
    tracker.finish(tested.logged, [*tested.files, folder / BEST])
    return Trained(folder, tested, time.perf_counter() - started, job.validation.reached)


def _fit(config: DictConfig, folder: Path, job: Job, tracker: Tracker) -> None:
    keep_large_buffers()
    _quiet()
    sampler, last = Steps(job.batches.steps), folder / LAST
    bookmark = Bookmark(sampler, last, **config.checkpoint_every)
    trainer = instantiate(
        config.trainer,
        logger=tracker.logger,
        callbacks=callbacks(last.parent, job.validation, bookmark, config.patience),
        plugins=[WholeCheckpoints()],
        default_root_dir=folder,
        enable_progress_bar=sys.stderr.isatty(),
    )
    loader = job.batches.loader(config.workers, sampler)
    path = last if last.is_file() else None
    trainer.fit(job.module, train_dataloaders=loader, ckpt_path=path, weights_only=True)


def _tracker(config: DictConfig, folder: Path, workspace: Workspace, run_id: str | None) -> Tracker:
    experiment = config.logger.experiment if config.logger.kind == "mlflow" else ""
    return make_tracker(config.logger.kind, folder.name, experiment, folder, workspace, run_id)


def _read_state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / STATE).read_text()))


def _quiet() -> None:
    """Lightning's hints on workers and hardware are settings here, not news each time."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning.*")
