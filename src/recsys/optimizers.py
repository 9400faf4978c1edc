"""Optimizers beside those of torch: Adam that touches only the rows a step has read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

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
