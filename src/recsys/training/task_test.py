"""The test of a ranker: each task on what was shown, and both stages over the whole catalogue.

Shapes: B users, C candidates, T tasks, R shown items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from recsys.data.shop_answers import answers_truth_of
from recsys.data.shown import Shown, Tables, as_model, asked, chunks, grid
from recsys.evaluation.calibration import Calibration, calibrated
from recsys.evaluation.importance import Drop, Place, importance
from recsys.evaluation.plots import learning_curves
from recsys.evaluation.protocol import Evaluation, history_buckets, popularity_buckets
from recsys.evaluation.report import report_table, slices_table
from recsys.evaluation.scorers import EvaluationBatch
from recsys.evaluation.shown import Said
from recsys.evaluation.significance import compare_evaluations
from recsys.evaluation.task_plots import importance_plot, reliability_plot
from recsys.features import Layout
from recsys.models.ranker import Calibrated, Ranker
from recsys.schema import DWELL
from recsys.task_metrics import slice_metrics, task_metrics
from recsys.training.callbacks import Validation
from recsys.training.first_stage import Retrieval
from recsys.training.shop_test import Worth
from recsys.training.tasks import measured, predict, probabilities

COLUMNS = ("auc", "gauc", "log_loss", "ece", "mae")
PANELS = {
    "loss": ("train/loss",),
    "AUC": ("validation/auc",),
    "log loss": ("validation/log_loss",),
    "positions/s": ("train/positions_per_second",),
}
Slices = dict[str, dict[str, dict[str, float]]]
FEW = 20
"""Context columns of at most so many values make slices."""
IMPORTANCE = 500
"""Test requests, the newest, that a column's importance is measured on."""


@dataclass(frozen=True)
class TaskTested:
    """A ranker's figures: `metrics` by part (`test`, `uncalibrated`, `validation`, and where it is
    known `best achievable`); `stages`: full ranking by retrieval alone and by both stages;
    `worth`: what both are worth to a shop that knows its people; `slices`: the tasks' figures by
    group and bucket, with its `rows`.
    """

    tasks: Sequence[str]
    metrics: dict[str, dict[str, float]]
    files: list[Path]
    stages: dict[str, Evaluation] = field(default_factory=dict)
    worth: Worth | None = None
    slices: Slices = field(default_factory=dict)

    @property
    def servable(self) -> bool:
        """Whether a bundle can be made of the run: only with a retriever."""
        return bool(self.stages)

    @property
    def logged(self) -> dict[str, float]:
        """The figures that MLflow shows."""
        parts = {name: part for name, part in self.metrics.items() if name != "validation"}
        parts |= {} if self.worth is None else self.worth.metrics
        parts |= {name: _main(one.metrics) for name, one in self.stages.items()}
        return {
            f"{part}/{name}": value
            for part, values in parts.items()
            for name, value in values.items()
            if np.isfinite(value)
        }

    def show(self, console: Console, slices: bool = False) -> None:
        """Print the table of tasks, and that of both stages with its interval."""
        console.print(self._table())
        if slices:
            console.print(self._slices_table())
        if not self.stages:
            return
        console.print(report_table(self.stages))
        alone, both = self.stages.values()
        row = compare_evaluations(alone, both, metrics=("ndcg@10",)).rows[0].difference
        console.print(
            f"{both.scorer} - {alone.scorer}: ndcg@10 {row.mean:+.4f}, 95 % paired bootstrap "
            f"{row.low:+.4f} to {row.high:+.4f}"
        )
        if self.worth is not None:
            console.print(self.worth.table())
        if slices:
            console.print(slices_table(both))

    def _table(self) -> Table:
        shown = [name for name in COLUMNS if any(f"{t}/{name}" in self._test for t in self.tasks)]
        best = self.metrics.get("best achievable")
        table = Table(title="what was shown · test", box=box.SIMPLE_HEAD)
        for column in ("", *shown, *(["best auc"] if best else [])):
            table.add_column(column.replace("_", " "), justify="right" if column else "left")
        for task in self.tasks:
            cells = [self._test.get(f"{task}/{name}") for name in shown]
            cells += [best.get(f"{task}/auc")] if best else []
            table.add_row(task, *("-" if c is None else f"{c:.4f}" for c in cells))
        return table

    def _slices_table(self) -> Table:
        table = Table(title="auc by slice · test", box=box.SIMPLE_HEAD)
        for column in ("", "rows", *self.tasks):
            table.add_column(column, justify="right" if column else "left")
        for group, buckets in self.slices.items():
            for bucket, found in buckets.items():
                cells = (found.get(f"{task}/auc", np.nan) for task in self.tasks)
                shown = ("-" if np.isnan(cell) else f"{cell:.4f}" for cell in cells)
                table.add_row(f"{group} {bucket}", f"{int(found['rows']):,}", *shown)
            table.add_section()
        return table

    @property
    def _test(self) -> dict[str, float]:
        return self.metrics["test"]


