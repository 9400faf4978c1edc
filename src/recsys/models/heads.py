"""Interchangeable heads of the ranker: from hidden features to one logit a task.

Every head is told `width`, `tasks` and `dropout`, and answers logit_NT. With `esmm` the funnel's
tasks are chained: each is learned over everything shown, as the one before times a step.
Shapes: N candidates of all requests, H width, T tasks, E experts, X width of an expert or a tower,
Y = T × X, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.models.crossing import dense
from recsys.schema import DWELL, EVENT_TYPES, InputError, suggestion

Esmm = bool | Sequence[str]


class SharedBottom(nn.Module):
    """One network below, a small tower for each task (Caruana 1997), all of them side by side."""

    def __init__(
        self,
        width: int,
        tasks: Sequence[str],
        dropout: float,
        hidden: int = 64,
        tower: int = 16,
        esmm: Esmm = False,
    ) -> None:
        super().__init__()
        widths = [hidden, len(tasks) * tower]
        self.below = nn.Sequential(nn.Linear(width, hidden), *dense(widths, dropout))
        self.weight_TX = nn.Parameter(torch.randn(len(tasks), tower) / (3 * tower) ** 0.5)
        self.bias_T = nn.Parameter(torch.zeros(len(tasks)))
        self.funnel = chained(tasks, esmm)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Return logit_NT."""
        weight_TY = torch.block_diag(*self.weight_TX)
        logit_NT: Tensor = self.funnel(F.linear(self.below(hidden_NH), weight_TY, self.bias_T))
        return logit_NT


class Mmoe(nn.Module):
    """Experts that all tasks share, weighed by a gate of each task's own (Ma et al. 2018)."""

    def __init__(
        self,
        width: int,
        tasks: Sequence[str],
        dropout: float,
        experts: int = 4,
        hidden: int = 32,
        tower: int = 16,
        esmm: Esmm = False,
    ) -> None:
        super().__init__()
        self.experts = Experts(width, experts, hidden, dropout)
        self.gates = nn.Linear(width, len(tasks) * experts)
        self.towers = Towers(hidden, len(tasks), tower, dropout)
        self.funnel = chained(tasks, esmm)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Return logit_NT."""
        gate_NTE = self.gates(hidden_NH).unflatten(-1, (len(self.towers), -1)).softmax(-1)
        mixed_NTX = gate_NTE @ self.experts(hidden_NH)
        logit_NT: Tensor = self.funnel(self.towers(mixed_NTX.unbind(1)))
        return logit_NT


class Ple(nn.Module):
    """Experts of each task's own beside shared ones, in levels (Tang et al. 2020, section 4.2)."""

    def __init__(
        self,
        width: int,
        tasks: Sequence[str],
        dropout: float,
        shared: int = 2,
        own: int = 1,
        hidden: int = 32,
        levels: int = 1,
        tower: int = 16,
        esmm: Esmm = False,
    ) -> None:
        super().__init__()
        if min(shared, own, levels) < 1:
            raise InputError("model.heads: expected shared, own and levels of 1 or more")
        widths = [width] + [hidden] * (levels - 1)
        self.levels = nn.ModuleList(
            Extraction(before, len(tasks), shared, own, hidden, dropout, place == levels)
            for place, before in enumerate(widths, 1)
        )
        self.towers = Towers(hidden, len(tasks), tower, dropout)
        self.funnel = chained(tasks, esmm)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Return logit_NT."""
        parts: Sequence[Tensor] = [hidden_NH] * (len(self.towers) + 1)
        for level in self.levels:
            parts = level(parts)
        logit_NT: Tensor = self.funnel(self.towers(parts))
        return logit_NT


class Extraction(nn.Module):
    """One level of PLE: a task's gate sees its own and the shared experts, the shared gate all.

    It reads the features of each task and the shared ones, and answers with the same; the last
    level with those of the tasks alone.
    """

    def __init__(
        self,
        width: int,
        tasks: int,
        shared: int,
        own: int,
        hidden: int,
        dropout: float,
        last: bool,
    ) -> None:
        super().__init__()
        counts = [own] * tasks + [shared]
        self.experts = nn.ModuleList(Experts(width, count, hidden, dropout) for count in counts)
        gates = tasks if last else tasks + 1
        self.gates = nn.ModuleList(nn.Linear(width, sum(counts)) for _ in range(gates))
        self.register_buffer("hidden_GE", _foreign(tasks, shared, own)[:gates], persistent=False)

    def forward(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return [N, X] each."""
        expert_NEX = torch.cat([e(x) for e, x in zip(self.experts, parts, strict=True)], dim=1)
        gates = [gate(part) for gate, part in zip(self.gates, parts, strict=False)]
        gate_NGE = (torch.stack(gates, dim=1) + self.get_buffer("hidden_GE")).softmax(-1)
        return (gate_NGE @ expert_NEX).unbind(1)


