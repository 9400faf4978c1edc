"""Rows of tables by their indices, whose gradients a CPU adds up in half of PyTorch's time or less.

Shapes: R rows of a table, A their width, E look-ups, K rows that each of them reads, G the width of
what it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MANY = 16_000
"""Look-ups from which on gradients are added up in order."""
Runs = Sequence[tuple[int, bool]]
"""How many neighbouring rows, and whether they are summed."""
ALONE: Runs = ((1, False),)


class Embedding(nn.Embedding):
    """`nn.Embedding`, trained faster on a CPU where its gradients are dense.

    >>> table = Embedding(3, 2, padding_idx=0)
    >>> table(torch.tensor([1, 1, 0])).sum().backward()
    >>> table.weight.grad.tolist()
    [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return rows [..., A] at the indices [...]."""
        if not self._ours():
            return super().forward(input)
        found: Tensor = _Rows.apply(self.weight, input.reshape(-1, 1), ALONE, self.padding_idx)
        return found.unflatten(0, input.shape)

    def summed(self, rows: Tensor, runs: Runs) -> Tensor:
        """Return the rows [..., K] of runs side by side, those of a run that sums added up.

        >>> table = Embedding.from_pretrained(torch.tensor([[1.0], [10.0], [100.0]]))
        >>> table.summed(torch.tensor([[0, 1, 1, 2]]), [(2, False), (2, True)]).tolist()
        [[1.0, 10.0, 110.0]]
        """
        if self._ours():
            found: Tensor = _Rows.apply(self.weight, rows.flatten(0, -2), runs, self.padding_idx)
            return found.unflatten(0, rows.shape[:-1])
        parts = super().forward(rows).split([width for width, _ in runs], dim=-2)
        summed = [
            part.sum(-2) if sums else part.flatten(-2)
            for part, (_, sums) in zip(parts, runs, strict=True)
        ]
        return torch.cat(summed, dim=-1)

    def _ours(self) -> bool:
        ours = self.weight.device.type == "cpu" and not self.sparse and torch.is_grad_enabled()
        return ours and not torch.compiler.is_compiling()


def row_sums(tables: Sequence[Tensor], codes: Sequence[Tensor]) -> Tensor:
    """Return the sum of one row of each table [R, A], by its codes [B, L], in one pass: [B, L, A].

    >>> row_sums([torch.eye(2), torch.ones(3, 2)], [torch.tensor([[1]]), torch.tensor([[2]])])
    tensor([[[1., 2.]]])
    """
    tables, codes = _joined(tables, codes)
    first = [0, *accumulate(map(len, tables))]
    rows_BLK = torch.stack([code + row for code, row in zip(codes, first, strict=False)], dim=-1)
    together = [(len(tables), True)]
    summed: Tensor = _Rows.apply(torch.cat(list(tables)), rows_BLK.flatten(0, 1), together, None)
    return summed.unflatten(0, codes[0].shape)


def _joined(
    tables: Sequence[Tensor], codes: Sequence[Tensor], most: int = 8192
) -> tuple[list[Tensor], list[Tensor]]:
    """Make neighbours one table of all sums of their rows, where it is small: fewer are read."""
    joined, read = [tables[0]], [codes[0]]
    for table, code in zip(tables[1:], codes[1:], strict=True):
        if len(joined[-1]) * len(table) <= most:
            joined[-1] = (joined[-1][:, None] + table).flatten(0, 1)
            read[-1] = read[-1] * len(table) + code
        else:
            joined.append(table)
            read.append(code)
    return joined, read


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table_RA: Tensor, rows_EK: Tensor, runs: Runs, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(rows_EK)
        ctx.count, ctx.runs, ctx.padding = len(table_RA), runs, padding
        parts = rows_EK.split([width for width, _ in runs], dim=1)
        found = [
            F.embedding_bag(part, table_RA, mode="sum")
            if sums
            else F.embedding(part, table_RA).flatten(1)
            for part, (_, sums) in zip(parts, runs, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows_EK,), (grad_EG,) = ctx.saved_tensors, grads
        answered = [1 if sums else count for count, sums in ctx.runs]
        width = grad_EG.shape[1] // sum(answered)
        grad_RA = grad_EG.new_zeros(ctx.count, width)
        rows = rows_EK.split([count for count, _ in ctx.runs], dim=1)
        parts = grad_EG.split([width * count for count in answered], dim=1)
        for rows_Ek, part, (_, sums) in zip(rows, parts, ctx.runs, strict=True):
            _add(grad_RA, rows_Ek if sums else rows_Ek.reshape(-1, 1), part.reshape(-1, width))
        if ctx.padding is not None:
            grad_RA[ctx.padding] = 0
        return grad_RA, None, None, None


def _add(grad_RA: Tensor, rows_EK: Tensor, grad_EA: Tensor) -> None:
    """Add the gradient of each look-up to the rows that it read.

    Many look-ups are sorted first: that takes less than to find each row in memory. PyTorch sorts
    16 bits several times faster than more.
    """
    if len(rows_EK) < MANY or len(grad_RA) > torch.iinfo(torch.int16).max:
        grad_RA.index_add_(0, rows_EK.t().flatten(), grad_EA.repeat(rows_EK.shape[1], 1))
        return
    for rows_E in rows_EK.unbind(1):
        _add_sorted(grad_RA, rows_E, grad_EA)


def _add_sorted(grad_RA: Tensor, rows_E: Tensor, grad_EA: Tensor) -> None:
    sorted_E, order_E = rows_E.short().sort(stable=True)
    count_R = torch.bincount(sorted_E, minlength=len(grad_RA))
    starts_R = count_R.cumsum(0) - count_R
    grad_RA += F.embedding_bag(order_E, grad_EA, starts_R, mode="sum")
