"""Interchangeable parts of the ranker that read the path as each candidate asks of it.

Every part is told the number of item `fields` and their `dim`, `max_length`, `dropout` and whether
`types` and `gaps` are read; it answers read_BCP, P being its `width`. What depends on the path
alone is computed once a request. An empty path is no special case: it says nothing.
Shapes: B requests, C candidates, L path length, U distinct items of all paths, K item width
(fields × dim), F fields, A attention width, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.history import GAP_BUCKETS
from recsys.models.layers import Attention, Path
from recsys.schema import EVENT_TYPES, InputError

MakeLayer = Callable[..., nn.Module]


@dataclass(frozen=True)
class PathItems:
    """Item vectors of the path: [B, L, K], or of its distinct items [U, K] with `place_BL`."""

    vectors: Tensor
    place_BL: Tensor | None = None

    def through(self, layer: nn.Module) -> Tensor:
        """Return [B, L, A], a layer's answer to each item."""
        answer: Tensor = layer(self.vectors)
        return answer if self.place_BL is None else F.embedding(self.place_BL, answer)

    def newest(self, length_B: Tensor) -> Tensor:
        """Return the newest event's vector [B, 1, K], zeros where the path is empty.

        >>> items = PathItems(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
        >>> items.newest(torch.tensor([2, 0])).tolist()
        [[[2.0]], [[0.0]]]
        """
        at_B1 = (length_B - 1).clamp(min=0)[:, None]
        if self.place_BL is None:
            at_B1K = at_B1[..., None].expand(-1, 1, self.vectors.shape[2])
            newest_B1K = self.vectors.gather(1, at_B1K)
        else:
            newest_B1K = F.embedding(self.place_BL.gather(1, at_B1), self.vectors)
        return newest_B1K * (length_B > 0)[:, None, None].to(newest_B1K.dtype)


class Events(nn.Module):
    """Brings items of the path and candidates into one space, where like meets like.

    An event adds what it was, how long after the one before, and how many came since.
    """

    def __init__(self, item: int, width: int, max_length: int, types: bool, gaps: bool) -> None:
        super().__init__()
        self.item = nn.Linear(item, width, bias=False)
        self.since = nn.Embedding(max_length, width)
        self.types = nn.Embedding(len(EVENT_TYPES) + 1, width) if types else None
        self.gaps = nn.Embedding(GAP_BUCKETS, width) if gaps else None
        for table in (self.since, self.types, self.gaps):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, items: PathItems, batch: Mapping[str, Tensor]) -> Tensor:
        """Return event_BLA."""
        event_BLA = items.through(self.item)
        places_L = torch.arange(event_BLA.shape[1], device=event_BLA.device)
        since_BL = (batch["lengths"][:, None] - 1 - places_L).clamp(min=0)
        event_BLA = event_BLA + self.since(since_BL)
        for name, table in (("types", self.types), ("gaps", self.gaps)):
            if table is not None:
                event_BLA = event_BLA + table(batch[name])
        return event_BLA


