"""Causal attention within packed histories, as it is trained on a CPU that multiplies bf16.

Shapes: R rows, H heads, L positions, K width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LONGEST = 256
"""Positions of a row up to which it is done so: bf16 counts its segments exactly, and two bytes are
kept for each pair of positions."""
FAR = -1e30
"""Added to what may not be read: a softmax makes 0 of it, and the sum of two is still a number."""


def unread(segments_RL: Tensor) -> Tensor:
    """Return bf16 [R, 1, L, L] to add to logits: 0 where a position may read another, else `FAR`.

    A position reads itself and earlier ones of its own segment. L is at most `LONGEST`.

    >>> (unread(torch.tensor([[1, 1, 2]])) == 0).int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    """
    length = segments_RL.shape[1]
    part_RL = segments_RL.to(torch.bfloat16)
    other_RLL = (part_RL[:, :, None] - part_RL[:, None, :]).abs_().mul_(FAR)
    later_LL = torch.full((length, length), FAR, dtype=torch.bfloat16, device=segments_RL.device)
    return other_RLL.add_(later_LL.triu_(1))[:, None]


class PackedAttention(torch.autograd.Function):
    """Softmax attention [R, H, L, K], its products in bf16, its weights kept for the gradients.

    Values may be of another width than queries and keys.

    For short paths and narrow heads that takes two thirds of the time of PyTorch's fused kernel on
    a CPU, whose backward pass computes the weights again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, unread_R1LL: Tensor) -> Tensor:
        """Return what was attended to, in the queries' own format."""
        ctx.like = [(part.shape, part.dtype) for part in (query, key, value)]
        rows, heads, length, _ = query.shape
        ctx.scale = query.shape[-1] ** -0.5
        query_, key_, value_ = (_flat(part) for part in (query * ctx.scale, key, value))
        logits = torch.bmm(query_, key_.transpose(1, 2)).view(rows, heads, length, length)
        weights = logits.add_(unread_R1LL).softmax(-1).flatten(0, 1)
        ctx.save_for_backward(query_, key_, value_, weights)
        return torch.bmm(weights, value_).view(value.shape).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        query_, key_, value_, weights = ctx.saved_tensors
        grad = _flat(grads[0])
        of_value = torch.bmm(weights.transpose(1, 2), grad)
        of_weights = torch.bmm(grad, value_.transpose(1, 2))
        of_logits = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = torch.bmm(of_logits, key_) * ctx.scale
        of_key = torch.bmm(of_logits.transpose(1, 2), query_)
        found = zip((of_query, of_key, of_value), ctx.like, strict=True)
        return *(part.view(shape).to(kind) for part, (shape, kind) in found), None


def _flat(part_RHLK: Tensor) -> Tensor:
    return part_RHLK.to(torch.bfloat16).reshape(-1, *part_RHLK.shape[2:])
