"""What a training of a ranker is made of: shown items, tasks, calibration, and the test.

Shapes: B requests, C candidates, T tasks, R shown items.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from recsys import peers
from recsys.artifacts import Workspace, write_json
from recsys.data.batches import IDLE
from recsys.data.dataset import Dataset
from recsys.data.examples import Examples, Retrieve, make
from recsys.data.shown import Shown, fitted, shown, tables_at
from recsys.evaluation.calibration import Calibration, calibrate
from recsys.evaluation.protocol import evaluate
from recsys.evaluation.scorers import Scorer
from recsys.evaluation.significance import RANKS
from recsys.evaluation.two_stage import TwoStages
from recsys.models.ranker import Ranker
from recsys.schema import DWELL, InputError
from recsys.task_losses import Uncertainty, multi_task
from recsys.training.callbacks import Validation, averaged
from recsys.training.first_stage import Retrieval, check_past, open_retriever
from recsys.training.leaks import refuse_leaks, single_columns, training_rows
from recsys.training.module import OptimizerFactory, SeededModule
from recsys.training.ranker_runs import (
    CALIBRATION,
    LEARNED,
    TABLES,
    RankingSettings,
    blend_of,
    make_ranker,
    with_fits,
)
from recsys.training.runs import BEST, LoadedRun, load_weights
from recsys.training.shop_test import worth
from recsys.training.task_test import Reranker, TaskTested, tasks_tested
from recsys.training.tasks import measured, predict

Weights = Mapping[str, float] | str | None
SCALED = 4_096
"""Training requests by which numbers are put on one scale."""


class RankerModule(SeededModule):
    """Trains a `recsys.models.Ranker` on what was shown and what came of it."""

    def __init__(
        self,
        model: Ranker,
        optimizer: OptimizerFactory,
        seed: int,
        weights: Weights = None,
        listwise: float = 0.0,
    ) -> None:
        super().__init__(model, optimizer, seed)
        fixed = None if isinstance(weights, str) else weights
        self.uncertainty = None if weights != LEARNED else Uncertainty(model.tasks)
        self.loss = partial(
            multi_task, tasks=model.tasks, weights=fixed, listwise=listwise, count=peers.average
        )

    def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the loss of all tasks over the batch's known labels."""
        logit_BCT = cast(Ranker, self.model).answer(batch)
        label_BCT = torch.full_like(logit_BCT, torch.nan) if IDLE in batch else batch["labels"]
        loss = self.loss(logit_BCT, label_BCT, uncertainty=self.uncertainty)
        self.count(loss, self.of_all(batch, self.shown(label_BCT))[1])
        self.show(loss, step)
        return loss

    @staticmethod
    def shown(label_BCT: Tensor) -> int:
        """Return how many shown items a batch has."""
        return int((~label_BCT.isnan()).any(-1).sum())


class TaskValidation(Validation):
    """Measures the tasks on the validation part's shown items."""

    shown = ("auc", "log_loss")

    def __init__(self, examples: Shown, averaging: Any = None) -> None:
        super().__init__(averaging)
        self.examples = examples

    def measure(self, module: Any) -> dict[str, float]:
        """Return each task's figures, and the binary tasks' means of AUC and log loss."""
        logit_RT = predict(module.model, self.examples, "validation", module.device)
        return measured(logit_RT, self.examples, "validation")


