"""Interchangeable parts of the ranker that read the path as each candidate asks of it.

Every part is told the number of item `fields` and their `dim`, `max_length`, `dropout` and which of
`OF_EVENTS` it `reads` of each event; it answers read_BCP, P being its `width`. What depends on the
path alone is computed once a request; what a candidate asks of any path, `asks`, is known before
one. An empty path is no special case: it says nothing.
Shapes: B requests, C candidates, L path length, U distinct items of all paths, K item width
(fields × dim), F fields, A attention width (`asks_width`), H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.history import GAP_BUCKETS, VALUE_BUCKETS
from recsys.models.layers import Attention, Path
from recsys.models.lookups import row_sums, sums_over
from recsys.schema import EVENT_TYPES, InputError

MakeLayer = Callable[..., nn.Module]
OF_EVENTS = {"types": len(EVENT_TYPES) + 1, "gaps": GAP_BUCKETS, "values": VALUE_BUCKETS}
"""What may be read of an event beside its item, and how many codes each has."""


@dataclass(frozen=True)
class PathItems:
    """Item vectors of the path: [B, L, K], or of its distinct items [U, K] with `place_BL`."""

    vectors: Tensor
    place_BL: Tensor | None = None

    @property
    def length(self) -> int:
        """How long the paths are, padding included."""
        return (self.vectors if self.place_BL is None else self.place_BL).shape[1]

    def through(
        self, layer: nn.Module, tables: Sequence[Tensor], codes: Sequence[Tensor]
    ) -> Tensor:
        """Return a layer's answer to each item plus a row of every table, by codes: [B, L, A]."""
        answer: Tensor = layer(self.vectors)
        if self.place_BL is not None:
            return row_sums([answer, *tables], [self.place_BL, *codes])
        for table, code_BL in zip(tables, codes, strict=True):
            answer = answer + F.embedding(code_BL, table)
        return answer

    def summed(
        self, layer: nn.Module, tables: Sequence[Tensor], codes: Sequence[Tensor], there_BL: Tensor
    ) -> Tensor:
        """Return the sum of `through` over the places that are there: [B, A]."""
        if self.place_BL is None:
            told_BLA = self.through(layer, tables, codes)
            return (there_BL[:, None].to(told_BLA.dtype) @ told_BLA).squeeze(1)
        return sums_over([layer(self.vectors), *tables], [self.place_BL, *codes], there_BL)

    def newest(self, length_B: Tensor) -> Tensor:
        """Return the newest event's vector [B, 1, K], zeros where the path is empty.

        >>> items = PathItems(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
        >>> items.newest(torch.tensor([2, 0])).tolist()
        [[[2.0]], [[0.0]]]
        """
        last_B1 = length_B[:, None] - 1
        if self.place_BL is None:
            # A product with a row of the identity, and of nothing: fewer nodes of a graph.
            places_L = torch.arange(self.length, device=length_B.device)
            return (places_L == last_B1).to(self.vectors.dtype)[:, None] @ self.vectors
        newest_B1K = F.embedding(self.place_BL.gather(1, last_B1.clamp(min=0)), self.vectors)
        return newest_B1K * (last_B1 >= 0)[..., None].to(newest_B1K.dtype)


