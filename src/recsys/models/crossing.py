"""Interchangeable parts of the ranker that cross features of a request with a candidate's.

Every part is told `request_width`, `candidate_width` and `dropout`, reads request_BR and
candidate_BCK and answers hidden_NH, H being its `width`. In a `SplitLinear` what a request's own
features add is computed once a request, never once a candidate. What follows is flat, N: a layer
and its bias are then one node of an ONNX graph.
Shapes: B requests, C candidates, N = B × C, R and K widths of both, V rank, H width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.models.dropout import Dropout
from recsys.schema import InputError


class SplitLinear(nn.Module):
    """A linear layer on a request's features and a candidate's, without joining the two.

    >>> split = SplitLinear(3, 5, 2)
    >>> split(torch.ones(4, 3), torch.ones(4, 7, 5)).shape
    torch.Size([4, 7, 2])
    """

    def __init__(self, request_width: int, candidate_width: int, width: int) -> None:
        super().__init__()
        self.request = nn.Linear(request_width, width)
        self.candidate = nn.Linear(candidate_width, width, bias=False)
        for part in (self.request, self.candidate):
            nn.init.normal_(part.weight, std=math.sqrt(2 / (request_width + candidate_width)))
        nn.init.zeros_(self.request.bias)

    def forward(self, request: Tensor, candidate: Tensor) -> Tensor:
        """Return the sum of both sides; `request` [B, R] or [B, C, R], `candidate` [B, C, K]."""
        of_request: Tensor = self.request(request)
        if of_request.ndim == 2:
            of_request = of_request[:, None]
        return of_request + cast(Tensor, self.candidate(candidate))


class Mlp(nn.Module):
    """A plain network on all features, its first layer split."""

    def __init__(
        self,
        request_width: int,
        candidate_width: int,
        dropout: float,
        hidden: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__()
        self.width = _checked(hidden)[-1]
        self.first = SplitLinear(request_width, candidate_width, hidden[0])
        self.rest = dense(hidden, dropout)

    def forward(self, request_BR: Tensor, candidate_BCK: Tensor) -> Tensor:
        """Return hidden_NH."""
        return self.read(request_BR, candidate_BCK)

    def read(self, request: Tensor, candidate: Tensor) -> Tensor:
        """Return hidden_NH of features as `SplitLinear` reads them."""
        hidden_NH: Tensor = self.rest(self.first(request, candidate).flatten(0, 1))
        return hidden_NH


class Dcnv2(nn.Module):
    """Low-rank cross layers on a candidate's features, a deep network on all behind or beside them.

    Source: DCN V2 (Wang et al. 2021, section 3.1, and 3.5 for the low rank), which crosses a
    request's features with each other too: that is left to the deep network here. `stacked`: it
    reads the crossed features; `parallel`: the plain ones, and what was crossed is brought to the
    same width beside it.
    """

    def __init__(
        self,
        request_width: int,
        candidate_width: int,
        dropout: float,
        layers: int = 2,
        rank: int = 16,
        hidden: Sequence[int] = (64,),
        structure: Literal["parallel", "stacked"] = "stacked",
    ) -> None:
        super().__init__()
        if structure not in ("parallel", "stacked"):
            raise InputError(f"model.crossing.structure={structure}: expected parallel or stacked")
        widths = request_width, candidate_width
        self.cross = LowRankCross(*widths, layers, rank)
        self.deep = Mlp(*widths, dropout, hidden)
        self.beside = SplitLinear(*widths, hidden[-1]) if structure == "parallel" else None
        self.width = hidden[-1] * (1 if self.beside is None else 2)

    def forward(self, request_BR: Tensor, candidate_BCK: Tensor) -> Tensor:
        """Return hidden_NH."""
        crossed_BCK = self.cross(request_BR, candidate_BCK)
        if self.beside is None:
            return self.deep.read(request_BR, crossed_BCK)
        beside_NH = self.beside(request_BR, crossed_BCK).flatten(0, 1)
        return torch.cat([beside_NH, self.deep.read(request_BR, candidate_BCK)], dim=-1)


class LowRankCross(nn.Module):
    """Cross layers, x0 * (U V x + b) + x each: together x0 times a factor that they add to.

    What is multiplied, x0, is a candidate's features; V reads the request's beside them. There is
    one b: what those of further layers would add, the linear layer behind them can.
    """

    def __init__(self, request_width: int, candidate_width: int, layers: int, rank: int) -> None:
        super().__init__()
        if min(layers, rank) < 1:
            raise InputError(
                f"model.crossing.layers={layers}, rank={rank}: expected 1 or more of both"
            )
        widths = request_width, candidate_width
        self.narrow = nn.ModuleList(SplitLinear(*widths, rank) for _ in range(layers))
        self.widen = nn.ParameterList(
            nn.Parameter(torch.randn(rank, candidate_width) / (3 * rank) ** 0.5)
            for _ in range(layers)
        )
        self.bias = nn.Parameter(torch.ones(candidate_width))

    def forward(self, request_BR: Tensor, candidate_BCK: Tensor) -> Tensor:
        """Return the candidate's crossed features [B, C, K]."""
        plain_NK, factor_NK = candidate_BCK.flatten(0, 1), cast(Tensor, self.bias)
        crossed_BCK = candidate_BCK
        for narrow, widen_VK in zip(self.narrow, self.widen, strict=True):
            narrow_NV = narrow(request_BR, crossed_BCK).flatten(0, 1)
            factor_NK = torch.addmm(factor_NK, narrow_NV, widen_VK)
            crossed_BCK = (plain_NK * factor_NK).view_as(candidate_BCK)
        return crossed_BCK