class RankingJob:
    """A ranker to train on what a dataset's people were shown; raises InputError where it cannot.

    With `ranking.retriever`, a run, its score of each shown item is read too, and the test is also
    that of both stages together.
    """

    def __init__(self, config: DictConfig, dataset: Dataset, workspace: Workspace) -> None:
        self.config, self.dataset = config, dataset
        self.settings = RankingSettings.of(config)
        self.length = int(config.model.max_length)
        self.retriever = self._open_retriever(workspace)
        self.log = self._examples()
        self.shown = self._shown()
        tasks, layout = self.shown.examples.tasks, self.shown.tables.features.layout
        model = make_ranker(config, layout, tasks, self.shown.retrieval_width)
        if model.chances is not None and self.shown.retrieval is not None:
            known = self.shown.retrieval.vectors, self.shown.tables.items.codes
            model.chances.fit(*(torch.from_numpy(array) for array in known))
        model.standardise(self._some())
        # A dataclass among Hydra's own arguments would become a config.
        self.batches = instantiate(config.batches, _partial_=True)(
            dataset=dataset, seed=config.seed, shown=self.shown, inputs=model.inputs
        )
        optimizer, weights = instantiate(config.optimizer), self.settings.weights
        self.module = RankerModule(model, optimizer, config.seed, weights, self.settings.listwise)
        averaging = averaged(config.averaging, self.batches.steps)
        self.validation = TaskValidation(self.shown, averaging)
        self.lineage = {"retriever": self._lineage(), "tasks": list(tasks)}

    def begin(self, folder: Path) -> None:
        """Say how values share codes, where they do; a ranker starts at random."""
        collisions = self.shown.tables.features.collisions
        for name, found in collisions.items() if peers.first() else ():
            print(f"{name}: {found}", file=sys.stderr, flush=True)

    def test(self, folder: Path) -> TaskTested:
        """Calibrate the best weights on the validation part and measure them on the test part."""
        if not peers.first():
            return TaskTested((), {}, [])
        model = cast(Ranker, self.module.model)
        load_weights(model, folder / BEST)
        model.eval().cpu()
        fits = self._calibrate(model)
        write_json(folder / CALIBRATION, {task: fit.as_json() for task, fit in fits.items()})
        tables_at(self.dataset, self.log, self.shown.tables.features).save(folder / TABLES)
        tested = tasks_tested(self.shown, model, fits, self.validation, folder)
        if self.retriever is None:
            return tested
        return self._test_stages(tested, self._systems(self.retriever, model, fits), folder)

    def _test_stages(
        self, tested: TaskTested, systems: Mapping[str, Scorer], folder: Path
    ) -> TaskTested:
        exclude = bool(self.config.evaluation.exclude_seen)
        stages = {
            name: evaluate(self.dataset, scorer, "test", exclude_seen=exclude, batch_size=64)
            for name, scorer in systems.items()
        }
        stages["two stages"].save(folder / RANKS)
        found = worth(self.shown, systems, tested.tasks, exclude)
        return replace(tested, stages=stages, worth=found, files=[*tested.files, folder / RANKS])

    def _systems(
        self, retriever: LoadedRun, model: Ranker, fits: Mapping[str, Calibration]
    ) -> dict[str, Scorer]:
        """Return retrieval alone and both stages."""
        retrieval, blend = Retrieval(retriever), blend_of(self.settings.blend, model.tasks)
        reranker = Reranker(with_fits(model, fits), self.shown.tables, retrieval, blend)
        exclude = bool(self.config.evaluation.exclude_seen)
        both = TwoStages(retrieval.scorer, reranker, self.settings.candidates, exclude)
        return {"retrieval": retrieval.scorer, "two stages": both}

    def _calibrate(self, model: Ranker) -> dict[str, Calibration]:
        logit_RT = predict(model, self.shown, "validation")
        labels_RT = self.shown.examples.labels[self.shown.examples.rows("validation")]
        return calibrate(logit_RT, labels_RT, model.tasks, self.settings.method)

    def _open_retriever(self, workspace: Workspace) -> LoadedRun | None:
        if self.settings.retriever is None:
            return None
        run = open_retriever(self.settings.retriever, self.dataset, workspace, self.length)
        # `latest` is another run by the time that this one is resumed or tested again.
        self.config.ranking.retriever = str(run.path)
        return run

    def _examples(self) -> Examples:
        if self.config.examples is None:
            raise InputError(
                "a ranker learns from what people were shown; name it: examples=impressions (the "
                "log's own), examples=rated (each event by its value), or examples=retrieved"
            )
        found = make(instantiate(self.config.examples), self.dataset, self._finder)
        if self.retriever is not None:
            check_past(self.dataset, found)
        return found

    def _finder(self) -> Retrieve:
        if self.retriever is None:
            raise InputError(
                "examples=retrieved draws from what a retriever finds; name its run: "
                "ranking.retriever=latest"
            )
        return Retrieval(self.retriever).finder(self.settings.candidates)

    def _shown(self) -> Shown:
        """Encode the examples; statistics may be of tasks that are not learned."""
        features = fitted(self.dataset, self.log, self._columns())
        wanted = self.log.tasks if self.settings.tasks is None else self.settings.tasks
        learned = _of_tasks(self.log, wanted)
        self.settings.check(learned.tasks)
        _check_told(learned)
        told = single_columns(self.dataset, learned, features.columns)
        labels_RT = learned.labels[training_rows(learned)]
        refuse_leaks(told, labels_RT, learned.tasks, allow=self.config.features_allow)
        encoded = replace(shown(self.dataset, self.log, features, self.length), examples=learned)
        if self.retriever is None:
            return encoded
        retrieval = Retrieval(self.retriever)
        return encoded.with_retrieval(retrieval.queries, retrieval.vectors_ND)

    def _some(self) -> dict[str, Tensor]:
        """Return some training requests, by which numbers are put on one scale."""
        training = self.shown.requests("train")
        some = np.random.default_rng(self.config.seed).permutation(training)[:SCALED]
        arrays = self.shown.arrays(np.sort(some))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _columns(self) -> dict[str, dict[str, Any]]:
        if not self.config.features:
            raise InputError(
                "a ranker reads declared columns, and none are; choose some: features=shop, or "
                "write configs/features/NAME.yaml"
            )
        return cast("dict[str, dict[str, Any]]", OmegaConf.to_object(self.config.features))

    def _lineage(self) -> dict[str, Any] | None:
        if self.retriever is None:
            return None
        facts = self.retriever.manifest
        return {
            "run": facts["name"],
            "path": str(self.retriever.path),
            "fingerprint": facts["fingerprint"],
            "dim": self.shown.retrieval_width,
        }


def _of_tasks(examples: Examples, wanted: Sequence[str]) -> Examples:
    """Return the same with some tasks' labels; raise InputError for one that is not there."""
    labels = [np.zeros((len(examples.items), 0), np.float32)]
    labels += [examples.label(task)[:, None] for task in wanted]
    return replace(examples, tasks=tuple(wanted), labels=np.concatenate(labels, axis=1))


def _check_told(examples: Examples) -> None:
    """Raise InputError where validation has no task of both classes: no epoch is its best."""
    labels_RT = examples.labels[examples.rows("validation")]
    binary = [place for place, task in enumerate(examples.tasks) if task != DWELL]
    if any({0, 1} <= set(np.unique(labels_RT[:, place])) for place in binary):
        return
    names = ", ".join(examples.tasks[place] for place in binary)
    raise InputError(
        f"the {len(labels_RT):,} items shown in the validation part have no task ({names}) with a "
        "yes and a no, so that no epoch can be told from another; set both "
        "examples.cut.validation_share and examples.cut.test_share to more, or give more"
    )
