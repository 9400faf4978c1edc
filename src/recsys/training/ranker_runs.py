"""Runs of rankers: what their settings are, what they leave, and how to read one back.

Shapes: T tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from recsys.artifacts import read_manifest
from recsys.data.shown import Tables
from recsys.evaluation.calibration import Calibration, calibrate, put
from recsys.features import Layout
from recsys.models.ranker import Calibrated, Ranker
from recsys.schema import DWELL, InputError, suggestion
from recsys.training.runs import BEST, load_weights, read_config

TABLES, CALIBRATION = "ranker", "calibration.json"
"""In a run: the folder of columns and tables as of the end of its examples, and the fits."""
LEARNED = "learned"


@dataclass(frozen=True)
class RankingSettings:
    """The part `ranking` of a config; see configs/recsys.yaml for what each means."""

    tasks: Sequence[str] | None
    weights: Mapping[str, float] | str | None
    listwise: float
    calibration: Mapping[str, str] | str | None
    blend: Mapping[str, float] | None
    retriever: str | None
    candidates: int

    @classmethod
    def of(cls, config: DictConfig) -> RankingSettings:
        """Read them of a whole config; raises InputError where tasks are no list."""
        found = cls(**cast("dict[str, Any]", OmegaConf.to_object(config.ranking)))
        if isinstance(found.tasks, list | None):
            return found
        raise InputError(
            f"ranking.tasks={found.tasks}: expected a list of tasks, as in [view, purchase], or "
            "null for all that the examples have"
        )

    @property
    def method(self) -> Mapping[str, str] | str:
        """How tasks are calibrated."""
        return self.calibration or "none"

    def check(self, tasks: Sequence[str]) -> None:
        """Raise InputError for what a ranker of these tasks cannot do, before it is trained."""
        if all(task == DWELL for task in tasks):
            raise InputError(
                f"ranking.tasks=[{', '.join(tasks)}]: expected a task of yes or no among them, as "
                "in [view, dwell]"
            )
        self._check_weights(tasks)
        blend_of(self.blend, tasks)
        # Without rows there is nothing to fit: only names of methods and tasks are looked at.
        calibrate(*(np.zeros((0, len(tasks))),) * 2, tasks, self.method)

    def _check_weights(self, tasks: Sequence[str]) -> None:
        if isinstance(self.weights, str):
            if self.weights != LEARNED:
                raise InputError(
                    f"ranking.weights={self.weights}: expected {LEARNED}, or a weight of each "
                    f"task, as in {{{tasks[0]}: 2}}" + suggestion(self.weights, [LEARNED])
                )
            return
        _check_tasks("ranking.weights", self.weights or {}, tasks)
        for name, weight in (self.weights or {}).items():
            if weight < 0:
                raise InputError(f"ranking.weights.{name}={weight}: expected 0 or more")


def _check_tasks(setting: str, given: Any, tasks: Sequence[str]) -> None:
    """Refuse what is not a finite number for each of some tasks."""
    if not isinstance(given, Mapping):
        raise InputError(f"{setting}={given}: expected numbers of tasks, as in {{{tasks[0]}: 2}}")
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise InputError(f"{setting}.{name}={value}: expected a number, as in 2 or 0.5")
        if name not in tasks:
            raise InputError(
                f"{setting}: no task {name!r}; the ranker has {', '.join(tasks)}"
                + suggestion(name, tasks)
            )


def blend_of(given: Mapping[str, float] | None, tasks: Sequence[str]) -> dict[str, float]:
    """Return the weights of tasks' probabilities in the score: 1 each where none are given.

    >>> blend_of(None, ["view", "dwell"])
    {'view': 1.0}
    """
    _check_tasks("ranking.blend", given or {}, tasks)
    if given and not any(given.values()):
        raise InputError("ranking.blend: 0 for every task leaves no score; give one a weight")
    return dict(given) if given else {task: 1.0 for task in tasks if task != DWELL}


def make_ranker(config: DictConfig, layout: Layout, tasks: Sequence[str], retriever: int) -> Ranker:
    """Return the configured ranker, untrained; `retriever`: how wide a retriever's vectors are."""
    model = instantiate(config.model)(layout=layout, tasks=tasks, retriever=retriever)
    assert isinstance(model, Ranker)
    return model


def with_fits(model: Ranker, fits: Mapping[str, Calibration]) -> Calibrated:
    """Return what is exported: the ranker with its calibration, answering with probabilities."""
    put(fits, model.calibration)
    return Calibrated(model).eval()


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
    settings, tables = RankingSettings.of(config), Tables.load(folder / TABLES)
    model = make_ranker(config, tables.features.layout, tasks, int(lineage["dim"]))
    load_weights(model, folder / BEST)
    fits = json.loads((folder / CALIBRATION).read_text())
    return LoadedRanker(
        path=folder,
        manifest=manifest,
        model=with_fits(model.eval(), {t: Calibration.of_json(fit) for t, fit in fits.items()}),
        tables=tables,
        retriever=Path(lineage["path"]),
        blend=blend_of(settings.blend, tasks),
        candidates=settings.candidates,
    )