class FinalMlp(nn.Module):
    """Two streams, each reading features through its own gate, fused by a bilinear product.

    Source: FinalMLP (Mao et al. 2023, sections 3.2 and 3.3). One stream is gated by the request's
    features, the other by the candidate's; of the fused product every head's terms are handed
    on beside both streams, so that a linear layer on them is the paper's own output.
    """

    def __init__(
        self,
        request_width: int,
        candidate_width: int,
        dropout: float,
        hidden: Sequence[int] = (64, 32),
        gate: int = 32,
        fusion_heads: int = 2,
    ) -> None:
        super().__init__()
        if hidden[-1] % fusion_heads:
            raise InputError(
                f"model.crossing.fusion_heads={fusion_heads} does not divide the last of "
                f"model.crossing.hidden, {hidden[-1]}"
            )
        widths = request_width, candidate_width
        self.gates = nn.ModuleList(Gate(read, gate, widths) for read in widths)
        self.streams = nn.ModuleList(Mlp(*widths, dropout, hidden) for _ in widths)
        part = hidden[-1] // fusion_heads
        self.fusion = nn.ModuleList(nn.Linear(part, part, bias=False) for _ in range(fusion_heads))
        self.width = 3 * hidden[-1]

    def forward(self, request_BR: Tensor, candidate_BCK: Tensor) -> Tensor:
        """Return hidden_NH."""
        plain = request_BR[:, None], candidate_BCK
        streams_NH = []
        for context, gate, stream in zip(plain, self.gates, self.streams, strict=True):
            request, candidate = (x * g for x, g in zip(plain, gate(context), strict=True))
            streams_NH.append(stream.read(request, candidate))  # type: ignore[operator]
        return torch.cat([*streams_NH, self._fused(*streams_NH)], dim=-1)

    def _fused(self, left_NH: Tensor, right_NH: Tensor) -> Tensor:
        parts = left_NH.chunk(len(self.fusion), dim=-1)
        turned = [turn(part) for turn, part in zip(self.fusion, parts, strict=True)]
        return torch.cat(turned, dim=-1) * right_NH


class Gate(nn.Module):
    """Weighs every feature from 0 to 2 by what a context says (FinalMLP, equation 5)."""

    def __init__(self, context_width: int, hidden: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.hidden = nn.Linear(context_width, hidden)
        self.sides = nn.ModuleList(nn.Linear(hidden, width) for width in widths)

    def forward(self, context: Tensor) -> list[Tensor]:
        """Return the weights of the request's features and of the candidate's."""
        hidden = F.relu(self.hidden(context))
        return [2 * side(hidden).sigmoid() for side in self.sides]


def dense(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Return what follows a layer of `widths[0]`: its activation, then the further layers."""
    steps: list[nn.Module] = [nn.ReLU(), Dropout(dropout)]
    for before, after in itertools.pairwise(widths):
        steps += [nn.Linear(before, after), nn.ReLU(), Dropout(dropout)]
    return nn.Sequential(*steps)


def _checked(hidden: Sequence[int]) -> Sequence[int]:
    if not hidden or min(hidden) < 1:
        raise InputError(f"model.crossing.hidden={list(hidden)}: expected widths, as in [128, 64]")
    return hidden
