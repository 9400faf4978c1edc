"""A training that starts from a finished run's weights and learns what is new since then.

Shapes: N items, M new items, K known items, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from recsys.artifacts import MANIFEST, Workspace, read_manifest
from recsys.data.dataset import Dataset
from recsys.data.fresh import Fresh
from recsys.data.grow import ancestors
from recsys.evaluation.protocol import Evaluation, evaluate
from recsys.evaluation.report import report_table
from recsys.evaluation.scorers import EvaluationBatch, ModelScorer, Scorer
from recsys.models.tables import sharded_tables
from recsys.schema import InputError
from recsys.training.growth import grow_weights
from recsys.training.retrieval import RetrievalJob
from recsys.training.runs import (
    BEFORE,
    OLD,
    OLD_BEFORE,
    LoadedRun,
    build_model,
    dataset_of,
    is_ranker,
    load_run,
    read_config,
)
from recsys.training.testing import Tested
from recsys.training.tracking import flatten

INHERITED = (
    "model",
    "batches",
    "loss",
    "objective",
    "optimizer",
    "trainer",
    "averaging",
    "patience",
    "workers",
    "checkpoint_every",
    "evaluation",
    "logger",
    "embedding",
)
"""Settings of the run before that hold on, but for what is typed."""
IDLE = ("experiment", "debug", "item_start", "ranking", "features", "examples")
"""What has no effect on such a training, or on too much of it."""
MAY_DIFFER = ("dropout",)
"""Settings of a model that its weights do not depend on."""


def continued(config: DictConfig, overrides: Sequence[str], workspace: Workspace) -> DictConfig:
    """Return the settings of the run that `resume_from` names, changed by what is typed."""
    run = find_parent(str(config.resume_from), workspace)
    before, merged = read_config(run), config.copy()
    for part in INHERITED:
        if part in before:
            OmegaConf.update(merged, part, before[part], merge=False, force_add=True)
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
        part = key.split(".")[0]
        if part in IDLE:
            raise InputError(
                f"{override} has no effect with resume_from={config.resume_from}, which keeps the "
                "settings of that run; leave it out, and name single settings instead, as in "
                "optimizer.lr=3e-4 trainer.max_epochs=2"
            )
        if part in INHERITED:
            OmegaConf.update(
                merged, key, OmegaConf.select(config, key), merge=False, force_add=True
            )
    merged.resume_from = str(run)
    return merged


def find_parent(name: str, workspace: Workspace) -> Path:
    """Return the finished retriever's run that `resume_from` names, or raise InputError."""
    run = workspace.find("run", name)
    if not (run / MANIFEST).is_file():
        raise InputError(
            f"resume_from={name}: run {run.name} is not finished; go on with it: recsys train "
            f"resume={run.name}. resume_from starts a new run from the weights of a finished one"
        )
    if is_ranker(run):
        raise InputError(
            f"resume_from={name} is a ranker, which learns anew each time: continue its retriever, "
            "and then train model=ranker ranking.retriever=THAT_RUN on the grown dataset"
        )
    return run


@dataclass(frozen=True)
class ContinuedTested(Tested):
    """The test on new days, and both runs on the test part of the run before."""

    old: dict[str, Evaluation]

    @property
    def logged(self) -> dict[str, float]:
        """The figures that MLflow shows, with those on the old holdout under its name."""
        found = {k: v for k, v in super().logged.items() if OLD not in k}
        return found | {
            f"{part.replace('_', ' ')}/{name}": value
            for part in (OLD, OLD_BEFORE)
            for name, value in self.metrics[part].items()
            if "/" not in name
        }

    def show(self, console: Console, slices: bool = False) -> None:
        """Print both tables."""
        super().show(console, slices)
        console.print("what is left of the old: the test part of the run before")
        console.print(report_table(self.old))


