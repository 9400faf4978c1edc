"""One training: from a config and a dataset to a run directory."""

from __future__ import annotations

import fcntl
import json
import logging
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, cast

import pytorch_lightning as pl
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console

from recsys import peers
from recsys.artifacts import LAST, MANIFEST, Workspace, read_manifest, write_json, write_manifest
from recsys.data.batches import Batches, Steps
from recsys.data.dataset import Dataset
from recsys.schema import InputError
from recsys.training.callbacks import Validation, callbacks
from recsys.training.checkpoints import Bookmark, WholeCheckpoints
from recsys.training.memory import keep_large_buffers, out_of_memory, what_to_lower
from recsys.training.module import Schedule, SeededModule
from recsys.training.processes import launched, restartable, settle, told
from recsys.training.runs import BEST, dataset_of, read_config, short_name
from recsys.training.tracking import Tracker, flatten, make_tracker

MADE_BY_MANIFEST = ("kind", "schema_version", "recsys_version", "created", "files", "fingerprint")
AUTO = "auto"
"""As `resume`: go on with the run of that name where it is unfinished, else start it."""
MAY_DIFFER = ("resume", "split/", "trainer/devices", "trainer/num_nodes", "ranking/retriever")
"""Settings that a run keeps, or takes up, otherwise than they are typed."""
STATE = "run.json"
"""What an unfinished run needs to go on: written at its start, before the first step."""
LOCK = ".lock"
"""Held by the process that trains a run."""


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
    settle(config)
    folder = workspace.folder("run") / told("run", lambda: _free_name(config, workspace))
    job = _assemble(config, dataset, workspace)
    told("claimed", lambda: _claim(folder, config.resume == AUTO))
    try:
        job.begin(folder)
        tracker, state = _begin(config, folder, job, workspace)
    except BaseException:
        if peers.first() and not (folder / STATE).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # the name is free again
        raise
    return _run(config, folder, state, job, tracker, workspace)


def _free_name(config: DictConfig, workspace: Workspace) -> str:
    """Return the name of a new run; one that died before its first step has left it free."""
    name = f"{short_name(config.model._target_)}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    if config.name is not None:
        name = str(config.name)
        if name == "latest" or not re.fullmatch(r"[^./\s][^/]*", name):
            raise InputError(
                f"name={name} cannot be a run's: expected a folder's name, without / and not "
                "latest, such as name=first"
            )
    folder = workspace.folder("run") / name
    if folder.exists() and not (config.resume == AUTO and not (folder / STATE).exists()):
        raise _taken(folder)
    return name


def _claim(folder: Path, again: bool) -> str:
    """Make a new run's folder, which no other training has; `again`: one may have died in it."""
    try:
        folder.mkdir(parents=True, exist_ok=again)
    except FileExistsError:
        raise _taken(folder) from None
    return folder.name


def _taken(folder: Path) -> InputError:
    if (folder / STATE).is_file():
        said = f"choose another name=, or resume={folder.name}"
    else:
        said = f"a training begins it, or died at once: choose another name=, or rm -r {folder}"
    return InputError(f"run {folder.name!r} exists already: {said}")


def _begin(
    config: DictConfig, folder: Path, job: Job, workspace: Workspace
) -> tuple[Tracker, dict[str, Any]]:
    """Write what a run needs to go on, in the first process; return its tracker and state."""
    if peers.first():
        (folder / LAST).parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
    tracker = _tracker(config, folder, workspace, None)
    lineage = {
        "name": job.dataset.name,
        "path": str(job.dataset.path.resolve()),
        "fingerprint": job.dataset.fingerprint,
    }
    ids = {"name": folder.name, "mlflow_run_id": tracker.run_id}
    state = {**ids, "dataset": lineage, **job.lineage}
    if peers.first():
        write_json(folder / STATE, state)
    return tracker, state


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
    if launched():
        config.trainer.update(devices="auto", num_nodes=1)  # as many as there are now
    settle(config)
    state = _read_state(folder)
    job = _assemble(config, dataset_of(state["dataset"]), workspace)
    if not (folder / LAST).is_file():
        job.begin(folder)
    tracker = _tracker(config, folder, workspace, state["mlflow_run_id"])
    return _run(config, folder, state, job, tracker, workspace)


