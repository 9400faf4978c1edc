"""The interest-trajectory model: a causal transformer over a user's path.

Shapes: B batch, L history length, P supervised positions, H interests (1), D dim, N items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.data.catalogue import Catalogue
from recsys.history import GAP_BUCKETS
from recsys.models.features import Features
from recsys.schema import EVENT_TYPES, InputError

Auto = bool | Literal["auto"]


def resolve(setting: Auto, available: bool, name: str, lacking: str) -> bool:
    """Return whether an input is read: `auto` reads what the dataset has.

    >>> resolve("auto", False, "event_types", "event types")
    False
    """
    if setting is True and not available:
        raise InputError(f"model.{name}=true has no effect: the dataset has no {lacking}; use auto")
    return available if setting == "auto" else bool(setting)


class Trajectory(nn.Module):
    """Reads items, event types and time gaps in order; answers with one query vector a position.

    Source: SASRec (Kang and McAuley 2018, section 3) with pre-normalised layers; item vectors, the
    id's and those of `item_features` (categorical) and `item_vectors` (content), are tied between
    input and output. `event_types`, `gaps` and `context` (gap to the request, hour
    and weekday, mixed into the query) are read where the dataset has them (`auto`).
    """

    layout = "packed"

    def __init__(
        self,
        catalogue: Catalogue,
        max_length: int = 50,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        feedforward: int = 64,
        dropout: float = 0.5,
        event_types: Auto = "auto",
        gaps: Auto = "auto",
        context: Auto = "auto",
        item_features: list[str] | None = None,
        item_vectors: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.inputs = _inputs(catalogue, event_types, gaps, context)
        self.items = nn.Embedding(catalogue.num_items + 1, dim, padding_idx=0)
        self.item_features = Features.of_items(catalogue, dim, item_features, item_vectors)
        self.positions = nn.Embedding(max_length, dim)
        self.event_types = _table("types" in self.inputs, len(EVENT_TYPES) + 1, dim)
        self.gaps = _table("gaps" in self.inputs, GAP_BUCKETS, dim)
        self.context = RequestContext(dim) if "request_hour" in self.inputs else None
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(dim, heads, feedforward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.apply(_initialise)

    def forward(self, *arrays: Tensor) -> Tensor:
        """Return queries_BHD for right-padded histories; `arrays` in the order of `inputs`."""
        batch = dict(zip(self.inputs, arrays, strict=True))
        items_BL = batch["items"]
        positions_L = torch.arange(items_BL.shape[1], device=items_BL.device)
        hidden_BLD = self._encode(batch, self.positions(positions_L), mask=None)
        last_B = (batch["lengths"] - 1).clamp(min=0)
        index_B1D = last_B[:, None, None].expand(-1, 1, hidden_BLD.shape[-1])
        query_BD = hidden_BLD.gather(1, index_B1D).squeeze(1)
        query_BD = query_BD if self.context is None else self.context(query_BD, batch)
        return query_BD[:, None]

    def training_pairs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return query_PD and target_P for the real positions of packed rows."""
        segments_RL = batch["segments"]
        length = segments_RL.shape[1]
        same_RLL = segments_RL[:, :, None] == segments_RL[:, None, :]
        mask_R1LL = same_RLL.tril()[:, None] if length else same_RLL[:, None]
        hidden_RLD = self._encode(batch, self.positions(batch["positions"]), mask_R1LL)
        real_RL = segments_RL > 0
        query_PD = hidden_RLD[real_RL]
        if self.context is not None:
            asked = {name: batch[name][real_RL] for name in RequestContext.inputs}
            query_PD = self.context(query_PD, asked)
        return query_PD, batch["targets"][real_RL]

    def item_vectors(self) -> Tensor:
        """Return vectors_ND [N + 1, D]; row 0 is padding."""
        if not self.item_features.parts:
            return self.items.weight
        every_N = torch.arange(self.items.num_embeddings, device=self.items.weight.device)
        return self.vectors_of(every_N)

    def vectors_of(self, items: Tensor) -> Tensor:
        """Return the vectors of some item indices: shape [..., D]."""
        vectors = self.items(items)
        for part in self.item_features(items):
            vectors = vectors + part
        return vectors

    def _encode(
        self, batch: Mapping[str, Tensor], positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        hidden = self.vectors_of(batch["items"]) * self.items.embedding_dim**0.5 + positions
        if self.event_types is not None:
            hidden = hidden + self.event_types(batch["types"])
        if self.gaps is not None:
            hidden = hidden + self.gaps(batch["gaps"])
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.norm(hidden)


class Layer(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a norm and a residual."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise InputError(f"model.dim={dim} is not a multiple of model.heads={heads}")
        self.heads = heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.project_in = nn.Linear(dim, 3 * dim)
        self.project_out = nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward), nn.GELU(), nn.Dropout(dropout), nn.Linear(feedforward, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BLD: Tensor, mask_B1LL: Tensor | None) -> Tensor:
        """Return hidden_BLD; without a mask, position t reads positions up to t."""
        attended_BLD = self._attend(self.attention_norm(hidden_BLD), mask_B1LL)
        hidden_BLD = hidden_BLD + self.dropout(attended_BLD)
        return hidden_BLD + self.dropout(self.feedforward(self.feedforward_norm(hidden_BLD)))

    def _attend(self, hidden_BLD: Tensor, mask_B1LL: Tensor | None) -> Tensor:
        # Dropping attention probabilities costs a fused kernel and buys no quality.
        heads = self.project_in(hidden_BLD).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended_BHLK = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_B1LL, is_causal=mask_B1LL is None
        )
        return self.project_out(attended_BHLK.transpose(1, 2).flatten(2))


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

    def forward(self, query_PD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return query_PD for the moments [P] in `batch`."""
        for name in self.inputs:
            query_PD = query_PD + self.tables[name](batch[name])
        return query_PD + self.mix(query_PD)


def _inputs(catalogue: Catalogue, event_types: Auto, gaps: Auto, context: Auto) -> tuple[str, ...]:
    timed = catalogue.has_time, "timestamps"
    inputs: tuple[str, ...] = ("items", "lengths")
    if resolve(event_types, catalogue.has_types, "event_types", "event types"):
        inputs += ("types",)
    if resolve(gaps, timed[0], "gaps", timed[1]):
        inputs += ("gaps",)
    if resolve(context, timed[0], "context", timed[1]):
        inputs += RequestContext.inputs
    return inputs


def _table(wanted: bool, size: int, dim: int) -> nn.Embedding | None:
    return nn.Embedding(size, dim, padding_idx=0) if wanted else None


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])