def _foreign(tasks: int, shared: int, own: int) -> Tensor:
    """Return what to add to each gate's logits: -1e9 where an expert is another task's own."""
    of_E = torch.arange(tasks).repeat_interleave(own)
    foreign_TE = of_E != torch.arange(tasks)[:, None]
    of_tasks = torch.cat([foreign_TE, torch.zeros(tasks, shared, dtype=torch.bool)], dim=1)
    of_all = torch.zeros(1, of_tasks.shape[1], dtype=torch.bool)
    return torch.cat([of_tasks, of_all]).float() * -1e9


class Experts(nn.Module):
    """Networks of one layer side by side: from [N, H] to [N, E, X]."""

    def __init__(self, width: int, count: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.count = count
        self.layers = nn.Sequential(
            nn.Linear(width, count * hidden), *dense([count * hidden], dropout)
        )

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Return expert_NEX."""
        expert_NEX: Tensor = self.layers(hidden_NH).unflatten(-1, (self.count, -1))
        return expert_NEX


class Towers(nn.ModuleList):
    """A small network for each task, on that task's own features."""

    def __init__(self, width: int, tasks: int, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(width, hidden), *dense([hidden], dropout), nn.Linear(hidden, 1))
            for _ in range(tasks)
        )

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Return logit_NT of [N, X] each task."""
        logits = [tower(part) for tower, part in zip(self, parts, strict=True)]
        return torch.cat(logits, dim=-1)


class Funnel(nn.Module):
    """Chains logits: a task's is that of P(task before) * P(task | task before), in log space.

    `places` are the chained tasks' places, in the funnel's order; others pass as they are.
    Source: ESMM (Ma et al. 2018b, section 2.2).

    >>> logit = Funnel([0, 1], 2)(torch.tensor([[0.0, 0.0]]))
    >>> logit.sigmoid().tolist()
    [[0.5, 0.25]]
    """

    def __init__(self, places: Sequence[int], tasks: int) -> None:
        super().__init__()
        self.places, self.tasks = tuple(places), tasks

    def forward(self, logit_NT: Tensor) -> Tensor:
        """Return logit_NT of the whole space."""
        columns = list(logit_NT.unbind(-1))
        log_yes, log_no = _log_sigmoids(columns[self.places[0]])
        for place in self.places[1:]:
            log_step, log_stop = _log_sigmoids(columns[place])
            log_no = _log_of_sum(log_no, log_yes + log_stop)
            log_yes = log_yes + log_step
            columns[place] = log_yes - log_no
        return torch.stack(columns, dim=-1)


def chained(tasks: Sequence[str], esmm: Esmm) -> nn.Module:
    """Return the funnel of `esmm`: true is all of the event types among the tasks, in their order.

    >>> chained(["purchase", "view"], True).places
    (1, 0)
    """
    if esmm is False:
        return nn.Identity()
    wanted = [name for name in EVENT_TYPES if name in tasks] if esmm is True else list(esmm)
    for name in wanted:
        if name not in tasks or name == DWELL:
            binary = [task for task in tasks if task != DWELL]
            raise InputError(
                f"model.heads.esmm: no task {name!r} to chain; tasks are {', '.join(binary)}"
                + suggestion(name, binary)
            )
    if len(wanted) < 2:
        raise InputError(
            f"model.heads.esmm has no effect on the tasks {', '.join(tasks)}: it chains two or "
            f"more of {', '.join(EVENT_TYPES)}, or those it lists; use model.heads.esmm=false"
        )
    return Funnel([list(tasks).index(name) for name in wanted], len(tasks))


def _log_sigmoids(logit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logs of sigmoid(logit) and of 1 - sigmoid(logit)."""
    return -F.softplus(-logit), -F.softplus(logit)


def _log_of_sum(left: Tensor, right: Tensor) -> Tensor:
    # Not torch.logaddexp: its exported form takes the exponentials as they are, which underflow.
    return torch.maximum(left, right) + F.softplus(-(left - right).abs())
