"""What a training of a ranker is made of: shown items, tasks, calibration, and the test.

Shapes: B requests, C candidates, T tasks, R shown items, Q requests, H interests, D dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from recsys.artifacts import Workspace, read_manifest, write_json
from recsys.data.dataset import Dataset
from recsys.data.examples import Examples, Retrieve, make
from recsys.data.shown import Score, Shown, Tables, fitted, shown, tables_at
from recsys.evaluation.calibration import Calibration, calibrate, put
from recsys.evaluation.protocol import evaluate
from recsys.evaluation.scorers import EvaluationBatch, ModelScorer, Scorer
from recsys.evaluation.significance import RANKS
from recsys.evaluation.two_stage import TwoStages
from recsys.history import Histories
from recsys.models.ranker import Calibrated, Ranker
from recsys.schema import DWELL, InputError, suggestion
from recsys.task_losses import Uncertainty, multi_task
from recsys.training.callbacks import Validation, averaged
from recsys.training.leaks import refuse_leaks, single_columns, training_rows
from recsys.training.module import OptimizerFactory, SeededModule
from recsys.training.runs import BEST, LoadedRun, load_run, load_weights, read_config
from recsys.training.shop_test import worth
from recsys.training.task_test import Reranker, TaskTested, test_tasks
from recsys.training.tasks import measured, predict

TABLES, CALIBRATION = "ranker", "calibration.json"
"""In a run: the folder of columns and tables as of the end of its examples, and the fits."""
ENCODED = 256
"""Requests whose history is read at a time."""
Weights = Mapping[str, float] | str | None


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
        self.uncertainty = None if weights != "learned" else Uncertainty(model.tasks)
        self.loss = partial(multi_task, tasks=model.tasks, weights=fixed, listwise=listwise)

    def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the loss of all tasks over the batch's known labels."""
        logit_BCT = self.model(*(batch[name] for name in cast(Ranker, self.model).inputs))
        loss = self.loss(logit_BCT, batch["labels"], uncertainty=self.uncertainty)
        self.count(loss, self.shown(batch["labels"]))
        self.show(loss)
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
        length = int(config.model.max_length)
        self.retriever = _retriever(config.ranking.retriever, dataset, workspace, length)
        examples = _examples(config, dataset, self.retriever)
        features = fitted(dataset, examples, _columns(config))
        told = single_columns(dataset, examples, features.columns)
        labels_RT = examples.labels[training_rows(examples)]
        refuse_leaks(told, labels_RT, examples.tasks, allow=config.features_allow)
        self.shown = shown(dataset, examples, features, length)
        if self.retriever is not None:
            self.shown = self.shown.with_retrieval(_scores(Retrieval(self.retriever)))
        layout, has = self.shown.tables.features.layout, self.retriever is not None
        model = make_ranker(config, layout, examples.tasks, has)
        # A dataclass among Hydra's own arguments would become a config.
        self.batches = instantiate(config.batches, _partial_=True)(
            dataset=dataset, seed=config.seed, shown=self.shown, inputs=model.inputs
        )
        self.settings = cast("dict[str, Any]", OmegaConf.to_object(config.ranking))
        self.module = RankerModule(
            model,
            instantiate(config.optimizer),
            config.seed,
            self.settings["weights"],
            self.settings["listwise"],
        )
        averaging = averaged(config.averaging, self.batches.steps)
        self.validation = TaskValidation(self.shown, averaging)
        self.lineage = {"retriever": self._lineage(), "tasks": list(examples.tasks)}

    def begin(self, folder: Path) -> None:
        """Nothing is to do: a ranker starts at random."""

    def test(self, folder: Path) -> TaskTested:
        """Calibrate the best weights on the validation part and measure them on the test part."""
        model = cast(Ranker, self.module.model)
        load_weights(model, folder / BEST)
        model.eval().cpu()
        fits = self._calibrate(model)
        write_json(folder / CALIBRATION, {task: fit.as_json() for task, fit in fits.items()})
        features = self.shown.tables.features
        tables_at(self.dataset, self.shown.examples, features).save(folder / TABLES)
        tested = test_tasks(self.shown, model, fits, self.validation, folder)
        if self.retriever is None:
            return tested
        alone = ModelScorer(self.retriever.model, name="retrieval")
        systems: dict[str, Scorer] = {
            "retrieval": alone,
            "two stages": self._two_stages(alone, model, fits),
        }
        exclude = bool(self.config.evaluation.exclude_seen)
        stages = {
            name: evaluate(self.dataset, scorer, "test", exclude_seen=exclude, batch_size=64)
            for name, scorer in systems.items()
        }
        stages["two stages"].save(folder / RANKS)
        found = worth(self.shown, systems, model.tasks, exclude)
        files = [*tested.files, folder / RANKS]
        return replace(tested, stages=stages, worth=found, files=files)

    def _two_stages(
        self, alone: ModelScorer, model: Ranker, fits: Mapping[str, Calibration]
    ) -> TwoStages:
        blend = blend_of(self.settings["blend"], model.tasks)
        length = int(self.config.model.max_length)
        reranker = Reranker(with_fits(model, fits), self.shown.tables, length, blend)
        exclude = bool(self.config.evaluation.exclude_seen)
        return TwoStages(alone, reranker, int(self.settings["candidates"]), exclude)

    def _calibrate(self, model: Ranker) -> dict[str, Calibration]:
        logit_RT = predict(model, self.shown, "validation")
        labels_RT = self.shown.examples.labels[self.shown.examples.rows("validation")]
        return calibrate(logit_RT, labels_RT, model.tasks, self.settings["calibration"] or "none")

    def _lineage(self) -> dict[str, Any] | None:
        if self.retriever is None:
            return None
        facts = self.retriever.manifest
        return {
            "run": facts["name"],
            "path": str(self.retriever.path),
            "fingerprint": facts["fingerprint"],
        }


