"""A trained retriever as a ranker sees it: its queries, item vectors and best items.

Shapes: B requests, K found items, H interests, D dim, N items.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from recsys.artifacts import Workspace, read_manifest
from recsys.data.dataset import Dataset
from recsys.data.examples import Examples, Retrieve
from recsys.evaluation.scorers import EvaluationBatch, ModelScorer
from recsys.history import Histories
from recsys.schema import InputError
from recsys.training.runs import LoadedRun, is_ranker, load_run


class Retrieval:
    """What a ranker and its examples ask a retriever."""

    def __init__(self, run: LoadedRun) -> None:
        self.scorer = ModelScorer(run.model, name="retrieval")
        self.vectors_ND = self.scorer.items_ND.detach().numpy()

    def queries(
        self, users: NDArray[np.int64], histories: Histories, now: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the queries of people at some moments: [B, H, D]."""
        return self.scorer.queries(EvaluationBatch(users, histories, now)).numpy()

    def finder(self, count: int) -> Retrieve:
        """Return what finds the `count` items with the best scores, seen ones among them."""

        def find(histories: Histories, now: NDArray[np.int64]) -> NDArray[np.int64]:
            nobody = np.full(len(now), -1)
            scores_BN = self.scorer.score(EvaluationBatch(nobody, histories, now)).clone()
            scores_BN[:, 0] = -torch.inf
            return scores_BN.topk(min(count, scores_BN.shape[1] - 1), dim=1).indices.numpy()

        return find


def open_retriever(name: str, dataset: Dataset, workspace: Workspace, length: int) -> LoadedRun:
    """Return the run `ranking.retriever` names, or raise InputError where it does not fit.

    length: the newest events that the ranker reads.
    """
    path = workspace.find("run", name)
    if is_ranker(path):
        raise InputError(
            f"ranking.retriever={name} is a ranker, {path.name}; name {_its_retriever(path)}"
        )
    run = load_run(path)
    _check_dataset(name, run, dataset)
    if cast(int, run.model.max_length) != length:
        raise InputError(
            f"ranking.retriever={name} reads the newest {run.model.max_length} events, this ranker "
            f"{length}; both must read the same: model.max_length={run.model.max_length}"
        )
    return run


def check_past(dataset: Dataset, examples: Examples) -> None:
    """Raise InputError where training requests reach into the time that both stages are tested on.

    dataset: split by time, as `open_retriever` sees to.
    """
    newest = int(examples.times[examples.parts["train"]].max())
    tested = int(dataset.manifest["split"]["test_from"])
    if newest >= tested:
        raise InputError(
            f"examples.cut: the ranker would learn from requests up to {newest}, and {tested} is "
            "the moment from which both stages are tested; leave the cut out, or end training "
            "before that"
        )


def _its_retriever(ranker: Path) -> str:
    own = read_manifest(ranker, "run")["retriever"]
    return f"a retriever's run, such as its own: {own['run']}" if own else "a retriever's run"


def _check_dataset(name: str, run: LoadedRun, dataset: Dataset) -> None:
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
