"""What a ranker says of what was shown, and how well that agrees with what came of it.

Shapes: B requests, C candidates, T tasks, R shown items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from recsys.data.shown import Shown, as_model, chunks, grid
from recsys.evaluation.calibration import sigmoid
from recsys.schema import DWELL
from recsys.task_metrics import task_metrics

TOGETHER = 256
"""Requests that a model reads at a time."""
LONGEST = 20.0
"""Largest log1p of seconds: some fifteen years."""


@torch.no_grad()
def predict(
    model: nn.Module, examples: Shown, part: str, device: torch.device | str = "cpu"
) -> NDArray[np.float64]:
    """Return the model's logits of a part's shown items: [R, T], in their order."""
    inputs = cast("tuple[str, ...]", model.inputs)
    requests = examples.requests(part)
    found = [np.zeros((0, len(examples.examples.tasks)))]
    for some in chunks(len(requests), TOGETHER):
        arrays = examples.arrays(requests[some], inputs)
        given = (torch.from_numpy(as_model(arrays[name])).to(device) for name in inputs)
        logit_BCT = model(*given).float().cpu().numpy()
        found.append(logit_BCT[grid(examples.examples.offsets, requests[some]) >= 0])
    return np.concatenate(found)


def measured(logit_RT: NDArray[np.floating], examples: Shown, part: str) -> dict[str, float]:
    """Return figures of logits on a part, with `auc` and `log_loss` as means over binary tasks.

    What is not defined, such as an AUC of one class, is left out; a mean of nothing too.
    """
    rows, tasks = examples.examples.rows(part), examples.examples.tasks
    probability_RT = probabilities(logit_RT, tasks)
    labels_RT = examples.examples.labels[rows]
    found = task_metrics(probability_RT, labels_RT, tasks, examples.users_of(part))
    found = {name: value for name, value in found.items() if np.isfinite(value)}
    means: dict[str, float] = {}
    for name in ("auc", "log_loss"):
        values = [found[f"{task}/{name}"] for task in tasks if f"{task}/{name}" in found]
        means |= {name: float(np.mean(values))} if values else {}
    return means | found


def probabilities(logit_RT: NDArray[np.floating], tasks: Sequence[str]) -> NDArray[np.float64]:
    """Return probabilities of binary tasks, and seconds of `dwell`."""
    dwell_T = np.array([task == DWELL for task in tasks])
    return np.where(dwell_T, np.expm1(np.clip(logit_RT, 0, LONGEST)), sigmoid(logit_RT))