class ContinuedJob(RetrievalJob):
    """A retriever that goes on from `config.resume_from` on a dataset that has grown from its own.

    Targets are events that the run before has not trained on, and `config.replay` of each batch
    are older ones; histories reach back as far as ever.
    """

    def __init__(self, config: DictConfig, dataset: Dataset, workspace: Workspace) -> None:
        self.parent = find_parent(str(config.resume_from), workspace)
        manifest = read_manifest(self.parent, "run")
        _check_model(config, self.parent)
        trained = dataset_of(manifest["dataset"])
        _check_descends(dataset, trained, self.parent.name)
        self.fresh = Fresh.since(trained, dataset, config.replay)
        self._check_new(dataset, trained)
        super().__init__(config, dataset)
        if sharded_tables(self.module.model):
            raise InputError(
                f"resume_from={self.parent.name}: sharded tables do not grow; continue a run with "
                "embedding=dense or hashed, or train anew"
            )
        names = ("name", "mlflow_run_id", "fingerprint")
        self.lineage |= {
            "parent": {name: manifest.get(name) for name in names} | {"path": str(self.parent)},
            "chain": [*manifest.get("chain", []), manifest.get("name", self.parent.name)],
            "replay": config.replay,
        }

    def _check_new(self, dataset: Dataset, trained: Dataset) -> None:
        if not (self.fresh.first_U < dataset.split.train_end).any():
            raise InputError(
                f"resume_from: nothing in {dataset.path.name} is new to run {self.parent.name}: "
                f"what came after {trained.path.name} is in validation, test, or before the end of "
                "that run's training. Grow it by newer days first"
            )

    def _batches(self, **more: Any) -> Any:
        return super()._batches(fresh=self.fresh, **more)

    def _target_share(self) -> NDArray[Any]:
        return self.fresh.share(self.dataset)

    @cached_property
    def before(self) -> LoadedRun:
        """The run that this one starts from."""
        return load_run(self.parent)

    def _start(self) -> None:
        """Start from the weights of the run before."""
        grow_weights(self.module.model, self.before, self.dataset)

    def test(self, folder: Path) -> ContinuedTested:
        """Rank the test part, beside the run before, and that run's own test part again."""
        tested = super().test(folder)
        model, exclude = self.module.model, self.config.evaluation.exclude_seen
        old = self.before.dataset
        rows: dict[str, Scorer] = {
            "this run": _Narrowed(ModelScorer(model, name="this run"), old.num_items),
            BEFORE: ModelScorer(self.before.model, name=BEFORE),
        }
        found = {n: evaluate(old, s, "test", exclude_seen=exclude) for n, s in rows.items()}
        both = {OLD: found["this run"].metrics, OLD_BEFORE: found[BEFORE].metrics}
        return ContinuedTested(tested.rows, tested.metrics | both, tested.files, found)

    def _beside(self) -> list[Scorer]:
        """Return the run before, with rows for what is new that nothing was learnt of."""
        model = build_model(self.config, self.dataset)
        grow_weights(model, self.before, self.dataset)
        return [ModelScorer(model.eval(), name=BEFORE)]


@dataclass(frozen=True)
class _Narrowed:
    """Scores only the items that an older dataset has."""

    scorer: ModelScorer
    num_items: int

    @property
    def name(self) -> str:
        return self.scorer.name

    def score(self, batch: EvaluationBatch) -> Tensor:
        return self.scorer.score(batch)[:, : self.num_items + 1]


def _check_model(config: DictConfig, run: Path) -> None:
    """Raise InputError naming each setting in which the model is another one than the run's."""
    models = [one.model for one in (config, read_config(run))]
    ours, theirs = (flatten({"model": OmegaConf.to_container(m, resolve=True)}) for m in models)
    kind = "model/_target_"
    names = [kind] if ours[kind] != theirs[kind] else sorted({*ours, *theirs})
    differ = [
        f"{name.replace('/', '.')}={ours.get(name)} (there {theirs.get(name)})"
        for name in names
        if ours.get(name) != theirs.get(name) and name.split("/")[-1] not in MAY_DIFFER
    ]
    if differ:
        raise InputError(
            f"resume_from={run.name} is another model: {', '.join(differ)}; leave these out, or "
            "train anew without resume_from"
        )


def _check_descends(dataset: Dataset, trained: Dataset, run: str) -> None:
    if dataset.fingerprint == trained.fingerprint:
        raise InputError(
            f"resume_from={run}: it was trained on this very dataset, {dataset.path.name}, so "
            "there is nothing new. Add days: recsys prepare data=events data.path=DAY "
            f"grow.onto={dataset.path.name}"
        )
    if trained.fingerprint not in ancestors(dataset):
        raise InputError(
            f"resume_from={run} was trained on {trained.path.name}, from which {dataset.path.name} "
            "has not grown, so that their indices mean other items. Grow that one: recsys prepare "
            f"data=events data.path=DAY grow.onto={trained.path.name}"
        )
