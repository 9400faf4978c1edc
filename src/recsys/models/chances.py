"""What a ranker reads of a retriever's scores: how probable it thinks an item, and its kind.

Shapes: B requests, C candidates, H interests, D dim, N items, M some of them, V values of kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from recsys.features import OTHER, Field, Layout
from recsys.features.transitions import LEAST

ITEMS = 512
"""Items by which a ranker knows how sure a retriever is of its scores."""
KINDS = 256
"""Most values of a field that puts items into kinds."""


class RetrievalChances(nn.Module):
    """How probable a retriever thinks each candidate, and all items of its kind, by some items.

    A softmax learns scores up to a constant that differs by request; less the log of the sum of
    exp(score) over all items, a score is the log of a probability (Bengio and Senécal 2008, section
    2). A kind is a value of one of `kinds`.
    """

    vectors_MD: Tensor
    weight_M: Tensor
    member_MV: Tensor

    def __init__(self, width: int, layout: Layout) -> None:
        super().__init__()
        fields, self.index = layout.item_codes, layout.item_index
        ends = [0, *accumulate(field.size for field in fields if _is_kind(field))]
        self.firsts = dict(zip(kinds(fields), ends, strict=False))
        self.register_buffer("vectors_MD", torch.zeros(ITEMS, width))
        self.register_buffer("weight_M", torch.zeros(ITEMS))
        self.register_buffer("member_MV", torch.zeros(ITEMS, ends[-1]))

    def fit(self, vectors_ND: Tensor, codes_NW: Tensor) -> None:
        """Take items of a catalogue [N + 1, …], all where there are no more than `ITEMS`."""
        seeded = torch.Generator().manual_seed(0)
        some_M = 1 + torch.randperm(len(vectors_ND) - 1, generator=seeded)[:ITEMS]
        self.vectors_MD[: len(some_M)] = vectors_ND[some_M]
        self.weight_M.fill_(-torch.inf)
        self.weight_M[: len(some_M)] = math.log((len(vectors_ND) - 1) / len(some_M))
        for place, first in self.firsts.items():
            self.member_MV[torch.arange(len(some_M)), first + codes_NW[some_M, place]] = 1.0

    def has_met(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return which candidates the retriever's training has met: [B, C], [] where not known."""
        if self.index is None:
            return torch.ones((), dtype=torch.bool, device=self.weight_M.device)
        return batch["item_codes"][..., self.index] != OTHER

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return [B, C, 1 + kinds]: logs of probabilities, NaN where there is no history.

        Nor has an item that training has not met: its vector lies where no softmax has put it.
        """
        score_BC = batch["retrieval_scores"]
        score_BM = (batch["queries"] @ self.vectors_MD.T).amax(1) + self.weight_M
        total_B1 = score_BM.logsumexp(-1, keepdim=True)
        # No numbers too small to be normal: a product with them takes many times as long.
        share_BM = (score_BM - total_B1).clamp(min=math.log(LEAST) - 10).exp()
        log_BV = (share_BM @ self.member_MV).clamp(min=LEAST).log()
        of_kinds = [
            log_BV.gather(1, first + batch["item_codes"][..., place])
            for place, first in self.firsts.items()
        ]
        chance_BC = score_BC - total_B1
        known = [torch.where(chance_BC.isnan(), torch.nan, log_BC) for log_BC in of_kinds]
        chance_BC = torch.where(self.has_met(batch), chance_BC, torch.nan)
        return torch.stack([chance_BC, *known], dim=-1)


def kinds(fields: Sequence[Field]) -> tuple[int, ...]:
    """Return the fields that put items into few kinds, as places in an array of codes.

    >>> kinds([Field("item_id", 900), Field("genres", 20, 5), Field("brand", 40)])
    (6,)
    """
    places = accumulate((field.width for field in fields), initial=0)
    return tuple(place for field, place in zip(fields, places, strict=False) if _is_kind(field))


def _is_kind(field: Field) -> bool:
    return field.width == 1 and field.size <= KINDS