@dataclass(frozen=True)
class LoadedRanker:
    """A finished ranker with its calibration and tables, and the run of its retriever.

    blend: weights of tasks' probabilities in the score; candidates: how many it chooses from.
    """

    path: Path
    manifest: Mapping[str, Any]
    model: Calibrated
    tables: Tables
    retriever: Path
    blend: dict[str, float]
    candidates: int


def load_ranker(folder: Path) -> LoadedRanker:
    """Read a ranker's run; raises InputError where it is damaged or was trained alone."""
    manifest, config = read_manifest(folder, "run"), read_config(folder)
    lineage, tasks = manifest["retriever"], tuple(manifest["tasks"])
    if lineage is None:
        raise InputError(
            f"run {folder.name} is a ranker that was trained without a retriever, so there is "
            "nothing to find its candidates; train it with ranking.retriever=RUN"
        )
    tables = Tables.load(folder / TABLES)
    model = make_ranker(config, tables.features.layout, tasks, True)
    load_weights(model, folder / BEST)
    fits = json.loads((folder / CALIBRATION).read_text())
    return LoadedRanker(
        path=folder,
        manifest=manifest,
        model=with_fits(model.eval(), {t: Calibration.of_json(fit) for t, fit in fits.items()}),
        tables=tables,
        retriever=Path(lineage["path"]),
        blend=blend_of(config.ranking.blend, tasks),
        candidates=int(config.ranking.candidates),
    )


