"""What two stages are worth to the synthetic shop, by its own truth, against retrieval alone.

Shapes: B requests, N items, K places of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from recsys.data.shop_answers import AnswersTruth, answers_truth_of
from recsys.data.shown import Shown, chunks
from recsys.evaluation.scorers import EvaluationBatch, Scorer
from recsys.evaluation.significance import Interval, bootstrap
from recsys.schema import DWELL

REQUESTS, PLACES, TOGETHER = 1_000, 10, 64
"""Test requests looked at (the newest), items of an answer, and requests at a time."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Worth:
    """Of each task, both systems' figure a request, and the gain with its interval.

    figures: (task, figure) → name of the system → mean; gains: the same keys → right less left.
    """

    figures: Mapping[tuple[str, str], Mapping[str, float]]
    gains: Mapping[tuple[str, str], Interval]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Return each system's figures by name."""
        systems = next(iter(self.figures.values()))
        return {
            f"{system}, by truth": {f"{t}/{f}": row[system] for (t, f), row in self.figures.items()}
            for system in systems
        }

    def table(self) -> Table:
        """Return a table of both systems, a row a figure."""
        table = Table(title="answers of 10, by the shop's own truth", box=box.SIMPLE_HEAD)
        table.add_column("")
        for name in (*next(iter(self.figures.values())), "gain", "95 % interval"):
            table.add_column(name, justify="right")
        for (task, figure), row in self.figures.items():
            gain = self.gains[task, figure]
            share = gain.mean / next(iter(row.values()))
            cells = (*(f"{v:.4f}" for v in row.values()), f"{share:+.1%}")
            table.add_row(f"{task} {figure}", *cells, f"{gain.low:+.4f} to {gain.high:+.4f}")
        return table


def worth(
    shown: Shown, systems: Mapping[str, Scorer], tasks: Sequence[str], exclude_seen: bool
) -> Worth | None:
    """Compare two systems, the usual one first; None where there is no truth to judge them by.

    `an answer`: how many views, purchases, … an answer brings. `ndcg@10`: over the whole catalogue,
    an item's gain being its true chance if it were shown first.
    """
    truth = answers_truth_of(shown.dataset)
    if truth is None or "device" not in shown.examples.context:
        return None
    known = [task for task in tasks if task != DWELL]
    found = {
        name: _figures(shown, truth, scorer, known, exclude_seen)
        for name, scorer in systems.items()
    }
    usual, new = found.values()
    return Worth(
        {key: {name: float(one[key].mean()) for name, one in found.items()} for key in usual},
        {key: bootstrap(new[key] - usual[key]) for key in usual},
    )


def _figures(
    shown: Shown, truth: AnswersTruth, scorer: Scorer, tasks: Sequence[str], exclude_seen: bool
) -> dict[tuple[str, str], Floats]:
    requests = shown.requests("test")[-REQUESTS:]
    parts = [
        _batch(shown, truth, scorer, tasks, requests[some], exclude_seen)
        for some in chunks(len(requests), TOGETHER)
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _batch(
    shown: Shown,
    truth: AnswersTruth,
    scorer: Scorer,
    tasks: Sequence[str],
    requests: NDArray[np.int64],
    exclude_seen: bool,
) -> dict[tuple[str, str], Floats]:
    examples, histories = shown.examples, shown.whole_histories(requests)
    batch = EvaluationBatch(examples.users[requests], histories, examples.times[requests])
    slate_BK = _slate(scorer.score(batch).clone(), batch, exclude_seen)
    asked = histories, batch.now, examples.context["device"].take(requests).to_pylist()
    every_BN = np.broadcast_to(
        np.arange(1, shown.dataset.num_items + 1), (len(batch), shown.dataset.num_items)
    )
    gains = truth.probabilities(*asked, every_BN, np.zeros_like(every_BN))
    found = {}
    for task in tasks:
        found[task, "an answer"] = truth.value(*asked, slate_BK, task)
        found[task, "ndcg@10"] = ndcg(gains[task], slate_BK)
    return found


def _slate(
    scores_BN: torch.Tensor, batch: EvaluationBatch, exclude_seen: bool
) -> NDArray[np.int64]:
    scores_BN[:, 0] = -torch.inf
    if exclude_seen:
        rows = np.repeat(np.arange(len(batch)), batch.histories.lengths)
        scores_BN[torch.from_numpy(rows), np.asarray(batch.histories.items, np.int64)] = -torch.inf
    return scores_BN.topk(PLACES, dim=1).indices.numpy()


def ndcg(gain_BN: Floats, slate_BK: NDArray[np.int64]) -> Floats:
    """Return each answer's discounted gain over that of the best answer: [B]; items count from 1.

    Source: Järvelin and Kekäläinen 2002, section 2.2, with linear gains.

    >>> ndcg(np.array([[1.0, 0.5, 0.0]]), np.array([[1, 2]])).round(2)
    array([1.])
    """
    discount_K = 1 / np.log2(np.arange(slate_BK.shape[1]) + 2)
    met_BK = np.take_along_axis(gain_BN, slate_BK - 1, axis=1)
    best_BK = -np.sort(-gain_BN, axis=1)[:, : slate_BK.shape[1]]
    return (met_BK * discount_K).sum(1) / np.maximum((best_BK * discount_K).sum(1), 1e-12)
