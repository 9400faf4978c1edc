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
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from recsys.artifacts import MANIFEST, Workspace, write_json, write_manifest
from recsys.data.batches import Batches, Steps
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset
from recsys.schema import InputError
from recsys.training.callbacks import FullRanking, averaged, callbacks
from recsys.training.checkpoints import Bookmark, WholeCheckpoints
from recsys.training.memory import keep_large_buffers
from recsys.training.module import Objective, RetrieverModule
from recsys.training.runs import BEST, LAST, build_model, dataset_of, load_run, read_config
from recsys.training.start import start_items
from recsys.training.testing import Tested, rank_test
from recsys.training.tracking import Tracker, make_tracker

MADE_BY_MANIFEST = ("kind", "schema_version", "recsys_version", "created", "files", "fingerprint")
STATE = "run.json"
"""What an unfinished run needs to go on: written at its start, before the first step."""


@dataclass(frozen=True)
class Trained:
    """A finished training: its run directory and how it did."""

    run: Path
    tested: Tested
    seconds: float


def train(config: DictConfig, dataset: Dataset, workspace: Workspace) -> Trained:
    """Train a new run, or raise InputError before anything is written."""
    name = config.name or f"{short_name(config.model._target_)}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = workspace.folder("run") / name
    if folder.exists():
        raise InputError(f"run {name!r} exists already: choose another name=, or resume={name}")
    module, batches, ranking = _assemble(config, dataset)
    start_items(module.model, dataset, config.item_start)
    (folder / LAST).parent.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    tracker = _tracker(config, folder, workspace, None)
    lineage = {
        "name": dataset.name,
        "path": str(dataset.path.resolve()),
        "fingerprint": dataset.fingerprint,
    }
    state = {"name": name, "mlflow_run_id": tracker.run_id, "dataset": lineage}
    write_json(folder / STATE, state)
    return _run(config, folder, state, module, batches, ranking, tracker, workspace)


def resume(folder: Path, workspace: Workspace) -> Trained:
    """Go on with an interrupted run, in the same MLflow run, at the batch after its checkpoint."""
    config = read_config(folder)
    if (folder / MANIFEST).is_file():
        raise InputError(f"run {folder.name} is finished; evaluate it: recsys evaluate {folder}")
    if not (folder / STATE).is_file():
        raise InputError(f"{folder}: no {STATE} in it; train it anew")
    state = _read_state(folder)
    module, batches, ranking = _assemble(config, dataset_of(state["dataset"]))
    tracker = _tracker(config, folder, workspace, state["mlflow_run_id"])
    return _run(config, folder, state, module, batches, ranking, tracker, workspace)


def retest(folder: Path) -> Trained:
    """Rank the test part again with a finished run's best weights."""
    started = time.perf_counter()
    run = load_run(folder)
    exclude = run.config.evaluation.exclude_seen
    tested = rank_test(folder, run.dataset, run.model, run.manifest, exclude)
    facts = {k: v for k, v in run.manifest.items() if k not in MADE_BY_MANIFEST}
    write_manifest(folder, "run", **{**facts, "metrics": tested.metrics})
    return Trained(folder, tested, time.perf_counter() - started)


def _assemble(config: DictConfig, dataset: Dataset) -> tuple[RetrieverModule, Batches, FullRanking]:
    """Make all that a setting could be wrong for, before anything is written."""
    _check_device(config.trainer.accelerator)
    pl.seed_everything(config.seed, verbose=False)
    model = build_model(config, dataset)
    batches = instantiate(
        config.batches, dataset=dataset, seed=config.seed, length=config.model.max_length
    )
    if batches.layout != model.layout:
        raise InputError(
            f"model {short_name(config.model._target_)} trains on {model.layout} batches, not on "
            f"{batches.layout}: batches={model.layout}"
        )
    count = torch.from_numpy(Catalogue.of(dataset).train_count)
    loss, optimizer = instantiate(config.loss), instantiate(config.optimizer)
    objective = Objective(**config.objective)
    module = RetrieverModule(model, loss, optimizer, count, config.seed, objective)
    averaging = averaged(config.averaging, batches.steps)
    return module, batches, FullRanking(dataset, config.evaluation.exclude_seen, averaging)


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
    module: RetrieverModule,
    batches: Batches,
    ranking: FullRanking,
    tracker: Tracker,
    workspace: Workspace,
) -> Trained:
    started = time.perf_counter()
    tracker.start(config, batches.dataset)
    _fit(config, folder, module, batches, tracker, ranking)
    seconds = time.perf_counter() - started
    facts = {
        **state,
        "model": short_name(config.model._target_),
        "epochs": len(ranking.history),
        "train_seconds": seconds,
        "history": ranking.history,
    }
    tested = rank_test(folder, batches.dataset, module.model, facts, config.evaluation.exclude_seen)
    write_manifest(folder, "run", **facts, metrics=tested.metrics)
    workspace.mark_latest("run", folder)
    tracker.finish(tested.logged, [*tested.files, folder / BEST])
    return Trained(folder, tested, time.perf_counter() - started)


def _fit(
    config: DictConfig,
    folder: Path,
    module: RetrieverModule,
    batches: Batches,
    tracker: Tracker,
    ranking: FullRanking,
) -> None:
    keep_large_buffers()
    _quiet()
    sampler, last = Steps(batches.steps), folder / LAST
    bookmark = Bookmark(sampler, last, **config.checkpoint_every)
    trainer = instantiate(
        config.trainer,
        logger=tracker.logger,
        callbacks=callbacks(last.parent, ranking, bookmark, config.patience),
        plugins=[WholeCheckpoints()],
        default_root_dir=folder,
        enable_progress_bar=sys.stderr.isatty(),
    )
    loader = batches.loader(config.workers, sampler)
    path = last if last.is_file() else None
    trainer.fit(module, train_dataloaders=loader, ckpt_path=path, weights_only=True)


def _tracker(config: DictConfig, folder: Path, workspace: Workspace, run_id: str | None) -> Tracker:
    experiment = config.logger.experiment if config.logger.kind == "mlflow" else ""
    return make_tracker(config.logger.kind, folder.name, experiment, folder, workspace, run_id)


def _read_state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / STATE).read_text()))


def short_name(target: str) -> str:
    """Return a class path as a name.

    >>> short_name("recsys.models.TwoTower")
    'two_tower'
    """
    name = target.rsplit(".", 1)[-1]
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _quiet() -> None:
    """Lightning's hints on workers and hardware are settings here, not news each time."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning.*")