def _main(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "/" not in name}


class Reranker:
    """A calibrated ranker with its tables, as `evaluation.two_stage.TwoStages` asks it.

    blend: weights of the tasks' probabilities in the score.
    """

    def __init__(
        self,
        model: Calibrated,
        tables: Tables,
        retrieval: Retrieval,
        blend: Mapping[str, float],
    ) -> None:
        self.model, self.tables, self.retrieval = model, tables, retrieval
        self.weight_T = torch.tensor([float(blend.get(task, 0.0)) for task in model.tasks])

    @torch.no_grad()
    def __call__(self, batch: EvaluationBatch, items_BC: NDArray[np.int64]) -> NDArray[np.floating]:
        """Return scores [B, C]."""
        asks = np.asarray(batch.users), batch.histories, np.asarray(batch.now)
        queries_BHD, vectors_ND = self.retrieval.queries(*asks), self.retrieval.vectors_ND
        length = self.model.max_length
        arrays = asked(self.tables, length, *asks, items_BC, queries_BHD, vectors_ND)
        given = (torch.from_numpy(as_model(arrays[name])) for name in self.model.inputs)
        return (self.model(*given) @ self.weight_T).numpy()


def tasks_tested(
    shown: Shown,
    model: Ranker,
    fits: Mapping[str, Calibration],
    validation: Validation,
    folder: Path,
) -> TaskTested:
    """Measure a ranker's tasks before and after calibration, and draw what was found."""
    logit_RT = predict(model, shown, "test")
    fitted_RT = calibrated(logit_RT, fits)
    metrics = {
        "test": measured(fitted_RT, shown, "test"),
        "uncalibrated": measured(logit_RT, shown, "test"),
        "validation": validation.best(),
        **best_achievable(shown, model.tasks),
    }
    labels_RT = shown.examples.labels[shown.examples.rows("test")]
    pair = {
        "before calibration": probabilities(logit_RT, model.tasks),
        "calibrated": probabilities(fitted_RT, model.tasks),
    }
    binary = [place for place, task in enumerate(model.tasks) if task != DWELL]
    files = [
        learning_curves(validation.history, folder / "learning-curves.png", panels=PANELS),
        reliability_plot(
            {name: one_RT[:, binary] for name, one_RT in pair.items()},
            labels_RT[:, binary],
            [model.tasks[place] for place in binary],
            folder / "reliability.png",
        ),
        importance_plot(what_matters(shown, model), folder / "importance.png"),
    ]
    users_R, groups = shown.users_of("test"), groups_of(shown)
    items_R = shown.examples.items[shown.examples.rows("test")]
    dataset = shown.dataset
    facts = {"dataset": dataset.path.name, "fingerprint": dataset.fingerprint, "part": "test"}
    said = Said.of(facts, model.tasks, users_R, items_R, labels_RT, pair["calibrated"])
    files.append(said.save(folder))
    slices = slice_metrics(pair["calibrated"], labels_RT, model.tasks, users_R, groups)
    return TaskTested(model.tasks, metrics, files, slices=slices)