class Events(nn.Module):
    """Brings items of the path and candidates into one space, where like meets like.

    An event adds how many came since, and what is read of it: its type, how long after the one
    before, its value. The newest event's value is not read: a dwell is not known before it ends.
    """

    def __init__(self, item: int, width: int, max_length: int, reads: Sequence[str]) -> None:
        super().__init__()
        self.item = nn.Linear(item, width, bias=False)
        self.reads = tuple(reads)
        for name, size in {"since": max_length, **{n: OF_EVENTS[n] for n in reads}}.items():
            table = nn.Embedding(size, width)
            nn.init.normal_(table.weight, std=0.02)
            self.add_module(name, table)

    def forward(self, items: PathItems, batch: Mapping[str, Tensor]) -> Tensor:
        """Return event_BLA."""
        return items.through(self.item, *self._told(items.length, batch))

    def mean(self, items: PathItems, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean of each path's events [B, A], zeros where it is empty."""
        there_BL = there(items.length, batch)
        sum_BA = items.summed(self.item, *self._told(items.length, batch), there_BL)
        return sum_BA / batch["lengths"].clamp(min=1)[:, None]

    def _told(self, length: int, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tables of what is read of events, and each event's codes [B, L] in them."""
        length_B1 = batch["lengths"][:, None]
        places_L = torch.arange(length, device=length_B1.device)
        since_BL = (length_B1 - 1 - places_L).clamp(min=0)
        told = {"since": since_BL, **{name: batch[name] for name in self.reads}}
        if "values" in told:
            told["values"] = told["values"].masked_fill(since_BL == 0, 0)
        tables = [cast(nn.Embedding, self.get_submodule(name)).weight for name in told]
        return tables, list(told.values())


class Pooled(nn.Module):
    """What is pooled of a path's events, and something as wide: 2 A for each candidate."""

    def __init__(self, events: Events, width: int) -> None:
        super().__init__()
        self.events, self.asks_width, self.width = events, width, 2 * width

    def asks(self, candidate_BCK: Tensor) -> Tensor:
        """Return the candidates in the events' space: [B, C, A]."""
        return cast(Tensor, self.events.item(candidate_BCK))


class Mean(Pooled):
    """The mean of the path's events, whatever the candidate, and its product with the candidate.

    Source: average pooling, as of Covington et al. 2016, section 3.2.
    """

    def __init__(
        self,
        fields: int,
        dim: int,
        max_length: int,
        dropout: float,
        reads: Sequence[str],
        width: int = 16,
    ) -> None:
        super().__init__(Events(fields * dim, width, max_length, reads), width)

    def forward(
        self,
        candidate_BCK: Tensor,
        query_BCA: Tensor,
        items: PathItems,
        batch: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the mean beside each candidate, and their product."""
        mean_BCA = self.events.mean(items, batch)[:, None].expand_as(query_BCA)
        return torch.cat([mean_BCA, mean_BCA * query_BCA], dim=-1)


class Din(Pooled):
    """Sums the path's events, each weighed by a small network on the event and the candidate.

    Source: DIN (Zhou et al. 2018, section 4.3): the network reads [q, k, q - k, q * k] and its
    weights are not normalised, so that many like events count for more than one. Its first layer
    is taken apart: what reads q alone is computed once a candidate, and what reads k and q * k is
    one product of every event with a matrix of the candidate's own.
    """

    def __init__(
        self,
        fields: int,
        dim: int,
        max_length: int,
        dropout: float,
        reads: Sequence[str],
        width: int = 16,
        hidden: int = 16,
    ) -> None:
        super().__init__(Events(fields * dim, width, max_length, reads), width)
        self.by_query, self.by_key = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.by_product = nn.Parameter(torch.randn(hidden, width) / width**0.5)
        self.weight = nn.Linear(hidden, 1)

    def forward(
        self,
        candidate_BCK: Tensor,
        query_BCA: Tensor,
        items: PathItems,
        batch: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the weighed sum, and the candidate itself in the same space."""
        key_BLA = self.events(items, batch)
        there_BL1 = there(items.length, batch)[..., None].to(key_BLA.dtype)
        asking_BCHA = query_BCA[:, :, None] * self.by_product + self.by_key.weight
        asked = asking_BCHA, self.by_query(query_BCA), self.weight.weight, self.weight.bias
        if torch.is_grad_enabled() and not torch.onnx.is_in_onnx_export():
            read_BCA = WeighedSums.apply(key_BLA, there_BL1, *asked)
        else:
            read_BCA = _weighed(key_BLA, there_BL1, *asked)[1].transpose(1, 2) @ key_BLA
        return torch.cat([read_BCA, query_BCA], dim=-1)


def _weighed(
    key_BLA: Tensor,
    there_BL1: Tensor,
    asking_BCHA: Tensor,
    asked_BCH: Tensor,
    weight_1H: Tensor,
    bias_1: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the hidden units of each event and candidate, and the weight that they give it."""
    asking_BAX = asking_BCHA.flatten(1, 2).transpose(1, 2)
    pairs_BLX = torch.baddbmm(asked_BCH.flatten(1)[:, None], key_BLA, asking_BAX)
    hidden_BLCH = F.relu(pairs_BLX).unflatten(2, asked_BCH.shape[1:])
    return hidden_BLCH, F.linear(hidden_BLCH, weight_1H, bias_1).squeeze(-1) * there_BL1


class WeighedSums(torch.autograd.Function):
    """Sums of the events as DIN weighs them, read_BCA of what `_weighed` takes.

    The backward pass writes an event's gradient once; autograd would write it three times, which
    is what a step of DIN on a CPU waits for.
    """

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        """Return the sums."""
        key_BLA, there_BL1, asking_BCHA, _, weight_1H, _ = given
        hidden_BLCH, weight_BLC = _weighed(*given)
        ctx.save_for_backward(key_BLA, there_BL1, asking_BCHA, weight_1H, hidden_BLCH, weight_BLC)
        return weight_BLC.transpose(1, 2) @ key_BLA

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of all that was given but of where events are."""
        key_BLA, there_BL1, asking_BCHA, weight_1H, hidden_BLCH, weight_BLC = ctx.saved_tensors
        (grad_BCA,) = grads
        of_weight_BLC = key_BLA @ grad_BCA.transpose(1, 2) * there_BL1
        of_hidden_BLCH = of_weight_BLC[..., None] * weight_1H
        # As autograd does relu's: what is above 0 goes through.
        of_pairs_BLX = torch.ops.aten.threshold_backward(of_hidden_BLCH, hidden_BLCH, 0).flatten(2)
        by_event = torch.cat([of_pairs_BLX, weight_BLC], dim=2)
        of_asking_BXA = of_pairs_BLX.transpose(1, 2) @ key_BLA
        return (
            by_event @ torch.cat([asking_BCHA.flatten(1, 2), grad_BCA], dim=1),
            None,
            of_asking_BXA.view_as(asking_BCHA),
            of_pairs_BLX.sum(1).unflatten(1, hidden_BLCH.shape[2:]),
            of_weight_BLC.flatten()[None] @ hidden_BLCH.flatten(0, 2),
            of_weight_BLC.sum().view(1),
        )


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
        reads: Sequence[str],
        width: int = 32,
        heads: int = 2,
    ) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"model.path.width={width} is not a multiple of its heads={heads}")
        self.heads = heads
        self.events = Events(fields * dim, width, max_length, reads)
        self.nothing = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        field_KF = torch.eye(fields).repeat_interleave(dim, dim=0)
        self.register_buffer("field_KF", field_KF, persistent=False)
        self.asks_width, self.width = width, 2 * width + fields

    def asks(self, candidate_BCK: Tensor) -> Tensor:
        """Return the candidates' queries: [B, C, A]."""
        return cast(Tensor, self.query(self.events.item(candidate_BCK)))

    def forward(
        self,
        candidate_BCK: Tensor,
        query_BCA: Tensor,
        items: PathItems,
        batch: Mapping[str, Tensor],
    ) -> Tensor:
        """Return what was attended to, how it agrees with the candidate, and the newest event."""
        event_BLA = self._read(self.events(items, batch))
        attended_BCA = self._attended(query_BCA, event_BLA, there(items.length, batch))
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
        reads: Sequence[str],
        width: int = 32,
        heads: int = 2,
        layers: int = 1,
        layer: MakeLayer = Attention,
    ) -> None:
        super().__init__(fields, dim, max_length, dropout, reads, width, heads)
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


def there(length: int, batch: Mapping[str, Tensor]) -> Tensor:
    """Return where the path has an event rather than padding: bool [B, L]."""
    length_B1 = batch["lengths"][:, None]
    return torch.arange(length, device=length_B1.device) < length_B1