class Retrieval:
    """A trained retriever as a ranker sees it: its scores of shown items, and its best ones."""

    def __init__(self, run: LoadedRun) -> None:
        self.scorer = ModelScorer(run.model, name="retrieval")
        self.vectors_ND = self.scorer.items_ND.detach().numpy()

    @torch.no_grad()
    def scores(self, batch: EvaluationBatch, items_BC: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return the nearest interest's score of each item: [B, C], NaN without a history."""
        queries_BHD = self.scorer.queries(batch).numpy()
        scores_BC = np.einsum("bhd,bcd->bhc", queries_BHD, self.vectors_ND[items_BC]).max(axis=1)
        scores_BC[batch.histories.lengths == 0] = np.nan
        return scores_BC

    def best(self, batch: EvaluationBatch, count: int) -> NDArray[np.int64]:
        """Return the `count` items with the best scores, seen ones among them: [B, count]."""
        scores_BN = self.scorer.score(batch).clone()
        scores_BN[:, 0] = -torch.inf
        return scores_BN.topk(min(count, scores_BN.shape[1] - 1), dim=1).indices.numpy()


def _scores(retrieval: Retrieval) -> Score:
    return lambda users, histories, now, items_BC: retrieval.scores(
        EvaluationBatch(np.asarray(users), histories, np.asarray(now)), items_BC
    )


def _retriever(
    name: str | None, dataset: Dataset, workspace: Workspace, length: int
) -> LoadedRun | None:
    if name is None:
        return None
    run = load_run(workspace.find("run", name))
    if run.dataset.fingerprint != dataset.fingerprint:
        raise InputError(
            f"ranking.retriever={name} was trained on {run.dataset.path.name}, this is "
            f"{dataset.path.name}; type data=existing data.dataset={run.dataset.path.name}, or "
            "train a retriever on this one"
        )
    if dataset.manifest["split"]["rule"] != "temporal":
        raise InputError(
            f"ranking.retriever={name} learnt from events after those that this ranker is tested "
            f"on: dataset {dataset.name} is split by {dataset.manifest['split']['rule']}. Prepare "
            "it with split=temporal and train both on that"
        )
    if cast(int, run.model.max_length) != length:
        raise InputError(
            f"ranking.retriever={name} reads the newest {run.model.max_length} events, this ranker "
            f"{length}; both must read the same: model.max_length={run.model.max_length}"
        )
    return run


def _examples(config: DictConfig, dataset: Dataset, retriever: LoadedRun | None) -> Examples:
    if config.examples is None:
        raise InputError(
            "a ranker learns from what people were shown; name it: examples=impressions (the "
            "log's own), examples=rated (each event by its value), or examples=retrieved"
        )

    def opened() -> Retrieve:
        if retriever is None:
            raise InputError(
                "examples=retrieved draws from what a retriever finds; name its run: "
                "ranking.retriever=latest"
            )
        return partial(_best, Retrieval(retriever), int(config.ranking.candidates))

    examples = make(instantiate(config.examples), dataset, opened)
    return _of_tasks(examples, config.ranking.tasks)


def _best(
    retrieval: Retrieval, count: int, histories: Histories, now: NDArray[np.int64]
) -> NDArray[np.int64]:
    return retrieval.best(EvaluationBatch(np.full(len(now), -1), histories, now), count)


def _of_tasks(examples: Examples, wanted: Sequence[str] | None) -> Examples:
    if wanted is None:
        return examples
    labels = [examples.label(task) for task in wanted]
    return replace(examples, tasks=tuple(wanted), labels=np.stack(labels, axis=1))


def _columns(config: DictConfig) -> dict[str, dict[str, Any]]:
    if not config.features:
        raise InputError(
            "a ranker reads declared columns, and none are; choose some: features=shop, or write "
            "configs/features/NAME.yaml"
        )
    return cast("dict[str, dict[str, Any]]", OmegaConf.to_object(config.features))


def blend_of(given: Mapping[str, float] | None, tasks: Sequence[str]) -> dict[str, float]:
    """Return the weights of tasks' probabilities in the score: 1 each where none are given.

    >>> blend_of(None, ["view", "dwell"])
    {'view': 1.0}
    """
    for name in given or {}:
        if name not in tasks:
            raise InputError(
                f"ranking.blend: no task {name!r}; the ranker has {', '.join(tasks)}"
                + suggestion(name, tasks)
            )
    return dict(given) if given else {task: 1.0 for task in tasks if task != DWELL}


def with_fits(model: Ranker, fits: Mapping[str, Calibration]) -> Calibrated:
    """Return what is exported: the ranker with its calibration, answering with probabilities."""
    put(fits, model.calibration)
    return Calibrated(model).eval()


def make_ranker(config: DictConfig, layout: Any, tasks: Sequence[str], retriever: bool) -> Ranker:
    """Return the configured ranker, untrained."""
    model = instantiate(config.model)(layout=layout, tasks=tasks, retriever=retriever)
    assert isinstance(model, Ranker)
    return model