def groups_of(shown: Shown) -> dict[str, NDArray[np.str_]]:
    """Return each shown test item's label by history, popularity, hour and categorical context."""
    examples, requests = shown.examples, shown.requests("test")
    items_R = examples.items[examples.rows("test")]
    popularity_N = np.append("unknown", popularity_buckets(shown.dataset.train_count[1:]))
    hours = examples.times[requests] // 3_600_000 % 24
    found = {
        "history": history_buckets(examples.places[requests]),
        "hour": np.char.add(np.char.zfill((hours // 6 * 6).astype(str), 2), " h on"),
    }
    for name, column in examples.context.items():
        if pa.types.is_dictionary(column.type) and len(column.dictionary) <= FEW:
            texts = column.take(requests).to_pylist()
            found[name] = np.array([text or "missing" for text in texts])
    each = np.diff(examples.offsets)[requests]
    by_row = {name: np.repeat(labels, each) for name, labels in found.items()}
    return {"item": popularity_N[items_R], **by_row}


def best_achievable(shown: Shown, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the figures of the true probabilities, where the dataset's shop knows them."""
    truth, examples = answers_truth_of(shown.dataset), shown.examples
    if truth is None or "device" not in examples.context:
        return {}
    binary = [task for task in tasks if task != DWELL]
    found = []
    for some in chunks(len(shown.requests("test"))):
        requests = shown.requests("test")[some]
        rows_BC = grid(examples.offsets, requests)
        asked_of = (
            shown.whole_histories(requests),
            examples.times[requests],
            examples.context["device"].take(requests).to_pylist(),
        )
        items_BC = np.where(rows_BC >= 0, examples.items[rows_BC], 0)
        chances = truth.probabilities(*asked_of, items_BC, examples.positions[rows_BC])
        found.append(np.stack([chances[task] for task in binary], axis=-1)[rows_BC >= 0])
    labels_RT = examples.labels[examples.rows("test")][:, [tasks.index(t) for t in binary]]
    users_R = shown.users_of("test")
    return {"best achievable": task_metrics(np.concatenate(found), labels_RT, binary, users_R)}


def what_matters(shown: Shown, model: Ranker) -> dict[str, dict[str, Drop]]:
    """Return how much worse each task is told when a column says nothing, on some test requests."""
    requests = shown.requests("test")[-IMPORTANCE:]
    arrays = shown.arrays(requests)

    @torch.no_grad()
    def answered(given: Mapping[str, NDArray[Any]]) -> NDArray[np.floating]:
        tensors = (torch.from_numpy(as_model(given[name])) for name in model.inputs)
        return probabilities(model(*tensors).numpy(), model.tasks)

    read = {name: arrays[name] for name in model.inputs}
    places = columns_of(shown.tables.features.layout, model.inputs)
    return importance(answered, read, arrays["labels"], model.tasks, places, repeats=3)


def columns_of(layout: Layout, inputs: Sequence[str]) -> dict[str, list[Place]]:
    """Return where each declared column stands in a ranker's inputs; the path is one column."""
    found: dict[str, list[Place]] = {}
    for array in ("request_codes", "item_codes"):
        ends = np.cumsum([0] + [one.width for one in getattr(layout, array)]).tolist()
        for one, first in zip(getattr(layout, array), ends, strict=False):
            found[one.name] = [Place(array, first, one.width, array == "item_codes")]
    for array in ("request_numbers", "item_numbers", "cross_numbers"):
        for first, name in enumerate(getattr(layout, array)):
            found[name] = [Place(array, first, 1, array != "request_numbers")]
    if "item_vectors" in inputs:
        found["vectors"] = [Place("item_vectors", shown=True)]
    if "queries" in inputs:
        of_items = [Place(name, shown=True) for name in ("candidate_vectors", "retrieval_scores")]
        found["retrieval"] = [Place("queries"), *of_items]
    others = {place.array for places in found.values() for place in places}
    path = [Place(name) for name in inputs if name not in others]
    return found | ({"path": path} if path else {})