def unfinished(config: DictConfig, workspace: Workspace) -> Path | None:
    """Return the run that the same command began before it was started again, or None.

    It is looked for with `resume=auto`, and where torchrun may start all processes again. Raises
    InputError where the run has no name to be found by, or other settings.
    """
    if config.resume is None and restartable():
        config.resume = AUTO
    if config.resume != AUTO:
        return None
    if config.name is None:
        raise InputError("a run that is to go on after a restart needs a name; type name=NAME")
    folder = workspace.folder("run") / str(config.name)
    begun = told("begun", lambda: "yes" if (folder / STATE).is_file() else "")
    if begun:
        _refuse_other(config, read_config(folder))
    return folder if begun else None


def _refuse_other(config: DictConfig, before: DictConfig) -> None:
    """Refuse settings that differ from those which a run began with."""
    asked, had = (
        flatten(cast("dict[str, Any]", OmegaConf.to_container(c, resolve=True)))
        for c in (config, before)
    )
    for key in sorted(asked.keys() | had.keys()):
        if key.startswith(MAY_DIFFER) or asked.get(key) == had.get(key):
            continue
        setting = key.replace("/", ".")
        raise InputError(
            f"run {config.name} began with {setting}={had.get(key)}, and is to go on with "
            f"{setting}={asked.get(key)}; type the same settings, or another name="
        )


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
    pl.seed_everything(config.seed, verbose=False)
    job = _job(config, dataset, workspace)
    job.module.schedule = _schedule(config)
    return job


def _schedule(config: DictConfig) -> Schedule | None:
    """Return how the learning rate moves, towards an end that there must be."""
    if config.get("schedule") is not None and config.trainer.max_epochs in (None, -1):
        raise InputError(
            f"schedule: a rate that falls needs to know the end, and trainer.max_epochs is "
            f"{config.trainer.max_epochs}; type trainer.max_epochs=30, or schedule=null"
        )
    return cast("Schedule | None", instantiate(config.get("schedule")))


def _job(config: DictConfig, dataset: Dataset, workspace: Workspace) -> Job:
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


def _run(
    config: DictConfig,
    folder: Path,
    state: Mapping[str, Any],
    job: Job,
    tracker: Tracker,
    workspace: Workspace,
) -> Trained:
    with _alone(folder):
        try:
            return _trained(config, folder, state, job, tracker, workspace)
        except BaseException as error:
            tracker.fail(error)
            raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder; raise InputError where another training does."""
    if not peers.first():
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            # This process's own: a loader's worker that outlives it for a moment does not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"run {folder.name} is being trained by another process; wait for it, or stop it"
            ) from None
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def _trained(
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
    if peers.first():
        write_manifest(folder, "run", **facts, metrics=tested.metrics)
        best = {f"best/{name}": value for name, value in job.validation.best().items()}
        tracker.finish({**tested.logged, **best}, [*tested.files, folder / BEST])
        workspace.mark_latest("run", folder)
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
    job.batches.part = (peers.rank(), peers.world())
    loader = job.batches.loader(config.workers, sampler)
    path = last if last.is_file() else None
    try:
        trainer.fit(job.module, train_dataloaders=loader, ckpt_path=path, weights_only=True)
    except SIGTERMException:
        if peers.first():
            print(f"stopped by SIGTERM; next: recsys train resume={folder.name}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None  # 0 would tell schedulers that it is done
    except (KeyboardInterrupt, SystemExit) as end:  # Lightning may make one of the other
        if not isinstance(end.__context__ or end, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(f"next: recsys train resume={folder.name}") from None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise what_to_lower(error, config) from error


def _tracker(config: DictConfig, folder: Path, workspace: Workspace, run_id: str | None) -> Tracker:
    experiment = config.logger.experiment if config.logger.kind == "mlflow" else ""
    return make_tracker(config.logger.kind, folder.name, experiment, folder, workspace, run_id)


def _read_state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / STATE).read_text()))


def _quiet() -> None:
    """Lightning's hints on workers and hardware are settings here, not news each time."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning.*")
