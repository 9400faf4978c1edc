"""What torch's optimizers lack: Adam that touches only rows just read, and a falling rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from recsys.schema import InputError

SMALL = 4_096
"""Rows up to which a table moves as a whole."""


class LazyAdam(torch.optim.Adam):
    """Adam whose embedding tables move only in the rows that a step has read.

    A step then costs as much for five million items as for ten thousand. Moments of a row decay
    when it is read, not at every step, as in `torch.optim.SparseAdam`; all else is Adam, one kernel
    for all. `prepare` makes a model's large tables give gradients by rows.

    >>> table = nn.Embedding(3, 1, sparse=True)
    >>> before, optimizer = table.weight.detach().clone(), LazyAdam(table.parameters(), lr=0.5)
    >>> table(torch.tensor([1, 1])).sum().backward()
    >>> _ = optimizer.step()
    >>> (table.weight - before).flatten().tolist()  # doctest: +NUMBER
    [0.0, -0.50, 0.0]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, lr, betas, eps, fused=True)

    @staticmethod
    def prepare(model: nn.Module) -> None:
        """Have a model's tables give gradients by rows, but for those where all is quicker."""
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings > SMALL:
                module.sparse = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step, after `closure`, where given, has computed loss and gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None and table.grad.is_sparse:
                    self._move_rows(table, group)
                    table.grad = None
        super().step()
        return loss

    def _move_rows(self, table: Tensor, group: dict[str, Any]) -> None:
        assert table.grad is not None
        grad = table.grad.coalesce()
        rows_R, grad_RD = grad.indices()[0], grad.values()
        state, (beta1, beta2) = self._state_of(table), group["betas"]
        state["step"] += 1
        mean_RD = state["exp_avg"][rows_R].lerp_(grad_RD, 1 - beta1)
        square_RD = state["exp_avg_sq"][rows_R].lerp_(grad_RD.square(), 1 - beta2)
        state["exp_avg"][rows_R], state["exp_avg_sq"][rows_R] = mean_RD, square_RD
        steps = float(state["step"])
        scale = (1 - beta2**steps) ** 0.5 / (1 - beta1**steps)
        move_RD = mean_RD / square_RD.sqrt().add_(group["eps"])
        table.index_add_(0, rows_R, move_RD, alpha=-group["lr"] * scale)

    def _state_of(self, table: Tensor) -> dict[str, Tensor]:
        state = self.state[table]
        if not state:
            # Zeros that nobody has written to take no memory yet.
            moments = {name: torch.zeros_like(table) for name in ("exp_avg", "exp_avg_sq")}
            state |= {"step": torch.tensor(0.0)} | moments
        return dict(state)


@dataclass(frozen=True)
class Cosine:
    """A learning rate that rises over the first steps, then falls along half a cosine.

    warmup: share of a training's steps in which it rises to the optimizer's own; floor: what is
    left of it at the end, as a share. Loshchilov & Hutter 2017, section 3, without restarts. Raises
    InputError for shares beyond 0 to 1.

    >>> rate = Cosine(warmup=0.5, floor=0.1)
    >>> [round(rate.share(step, steps=8), 2) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.87, 0.55, 0.23]
    """

    warmup: float = 0.05
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "floor"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise InputError(f"schedule.{name}={share}: expected 0 or more, and less than 1")

    def __call__(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """Return what sets the rate of a training of so many steps."""
        return LambdaLR(optimizer, partial(self.share, steps=steps))

    def share(self, step: int, steps: int) -> float:
        """Return what the rate of a step is multiplied by."""
        rising = self.warmup * steps
        if step < rising:
            return min(1.0, (step + 1) / rising)
        passed = min(1.0, (step - rising) / (steps - rising))
        return self.floor + (1 - self.floor) * (1 + cos(pi * passed)) / 2
