"""The interest-trajectory model: reads a user's path, answers with query vectors.

Shapes: B batch, L history length, P supervised positions, H interests, D dim, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from recsys.data.catalogue import Catalogue
from recsys.history import GAP_BUCKETS, VALUE_BUCKETS
from recsys.models.dropout import Dropout
from recsys.models.features import Features
from recsys.models.layers import Attention, Path
from recsys.models.queries import Blend, Interests, RequestContext
from recsys.models.tables import MakeTable, whole
from recsys.schema import EVENT_TYPES, InputError

Auto = bool | Literal["auto"]
MakeLayer = Callable[..., nn.Module]
HIDDEN_VALUES = 0.1
"""Share of values that training hides: at a request the newest event may have none yet."""


def resolve(setting: Auto, available: bool, name: str, lacking: str) -> bool:
    """Return whether an input is read: `auto` reads what the dataset has.

    >>> resolve("auto", False, "event_types", "event types")
    False
    """
    if setting is True and not available:
        raise InputError(f"model.{name}=true has no effect: the dataset has no {lacking}; use auto")
    return available if setting == "auto" else bool(setting)


class Trajectory(nn.Module):
    """Reads items, event types, time gaps and values; answers with H query vectors a position.

    `layer` makes each of the `layers` (see `recsys.models.layers`). Item vectors, the id's and
    those of `item_features` (categorical) and `item_vectors` (content), are tied between input and
    output. `event_types`, `gaps`, `values` (dwell, a rating) and `context` (gap to the request,
    hour and weekday, mixed into the query) are read where the dataset has them (`auto`).
    `interests` above 1 answers with that many vectors, each item being scored by the nearest;
    `blend` mixes a long-term interest in, by its own gate or by the caller's `recency`. `table`
    makes the table of ids.
    """

    layout = "packed"

    def __init__(
        self,
        catalogue: Catalogue,
        max_length: int = 50,
        dim: int = 64,
        layers: int = 2,
        layer: MakeLayer = Attention,
        dropout: float = 0.5,
        learned_positions: bool = True,
        normed_input: bool = False,
        event_types: Auto = "auto",
        gaps: Auto = "auto",
        values: Auto = "auto",
        context: Auto = "auto",
        interests: int = 1,
        blend: bool = False,
        item_features: list[str] | None = None,
        item_vectors: list[str] | None = None,
        table: MakeTable = whole,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.items = table(catalogue.num_items + 1, dim)
        self.item_features = Features.of_items(catalogue, dim, item_features, item_vectors)
        self.layers = nn.ModuleList(layer(dim, max_length, dropout) for _ in range(layers))
        timed = catalogue.has_time and any(part.reads_times for part in self.layers)
        self.inputs = _inputs(catalogue, event_types, gaps, values, context, timed, blend)
        self.positions = nn.Embedding(max_length, dim) if learned_positions else None
        self.event_types = _table("types" in self.inputs, len(EVENT_TYPES) + 1, dim)
        self.gaps = _table("gaps" in self.inputs, GAP_BUCKETS, dim)
        self.values = _table("values" in self.inputs, VALUE_BUCKETS, dim)
        self.input_norm = nn.LayerNorm(dim) if normed_input else None
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.interests = None if interests == 1 else Interests(dim, interests)
        self.blend = Blend(dim) if blend else None
        self.context = RequestContext(dim) if "request_hour" in self.inputs else None
        self.apply(_initialise)

    def forward(self, *arrays: Tensor) -> Tensor:
        """Return queries_BHD for right-padded histories; `arrays` in the order of `inputs`."""
        batch = dict(zip(self.inputs, arrays, strict=True))
        newest_B = (batch["lengths"] - 1).clamp(min=0)
        hidden_B1HD, mean_B1D = self._read(batch, Path.padded(batch), newest_B)
        query_BHD = hidden_B1HD[:, 0]
        if self.blend is not None:
            query_BHD = self.blend(query_BHD, mean_B1D[:, 0], batch["recency"])
        return query_BHD if self.context is None else self.context(query_BHD, batch)

    def training_pairs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return query_PD (query_PHD of several interests) and target_P of positions with one."""
        real_RL = batch["targets"] > 0
        hidden_RLHD, mean_RLD = self._read(batch, Path.packed(batch))
        query_PHD, target_P = hidden_RLHD[real_RL], batch["targets"][real_RL]
        if self.blend is not None:
            recency_P = self.blend.drawn(len(query_PHD), query_PHD.device)
            query_PHD = self.blend(query_PHD, mean_RLD[real_RL], recency_P)
        if self.context is not None:
            asked = {name: batch[name][real_RL] for name in RequestContext.inputs}
            query_PHD = self.context(query_PHD, asked)
        return query_PHD.squeeze(1) if self.interests is None else query_PHD, target_P

    def item_vectors(self) -> Tensor:
        """Return vectors_ND [N + 1, D]; row 0 is padding."""
        if not self.item_features.parts:
            return self.items.weight
        every_N = torch.arange(self.items.num_embeddings, device=self.norm.weight.device)
        return self.vectors_of(every_N)

    def vectors_of(self, items: Tensor) -> Tensor:
        """Return the vectors of some item indices: shape [..., D]."""
        vectors = self.items(items)
        for part in self.item_features(items):
            vectors = vectors + part
        return vectors

    def _read(
        self, batch: Mapping[str, Tensor], path: Path, newest_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return each position's interests hidden_BLHD, and the mean of the path up to it.

        With `newest_B` those of one position a history alone, [B, 1, …], for which the last layer,
        or the pooling of interests, leaves out what no other position needs.
        """
        asked = path if newest_B is None else path.at(newest_B)
        events_BLD = self._events(batch, path)
        hidden_BLD = self._layers(self.dropout(events_BLD), path, asked)
        mean_BLD = hidden_BLD if self.blend is None else asked.mean(events_BLD)
        if self.interests is None:
            return hidden_BLD[:, :, None], mean_BLD
        return self.interests(hidden_BLD, asked), mean_BLD

    def _layers(self, hidden_BLD: Tensor, path: Path, asked: Path) -> Tensor:
        """Return the normed states: of all positions where interests pool them, else as asked."""
        wanted = asked if self.interests is None else path
        for place, layer in enumerate(self.layers, 1):
            if place == len(self.layers) and getattr(layer, "answers_asked", False):
                return self.norm(layer(hidden_BLD, wanted))
            hidden_BLD = layer(hidden_BLD, path)
        return self.norm(wanted.asked(hidden_BLD))

    def _events(self, batch: Mapping[str, Tensor], path: Path) -> Tensor:
        events = self.vectors_of(batch["items"])
        if self.input_norm is None:
            events = events * self.items.embedding_dim**0.5
        if self.positions is not None:
            events = events + self.positions(path.positions)
        if self.event_types is not None:
            events = events + self.event_types(batch["types"])
        if self.gaps is not None:
            events = events + self.gaps(batch["gaps"])
        if self.values is not None:
            events = events + self.values(self._told(batch["values"]))
        return events if self.input_norm is None else self.input_norm(events)

    def _told(self, values_BL: Tensor) -> Tensor:
        if not self.training:
            return values_BL
        hidden_BL = torch.rand(values_BL.shape, device=values_BL.device) < HIDDEN_VALUES
        return values_BL.masked_fill(hidden_BL, 0)


def _inputs(
    catalogue: Catalogue,
    event_types: Auto,
    gaps: Auto,
    values: Auto,
    context: Auto,
    timed: bool,
    blend: bool,
) -> tuple[str, ...]:
    has_time = catalogue.has_time, "timestamps"
    inputs: tuple[str, ...] = ("items", "lengths")
    if resolve(event_types, catalogue.has_types, "event_types", "event types"):
        inputs += ("types",)
    if resolve(gaps, has_time[0], "gaps", has_time[1]):
        inputs += ("gaps",)
    if resolve(values, catalogue.has_values, "values", "values"):
        inputs += ("values",)
    if timed:
        inputs += ("times",)
    if resolve(context, has_time[0], "context", has_time[1]):
        inputs += RequestContext.inputs
    return (*inputs, "recency") if blend else inputs


def _table(wanted: bool, size: int, dim: int) -> nn.Embedding | None:
    return nn.Embedding(size, dim, padding_idx=0) if wanted else None


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])