class Din(nn.Module):
    """Sums the path's events, each weighed by a small network on the event and the candidate.

    Source: DIN (Zhou et al. 2018, section 4.3): the network reads [q, k, q - k, q * k] and its
    weights are not normalised, so that many like events count for more than one. Its first layer
    is taken apart: what reads q or k alone is computed once a candidate or an event, and only
    what reads their product once a pair.
    """

    def __init__(
        self,
        fields: int,
        dim: int,
        max_length: int,
        dropout: float,
        types: bool,
        gaps: bool,
        width: int = 32,
        hidden: int = 16,
    ) -> None:
        super().__init__()
        self.events = Events(fields * dim, width, max_length, types, gaps)
        self.by_query, self.by_key = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.by_product = nn.Parameter(torch.randn(hidden, width) / width**0.5)
        self.weight = nn.Linear(hidden, 1)
        self.width = 2 * width

    def forward(
        self, candidate_BCK: Tensor, items: PathItems, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the weighed sum, and the candidate itself in the same space."""
        query_BCA = self.events.item(candidate_BCK)
        key_BLA = self.events(items, batch)
        there_B1L = there(key_BLA, batch)[:, None].to(key_BLA.dtype)
        weight_BCL = self._weights(query_BCA, key_BLA) * there_B1L
        return torch.cat([weight_BCL @ key_BLA, query_BCA], dim=-1)

    def _weights(self, query_BCA: Tensor, key_BLA: Tensor) -> Tensor:
        asking_BCHA = query_BCA[:, :, None] * self.by_product
        pairs_BXL = asking_BCHA.flatten(1, 2) @ key_BLA.transpose(1, 2)
        pairs_BCHL = pairs_BXL.unflatten(1, (-1, self.by_product.shape[0]))
        keys_B1HL = self.by_key(key_BLA).transpose(1, 2)[:, None]
        hidden_BCHL = F.relu(pairs_BCHL + keys_B1HL + self.by_query(query_BCA)[..., None])
        return (self.weight.weight @ hidden_BCHL).squeeze(2) + self.weight.bias


class TargetAttention(nn.Module):
    """Every candidate attends to the path in several heads; the newest event is compared beside.

    Place, type and gap are part of an event's key, and the candidates' queries have a bias: so a
    head can prefer fresh events whatever the candidate is. Beside the path stands one learned
    event that says nothing, to attend to where no other is to the point, or there. The newest
    event is compared with the candidate field by field. Source: the question is DIN's (Zhou et
    al. 2018), the attention that of Vaswani et al. 2017, section 3.2.
    """

    field_KF: Tensor

    def __init__(
        self,
        fields: int,
        dim: int,
        max_length: int,
        dropout: float,
        types: bool,
        gaps: bool,
        width: int = 32,
        heads: int = 2,
    ) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"model.path.width={width} is not a multiple of its heads={heads}")
        self.heads = heads
        self.events = Events(fields * dim, width, max_length, types, gaps)
        self.nothing = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        field_KF = torch.eye(fields).repeat_interleave(dim, dim=0)
        self.register_buffer("field_KF", field_KF, persistent=False)
        self.width = 2 * width + fields

    def forward(
        self, candidate_BCK: Tensor, items: PathItems, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """Return what was attended to, how it agrees with the candidate, and the newest event."""
        event_BLA = self._read(self.events(items, batch))
        query_BCA = self.query(self.events.item(candidate_BCK))
        attended_BCA = self._attended(query_BCA, event_BLA, there(event_BLA, batch))
        newest_BK1 = items.newest(batch["lengths"]).transpose(1, 2)
        alike_BCF = candidate_BCK @ (newest_BK1 * self.field_KF)
        return torch.cat([attended_BCA, attended_BCA * query_BCA, alike_BCF], dim=-1)

    def _read(self, event_BLA: Tensor) -> Tensor:
        """Return the events as they are."""
        return event_BLA

    def _attended(self, query_BCA: Tensor, event_BLA: Tensor, there_BL: Tensor) -> Tensor:
        nothing_B1A = self.nothing.expand(event_BLA.shape[0], -1, -1)
        read_BLA = torch.cat([nothing_B1A, event_BLA], dim=1)
        key_BLA, value_BLA = self.key_value(read_BLA).chunk(2, dim=-1)
        seen_BL = torch.cat([torch.ones_like(there_BL[:, :1]), there_BL], dim=1)
        return self._attend(query_BCA, key_BLA, value_BLA, seen_BL[:, None, None])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen_B11L: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            # ONNX Runtime wants a row of the mask for every query.
            seen_B1CL = seen_B11L.expand(-1, -1, query.shape[1], -1)
            return self._as_one_node(query, key, value, seen_B1CL)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_B11L)
        return attended.transpose(1, 2).flatten(2)

    def _as_one_node(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "Attention",
            (query, key, value, seen),
            {"q_num_heads": self.heads, "kv_num_heads": self.heads},
            dtype=query.dtype,
            shape=query.shape,
            version=23,
        )


class Transformer(TargetAttention):
    """Layers of self-attention over the path, once a request; then every candidate attends to it.

    Source: BST (Chen et al. 2019, section 2.2), with the candidate asking afterwards rather than
    being one of the sequence, which would take a pass over the path for every candidate.
    """

    def __init__(
        self,
        fields: int,
        dim: int,
        max_length: int,
        dropout: float,
        types: bool,
        gaps: bool,
        width: int = 32,
        heads: int = 2,
        layers: int = 1,
        layer: MakeLayer = Attention,
    ) -> None:
        super().__init__(fields, dim, max_length, dropout, types, gaps, width, heads)
        self.layers = nn.ModuleList(layer(width, max_length, dropout) for _ in range(layers))
        if any(part.reads_times for part in self.layers):
            raise InputError(
                "model.path.layer reads times, which the ranker does not have; use attention"
            )

    def _read(self, event_BLA: Tensor) -> Tensor:
        path = Path(torch.arange(event_BLA.shape[1], device=event_BLA.device))
        for layer in self.layers:
            event_BLA = layer(event_BLA, path)
        return event_BLA


def there(event_BLA: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return where the path has an event rather than padding: bool [B, L]."""
    places_L = torch.arange(event_BLA.shape[1], device=event_BLA.device)
    return places_L < batch["lengths"][:, None]
