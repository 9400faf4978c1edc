"""From hidden states to query vectors: several interests, long and short ones, and the moment.

Shapes: B histories or packed rows, L positions, P any positions, H interests, D dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.history import GAP_BUCKETS, OWN_RECENCY
from recsys.models.layers import Path
from recsys.schema import InputError


class Interests(nn.Module):
    """Pools the path `count` times, so that interests which alternate keep a vector each.

    Source: ComiRec-SA (Cen et al. 2020, section 3.2), with a pool at every position, added to the
    state there. Keys know their place, so that a pool can look for the newest of another kind.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        if count < 2:
            raise InputError(f"model.interests={count}: expected 1 (no pooling) or more")
        self.seeds = nn.Parameter(torch.randn(count, dim))
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim + 1, dim)
        self.turn = nn.Linear(dim, count * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return interests_BLHD at every position asked for."""
        asked_BLD = path.asked(hidden_BLD)
        query_BHLD = self.query(asked_BLD)[:, None] + self.seeds[:, None]
        tens_BL1 = path.positions.expand(hidden_BLD.shape[:2])[..., None].to(hidden_BLD.dtype) / 10
        keys_B1LD = self.key(torch.cat([hidden_BLD, tens_BL1], dim=-1))[:, None]
        whole = (-1, len(self.seeds), -1, -1)
        keys, values = keys_B1LD.expand(whole), hidden_BLD[:, None].expand(whole)
        pooled_BLHD = path.attend(query_BHLD, keys, values).transpose(1, 2)
        turned_BLHD = self.turn(asked_BLD).unflatten(-1, (len(self.seeds), -1))
        return self.norm(asked_BLD[:, :, None] + pooled_BLHD + turned_BLHD)


class Blend(nn.Module):
    """Mixes what the path leads to now with what it was about all along.

    The short-term interest is the encoder's; the long-term one is the mean over the path. A gate
    that reads both sets the share of the short one, unless the caller does. In training the share
    of half of the positions is drawn instead, so that every share is a usable answer.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.long = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(2 * dim, 1)

    def forward(self, short_PHD: Tensor, mean_PD: Tensor, recency_P: Tensor) -> Tensor:
        """Return queries_PHD; `recency_P` is the short one's share from 0 to 1, or below 0."""
        long_PHD = self.norm(mean_PD + self.long(mean_PD))[..., None, :].expand_as(short_PHD)
        own_PH1 = self.gate(torch.cat([short_PHD, long_PHD], dim=-1)).sigmoid()
        given_PH1 = recency_P[..., None, None].to(own_PH1.dtype)
        share_PH1 = torch.where(given_PH1 < 0, own_PH1, given_PH1)
        return share_PH1 * short_PHD + (1 - share_PH1) * long_PHD

    def drawn(self, count: int, device: torch.device) -> Tensor:
        """Return a training step's recencies: half the gate's own, half uniform."""
        share_P = torch.rand(count, device=device)
        return torch.where(torch.rand(count, device=device) < 0.5, OWN_RECENCY, share_P)


class RequestContext(nn.Module):
    """Fits a query to when it is asked: gap since the last event, hour of day, weekday.

    A small network behind the sum lets the moment turn what the path says: after a night, another
    aisle; within a minute, not the same item again. A sum alone can only add to it.
    """

    inputs = ("request_gap", "request_hour", "request_weekday")

    def __init__(self, dim: int) -> None:
        super().__init__()
        sizes = zip(self.inputs, (GAP_BUCKETS, 24, 7), strict=True)
        self.tables = nn.ModuleDict({name: nn.Embedding(size, dim) for name, size in sizes})
        self.mix = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, query_PHD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return query_PHD for the moments [P] in `batch`."""
        for name in self.inputs:
            query_PHD = query_PHD + self.tables[name](batch[name])[..., None, :]
        return query_PHD + self.mix(query_PHD)
