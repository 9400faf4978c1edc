"""Rows of tables by their indices, whose gradients a CPU adds up in half of PyTorch's time or less.

Shapes: R rows of a table, A their width, E look-ups, K rows that each of them sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Embedding):
    """`nn.Embedding`, trained faster on a CPU where its gradients are dense.

    >>> table = Embedding(3, 2, padding_idx=0)
    >>> table(torch.tensor([1, 1, 0])).sum().backward()
    >>> table.weight.grad.tolist()
    [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return rows [..., A] at the indices [...]."""
        ours = self.weight.device.type == "cpu" and not self.sparse and torch.is_grad_enabled()
        if not ours or torch.compiler.is_compiling():
            return super().forward(input)
        found: Tensor = _Rows.apply(self.weight, input.flatten()[:, None], self.padding_idx)
        return found.unflatten(0, input.shape)


def row_sums(tables: Sequence[Tensor], codes: Sequence[Tensor]) -> Tensor:
    """Return the sum of one row of each table [R, A], by its codes [B, L], in one pass: [B, L, A].

    >>> row_sums([torch.eye(2), torch.ones(3, 2)], [torch.tensor([[1]]), torch.tensor([[2]])])
    tensor([[[1., 2.]]])
    """
    tables, codes = _joined(tables, codes)
    first = [0, *accumulate(map(len, tables))]
    rows_BLK = torch.stack([code + row for code, row in zip(codes, first, strict=False)], dim=-1)
    summed: Tensor = _Rows.apply(torch.cat(list(tables)), rows_BLK.flatten(0, 1), None)
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
    def forward(ctx: Any, table_RA: Tensor, rows_EK: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(rows_EK)
        ctx.count, ctx.padding = len(table_RA), padding
        if rows_EK.shape[1] == 1:
            return F.embedding(rows_EK[:, 0], table_RA)
        return F.embedding_bag(rows_EK, table_RA, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows_EK,), (grad_EA,) = ctx.saved_tensors, grads
        grad_RA = grad_EA.new_zeros(ctx.count, grad_EA.shape[1])
        for rows_E in rows_EK.unbind(1):
            grad_RA.index_add_(0, rows_E, grad_EA)
        if ctx.padding is not None:
            grad_RA[ctx.padding] = 0
        return grad_RA, None, None
