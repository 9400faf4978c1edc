"""Losses of the ranker: functions of logits and labels, an unknown label being NaN.

Shapes: B requests, C candidates, T tasks. All return a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.schema import DWELL, InputError, suggestion

Dwell = Literal["huber", "squared"]
Count = Callable[[Tensor], Tensor]


def own(count: Tensor) -> Tensor:
    """Return a count as it is; `recsys.peers.average` in its place counts over all processes."""
    return count


class Uncertainty(nn.Module):
    """Learned weights of tasks: each loss over its own variance, whose logarithm is added.

    Source: Kendall et al. 2018, equation 10; `dwell`, a regression, has half of its loss.

    >>> Uncertainty(["view", "dwell"])(torch.tensor([1.0, 1.0]), torch.tensor([True, True])).item()
    1.5
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(len(tasks)))
        share_T = torch.tensor([0.5 if task == DWELL else 1.0 for task in tasks])
        self.register_buffer("share", share_T, persistent=False)

    def forward(self, loss_T: Tensor, known_T: Tensor) -> Tensor:
        """Return the sum over tasks with a known label."""
        weighed_T = self.get_buffer("share") * loss_T * (-self.log_variance).exp()
        return ((weighed_T + self.log_variance / 2) * known_T).sum()


def multi_task(
    logit_BCT: Tensor,
    label_BCT: Tensor,
    *,
    tasks: Sequence[str],
    weights: Mapping[str, float] | None = None,
    uncertainty: Uncertainty | None = None,
    dwell: Dwell = "huber",
    listwise: float = 0.0,
    count: Count = own,
) -> Tensor:
    """Sum of the tasks' losses, each the mean over its known labels, weighed.

    `count`: what a mean divides by, given how much there is here.

    Binary cross-entropy; for `dwell`, whose label is seconds, Huber's loss or the squared error of
    log1p seconds. `weights`: by task, 1 where not named; `uncertainty` learns them instead.
    `listwise`: weight of a softmax among each request's candidates, added to the binary tasks.

    >>> logits, labels = torch.zeros(1, 2, 1), torch.tensor([[[1.0], [float("nan")]]])
    >>> round(multi_task(logits, labels, tasks=["view"]).item(), 4)
    0.6931
    """
    loss_T = task_losses(
        logit_BCT, label_BCT, tasks=tasks, dwell=dwell, listwise=listwise, count=count
    )
    known_T = count((~label_BCT.isnan()).flatten(0, -2).sum(0)) > 0
    if uncertainty is None:
        return (loss_T * _weights(tasks, weights or {}).to(loss_T)).sum()
    if weights:
        raise InputError("loss.weights has no effect where weights are learned: leave one out")
    return uncertainty(loss_T, known_T)


def task_losses(
    logit_BCT: Tensor,
    label_BCT: Tensor,
    *,
    tasks: Sequence[str],
    dwell: Dwell = "huber",
    listwise: float = 0.0,
    count: Count = own,
) -> Tensor:
    """Return each task's own loss, loss_T: 0 where no label is known."""
    columns = zip(tasks, logit_BCT.float().unbind(-1), label_BCT.float().unbind(-1), strict=True)
    losses = []
    for task, logit_BC, label_BC in columns:
        if task == DWELL:
            losses.append(_regression(logit_BC, label_BC, dwell, count))
        else:
            losses.append(binary(logit_BC, label_BC, count))
            if listwise:
                among = softmax_in_request(logit_BC, label_BC, count)
                losses[-1] = losses[-1] + listwise * among
    return torch.stack(losses)


def binary(logit_BC: Tensor, label_BC: Tensor, count: Count = own) -> Tensor:
    """Mean binary cross-entropy over known labels, which may be shares from 0 to 1."""
    known_BC = ~label_BC.isnan()
    label_BC = torch.where(known_BC, label_BC, 0.0)
    loss_BC = F.binary_cross_entropy_with_logits(logit_BC, label_BC, reduction="none")
    return _mean(loss_BC, known_BC, count)


def softmax_in_request(logit_BC: Tensor, label_BC: Tensor, count: Count = own) -> Tensor:
    """Mean over requests of the cross-entropy of their positives among their known candidates.

    Requests without a positive say nothing of an order. Source: ListNet (Cao et al. 2007,
    section 4.2), with a request's positives sharing its weight.
    """
    known_BC = ~label_BC.isnan()
    positive_BC = torch.where(known_BC, label_BC, 0.0)
    log_share_BC = logit_BC.masked_fill(~known_BC, -1e9).log_softmax(1)
    total_B = positive_BC.sum(1)
    loss_B = -(positive_BC * log_share_BC).sum(1) / total_B.clamp(min=1e-9)
    return _mean(loss_B, total_B > 0, count)


def _regression(answer_BC: Tensor, seconds_BC: Tensor, kind: Dwell, count: Count) -> Tensor:
    known_BC = ~seconds_BC.isnan()
    wanted_BC = torch.where(known_BC, seconds_BC, 0.0).clamp(min=0).log1p()
    if kind == "huber":
        return _mean(F.huber_loss(answer_BC, wanted_BC, reduction="none"), known_BC, count)
    if kind == "squared":
        return _mean((answer_BC - wanted_BC).square(), known_BC, count)
    raise InputError(f"loss.dwell={kind}: expected huber or squared")


def _mean(loss: Tensor, known: Tensor, count: Count) -> Tensor:
    """Return the mean where known, 0 where nothing is."""
    there = count(known.sum())
    return (loss * known).sum() / torch.where(there > 0, there, 1)


def _weights(tasks: Sequence[str], weights: Mapping[str, float]) -> Tensor:
    unknown = [name for name in weights if name not in tasks]
    if unknown:
        raise InputError(
            f"loss.weights: no task {unknown[0]!r}; tasks are {', '.join(tasks)}"
            + suggestion(unknown[0], tasks)
        )
    return torch.tensor([float(weights.get(task, 1.0)) for task in tasks])
