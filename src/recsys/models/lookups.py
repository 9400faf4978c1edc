"""Rows of tables by their indices, whose gradients a CPU adds up in half of PyTorch's time or less.

Shapes: R rows of a table, A their width, E look-ups, K rows that each of them reads, G the width of
what it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MANY = 16_000
"""Look-ups from which on gradients are added up in order."""
FEW = 256
"""Rows of a table up to which they are counted."""


class Run(NamedTuple):
    """How many neighbouring rows are read, and whether they are summed.

    values: those that a run sums are among these, or 0, which is a row of zeros.
    """

    width: int
    sums: bool = False
    values: range = range(0)

    @property
    def counted(self) -> bool:
        """Whether it is faster to count how often each value is read."""
        return self.sums and 0 < len(self.values) <= FEW


Runs = Sequence[Run]
ALONE: Runs = (Run(1),)


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
        >>> table.summed(torch.tensor([[0, 1, 1, 2]]), [Run(2), Run(2, sums=True)]).tolist()
        [[1.0, 10.0, 110.0]]
        """
        if self._ours():
            found: Tensor = _Rows.apply(self.weight, rows.flatten(0, -2), runs, self.padding_idx)
            return found.unflatten(0, rows.shape[:-1])
        parts = super().forward(rows).split([run.width for run in runs], dim=-2)
        summed = [
            part.sum(-2) if run.sums else part.flatten(-2)
            for part, run in zip(parts, runs, strict=True)
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
    together = [Run(len(tables), sums=True)]
    summed: Tensor = _Rows.apply(torch.cat(list(tables)), rows_BLK.flatten(0, 1), together, None)
    return summed.unflatten(0, codes[0].shape)


def sums_over(tables: Sequence[Tensor], codes: Sequence[Tensor], there_BL: Tensor) -> Tensor:
    """Return the sum of `row_sums` over the places that are there, in one pass: [B, A].

    Of tables with few rows each row is counted, and multiplied by how often it is read.

    >>> codes, there = [torch.tensor([[1, 0, 1]])], torch.tensor([[True, True, False]])
    >>> sums_over([torch.eye(2)], codes, there)
    tensor([[1., 1.]])
    """
    return torch.stack(
        [
            _counted(table, code_BL, there_BL)
            if len(table) <= FEW
            else _bagged(table, code_BL, there_BL)
            for table, code_BL in zip(tables, codes, strict=True)
        ]
    ).sum(0)


def _counted(table_RA: Tensor, code_BL: Tensor, there_BL: Tensor) -> Tensor:
    count_BR = table_RA.new_zeros(len(code_BL), len(table_RA))
    return count_BR.scatter_add_(1, code_BL, there_BL.to(table_RA.dtype)) @ table_RA


def _bagged(table_RA: Tensor, code_BL: Tensor, there_BL: Tensor) -> Tensor:
    nothing_1A, rows_BL = table_RA.new_zeros(1, table_RA.shape[1]), code_BL + 1
    together = [Run(code_BL.shape[1], sums=True)]
    summed: Tensor = _Rows.apply(
        torch.cat([nothing_1A, table_RA]), torch.where(there_BL, rows_BL, 0), together, 0
    )
    return summed


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
        parts = rows_EK.split([run.width for run in runs], dim=1)
        # What the gradient is added up from: rows, or how often each value was read.
        read = [
            _counts(part, run, table_RA.dtype) if run.counted else part
            for part, run in zip(parts, runs, strict=True)
        ]
        ctx.save_for_backward(*read)
        ctx.count, ctx.runs, ctx.padding = len(table_RA), runs, padding
        found = [_found(table_RA, part, run) for part, run in zip(read, runs, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        read, (grad_EG,) = ctx.saved_tensors, grads
        answered = [1 if run.sums else run.width for run in ctx.runs]
        width = grad_EG.shape[1] // sum(answered)
        grad_RA = grad_EG.new_zeros(ctx.count, width)
        parts = grad_EG.split([width * count for count in answered], dim=1)
        for read_E, part, run in zip(read, parts, ctx.runs, strict=True):
            if run.counted:
                grad_RA[run.values.start : run.values.stop] += read_E.T @ part
            else:
                rows_EK = read_E if run.sums else read_E.reshape(-1, 1)
                _add(grad_RA, rows_EK, part.reshape(-1, width))
        if ctx.padding is not None:
            grad_RA[ctx.padding] = 0
        return grad_RA, None, None, None


def _found(table_RA: Tensor, read_E: Tensor, run: Run) -> Tensor:
    if run.counted:
        return read_E @ table_RA[run.values.start : run.values.stop]
    if run.sums:
        return F.embedding_bag(read_E, table_RA, mode="sum")
    return F.embedding(read_E, table_RA).flatten(1)


def _counts(rows_EK: Tensor, run: Run, dtype: torch.dtype) -> Tensor:
    """Return how often each value of a run is among rows: [E, values]."""
    at_EK = (rows_EK - (run.values.start - 1)).clamp_(min=0)
    count_EV = torch.zeros(len(at_EK), 1 + len(run.values), dtype=dtype, device=at_EK.device)
    return count_EV.scatter_add_(1, at_EK, count_EV.new_ones(()).expand_as(at_EK))[:, 1:]


def _add(grad_RA: Tensor, rows_EK: Tensor, grad_EA: Tensor) -> None:
    """Add the gradient of each look-up to the rows that it read.

    Many look-ups are sorted first: that takes less than to find each row in memory. PyTorch sorts
    16 bits several times faster than more.
    """
    each = rows_EK.shape[1]
    lookups = len(rows_EK) * (each if each > 8 else 1)
    if lookups < MANY or len(grad_RA) > torch.iinfo(torch.int16).max:
        grad_RA.index_add_(0, rows_EK.t().flatten(), grad_EA.repeat(each, 1))
    elif len(rows_EK) < MANY:
        _add_sorted(grad_RA, rows_EK.flatten(), grad_EA, each)
    else:
        for rows_E in rows_EK.unbind(1):
            _add_sorted(grad_RA, rows_E, grad_EA)


def _add_sorted(grad_RA: Tensor, rows_E: Tensor, grad_EA: Tensor, each: int = 1) -> None:
    """Add gradients to the rows that were read; `each`: how many neighbours share a gradient."""
    sorted_E, order_E = rows_E.short().sort(stable=True)
    count_R = torch.bincount(sorted_E, minlength=len(grad_RA))
    starts_R = count_R.cumsum(0) - count_R
    grad_RA += F.embedding_bag(order_E // each, grad_EA, starts_R, mode="sum")
