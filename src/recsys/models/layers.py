"""Interchangeable layers of the trajectory model; at position t each reads positions up to t only.

Shapes: B histories or packed rows, L positions, D dim, H heads, K width of a head or a filter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.models.dropout import Dropout
from recsys.models.packed import LONGEST, PackedAttention, unread
from recsys.products import Products, bf16_pays
from recsys.schema import InputError

Norm = Literal["pre", "post"]


@dataclass(frozen=True)
class Path:
    """What a layer knows of the path beside its hidden states, and which positions are asked for.

    positions: int64 [B, L] or [L], places within the history; times: int64 [B, L], seconds since
    the history's first event, or None; segments: int64 [B, L], which history of a packed row a
    position belongs to (0: none), or None where each row is one right-padded history; newest:
    int64 [B], the one position of each history to answer for, or None where all are asked for.
    """

    positions: Tensor
    times: Tensor | None = None
    segments: Tensor | None = None
    newest: Tensor | None = None

    @classmethod
    def packed(cls, batch: Mapping[str, Tensor]) -> Path:
        """The paths of packed training rows, see `history.pack`."""
        return cls(batch["positions"], batch.get("times"), batch["segments"])

    @classmethod
    def padded(cls, batch: Mapping[str, Tensor]) -> Path:
        """The paths of right-padded histories, see `history.encode`."""
        items_BL = batch["items"]
        return cls(torch.arange(items_BL.shape[1], device=items_BL.device), batch.get("times"))

    def at(self, newest_B: Tensor) -> Path:
        """Return the same path, asked for one position of each right-padded history alone."""
        assert self.segments is None
        return replace(self, newest=newest_B)

    def asked(self, values: Tensor) -> Tensor:
        """Return what is asked for of values [B, L, …]: all of them, or [B, 1, …]."""
        if self.newest is None:
            return values
        index = self.newest.view(-1, *[1] * (values.ndim - 1)).expand(-1, 1, *values.shape[2:])
        return values.gather(1, index)

    @property
    def asked_positions(self) -> Tensor:
        """Return the places asked for: int64 [B, L], [L] or [B, 1]."""
        return self.positions if self.newest is None else self.newest[:, None]

    @cached_property
    def visible(self) -> Tensor | None:
        """What each asked position may read: bool [B, 1, L, L] or [B, 1, 1, L]; None: its past."""
        if self.newest is not None:
            return (self.positions <= self.newest[:, None])[:, None, None]
        if self.segments is None:
            return None
        same_BLL = self.segments[:, :, None] == self.segments[:, None, :]
        return same_BLL.tril()[:, None]

    @cached_property
    def bias(self) -> Tensor | None:
        """`visible` as something to add to attention logits: made once for all layers."""
        if self.visible is None:
            return None
        return torch.zeros_like(self.visible, dtype=torch.float32).masked_fill_(
            ~self.visible, torch.finfo(torch.float32).min
        )

    @cached_property
    def unread(self) -> Tensor:
        """What no position of a packed row may read, as something to add: made once."""
        assert self.segments is not None
        return unread(self.segments)

    def attend(self, query_BHLK: Tensor, key_BHLK: Tensor, value_BHLK: Tensor) -> Tensor:
        """Return softmax attention over what each position may read."""
        if self.segments is not None and _in_half(query_BHLK):
            packed = PackedAttention.apply(query_BHLK, key_BHLK, value_BHLK, self.unread)
            return cast(Tensor, packed)
        # Dropping attention probabilities costs a fused kernel and buys no quality.
        bias = None if self.bias is None else self.bias.to(query_BHLK.dtype)
        # One query a history reads a mask without NaN: it always sees its own position.
        mask = bias if self.newest is None else self.visible
        return F.scaled_dot_product_attention(
            query_BHLK, key_BHLK, value_BHLK, attn_mask=mask, is_causal=mask is None
        )

    def mean(self, hidden_BLD: Tensor) -> Tensor:
        """Return the mean over what each asked position may read: [B, L, D] or [B, 1, D]."""
        value_B1LD = hidden_BLD[:, None]
        nothing = torch.zeros_like(value_B1LD[..., :1])
        query = torch.zeros_like(self.asked(hidden_BLD)[:, None, :, :1])
        return self.attend(query, nothing, value_B1LD).squeeze(1)


class HalfTrained(nn.Module):
    """A layer that a CPU trains in bf16, where rows are not long; its answers are in fp32.

    `products`: the number format of its products in training; `auto` is bf16 where the processor
    has such instructions. Weights, norms and the sum over layers stay in fp32.
    """

    def __init__(self, products: Products = "auto") -> None:
        super().__init__()
        if products not in get_args(Products):
            raise InputError(
                f"model.layer.products={products}: expected one of {', '.join(get_args(Products))}"
            )
        self.products = products

    def forward(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return hidden_BLD of the positions asked for."""
        if not self._in_half(hidden_BLD, path):
            return self.read(hidden_BLD, path)
        with torch.autocast("cpu", torch.bfloat16):
            return self.read(hidden_BLD, path)

    def read(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return hidden_BLD of the positions asked for, in the format at hand."""
        raise NotImplementedError

    def _in_half(self, hidden_BLD: Tensor, path: Path) -> bool:
        trains = path.segments is not None and torch.is_grad_enabled()
        if not trains or hidden_BLD.device.type != "cpu" or hidden_BLD.shape[1] > LONGEST:
            return False
        return self.products == "bf16" or (self.products == "auto" and bf16_pays(hidden_BLD))


class Attention(HalfTrained):
    """Causal self-attention and a feed-forward network, each behind a norm and a residual.

    Source: SASRec (Kang and McAuley 2018, section 3), normalised before each part, or after it by
    `norm=post`; `rotary` turns queries and keys by their place (Su et al. 2021, section 3.4)
    instead of leaving order to the input alone. `products`: see `HalfTrained`.
    """

    reads_times, answers_asked = False, True

    def __init__(
        self,
        dim: int,
        max_length: int,
        dropout: float = 0.5,
        heads: int = 2,
        feedforward: int = 64,
        rotary: bool = False,
        norm: Norm = "pre",
        products: Products = "auto",
    ) -> None:
        super().__init__(products)
        self.norm = norm
        self.mixer: nn.Module = SelfAttention(dim, heads, max_length if rotary else 0)
        self.mixer_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward), nn.GELU(), Dropout(dropout), nn.Linear(feedforward, dim)
        )
        self.dropout = Dropout(dropout)

    def read(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return hidden_BLD of the positions asked for."""
        if self.norm == "post":
            mixed_BLD = self.dropout(self.mixer(hidden_BLD, path))
            hidden_BLD = self.mixer_norm(path.asked(hidden_BLD) + mixed_BLD)
            fed_BLD = self.dropout(self.feedforward(hidden_BLD))
            return self.feedforward_norm(hidden_BLD + fed_BLD)
        mixed_BLD = self.mixer(self.mixer_norm(hidden_BLD), path)
        hidden_BLD = path.asked(hidden_BLD) + self.dropout(mixed_BLD)
        return hidden_BLD + self.dropout(self.feedforward(self.feedforward_norm(hidden_BLD)))


class Filtered(Attention):
    """Attention beside a causal frequency filter: `share` of the filter, the rest attention.

    Source: BSARec (Shin et al. 2024, section 4). Its Fourier filter mixes each position with later
    ones; here the low frequencies are a moving average over the newest `width` positions whose
    weights are learned, and the high ones, what it leaves, are scaled by a learned square.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        dropout: float = 0.5,
        heads: int = 2,
        feedforward: int = 64,
        rotary: bool = False,
        norm: Norm = "pre",
        share: float = 0.7,
        width: int = 8,
        products: Products = "auto",
    ) -> None:
        super().__init__(dim, max_length, dropout, heads, feedforward, rotary, norm, products)
        if not 0 <= share <= 1:
            raise InputError(f"model.layer.share={share}: expected 0 (attention) to 1 (filter)")
        self.mixer = Mixture(CausalFilter(dim, width, dropout), self.mixer, share)


class Gated(HalfTrained):
    """Attention and SwiGLU, each let through by a gate that the layer's input opens.

    Source: LiGR (Borisyuk et al. 2024, section 3.2), as eSASRec (Tikhonovich et al. 2025) uses it.
    """

    reads_times, answers_asked = False, True

    def __init__(
        self,
        dim: int,
        max_length: int,
        dropout: float = 0.2,
        heads: int = 2,
        feedforward: int = 256,
        rotary: bool = False,
        products: Products = "auto",
    ) -> None:
        super().__init__(products)
        self.mixer = SelfAttention(dim, heads, max_length if rotary else 0)
        self.mixer_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer_gate, self.feedforward_gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.widen = nn.Linear(dim, 2 * feedforward)
        self.narrow = nn.Linear(feedforward, dim)
        self.dropout = Dropout(dropout)

    def read(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return hidden_BLD of the positions asked for."""
        mixed_BLD = self.mixer(self.mixer_norm(hidden_BLD), path)
        hidden_BLD = path.asked(hidden_BLD)
        hidden_BLD = hidden_BLD + self.dropout(mixed_BLD) * self.mixer_gate(hidden_BLD).sigmoid()
        gate_BLF, value_BLF = self.widen(self.feedforward_norm(hidden_BLD)).chunk(2, dim=-1)
        fed_BLD = self.narrow(self.dropout(F.silu(gate_BLF) * value_BLF))
        return hidden_BLD + self.dropout(fed_BLD) * self.feedforward_gate(hidden_BLD).sigmoid()


class Hstu(nn.Module):
    """Pointwise SiLU attention with a bias for how far back and how long ago.

    Source: HSTU (Zhai et al. 2024, section 3.1). The bias over time is a smooth function of the
    log of the seconds between two events, so that no bucket's edge can differ between runtimes.
    """

    reads_times, answers_asked = True, True
    WAVES = 8

    def __init__(self, dim: int, max_length: int, dropout: float = 0.2, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.max_length = _checked(heads, dim), max_length
        self.norm, self.attended_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.project_in, self.project_out = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim)
        self.by_place = nn.Embedding(max_length, heads)
        self.by_time = nn.Linear(self.WAVES, heads, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return hidden_BLD of the positions asked for."""
        parts_BLD = self._projected(self.norm(hidden_BLD), path)
        gate, value, query, key = (_heads(F.silu(part), self.heads) for part in parts_BLD)
        weights_BHLL = F.silu(query @ key.transpose(-1, -2) + self._bias(path)) / self.max_length
        attended_BHLK = (weights_BHLL * self._visible(path)) @ value
        attended_BLD = self.attended_norm(attended_BHLK.transpose(1, 2).flatten(2))
        return path.asked(hidden_BLD) + self.dropout(
            self.project_out(attended_BLD * gate.transpose(1, 2).flatten(2))
        )

    def _projected(self, normed_BLD: Tensor, path: Path) -> tuple[Tensor, ...]:
        """Return gate, value, query and key [B, L, D]: gate and query only where asked for."""
        if path.newest is None:
            return self.project_in(normed_BLD).chunk(4, dim=-1)
        asked_B1D, dim = path.asked(normed_BLD), normed_BLD.shape[-1]
        read = (asked_B1D, normed_BLD, asked_B1D, normed_BLD)
        return tuple(
            _project(self.project_in, input_BLD, slice(part * dim, (part + 1) * dim))
            for part, input_BLD in enumerate(read)
        )

    def _bias(self, path: Path) -> Tensor:
        both = path.asked_positions, path.positions
        asked, places = (p if p.ndim == 2 else p[None] for p in both)
        back_BLL = (asked[:, :, None] - places[:, None, :]).clamp(min=0)
        bias_BLLH = self.by_place(back_BLL)
        if path.times is not None:
            ago_BLL = path.asked(path.times)[:, :, None] - path.times[:, None, :]
            ago_BLL = ago_BLL.clamp(min=0)
            bias_BLLH = bias_BLLH + self.by_time(_waves(ago_BLL, self.WAVES))
        return bias_BLLH.permute(0, 3, 1, 2)

    def _visible(self, path: Path) -> Tensor:
        if path.visible is not None:
            return path.visible
        return path.positions[:, None] >= path.positions[None, :]


class Recurrent(nn.Module):
    """A gated recurrent unit behind a norm and a residual.

    Source: GRU4Rec (Hidasi et al. 2016, section 3), trained on every position.
    """

    reads_times, answers_asked = False, True

    def __init__(self, dim: int, max_length: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.dropout = Dropout(dropout)

    def forward(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return hidden_BLD of the positions asked for."""
        input_BLD = self.norm(hidden_BLD)
        if torch.onnx.is_in_onnx_export():
            return path.asked(hidden_BLD) + path.asked(self._as_one_node(input_BLD))
        if path.segments is None:
            return path.asked(hidden_BLD) + self.dropout(path.asked(self.gru(input_BLD)[0]))
        real_BL = path.segments > 0
        started_P = (path.positions[real_BL] == 0).long().cumsum(0) - 1
        at = started_P, path.positions[real_BL]
        alone = input_BLD.new_zeros(int(started_P.max()) + 1, *input_BLD.shape[1:])
        # Under autocast the unit may answer in another format than the residual has.
        read = self.gru(alone.index_put(at, input_BLD[real_BL]))[0][at].to(hidden_BLD.dtype)
        return hidden_BLD + self.dropout(torch.zeros_like(hidden_BLD).index_put((real_BL,), read))

    def _as_one_node(self, input_BLD: Tensor) -> Tensor:
        """Return the unit's output as ONNX's own GRU: torch's exporter unrolls it, length fixed."""
        weights, biases = (
            [_update_first(self.gru.get_parameter(f"{kind}_{side}_l0")) for side in ("ih", "hh")]
            for kind in ("weight", "bias")
        )
        batch, length, dim = input_BLD.shape
        output_L1BD = torch.onnx.ops.symbolic(
            "GRU",
            (input_BLD.transpose(0, 1), *weights, torch.cat(biases, dim=1)),
            {"hidden_size": dim, "linear_before_reset": 1},
            dtype=input_BLD.dtype,
            shape=(length, 1, batch, dim),
        )
        return output_L1BD.squeeze(1).transpose(0, 1)


class SelfAttention(nn.Module):
    """Multi-head softmax attention; `rotary_length` above 0 turns queries and keys by place."""

    def __init__(self, dim: int, heads: int, rotary_length: int = 0) -> None:
        super().__init__()
        self.heads = _checked(heads, dim)
        self.project_in = nn.Linear(dim, 3 * dim)
        self.project_out = nn.Linear(dim, dim)
        self.rotary = Rotary(dim // heads, rotary_length) if rotary_length else None

    def forward(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return hidden_BLD of the positions asked for."""
        query_BLD, key_BLD, value_BLD = self._projected(hidden_BLD, path)
        if torch.onnx.is_in_onnx_export() and self.rotary is None:
            return self.project_out(self._as_one_node(query_BLD, key_BLD, value_BLD, path))
        query, key, value = (_heads(part, self.heads) for part in (query_BLD, key_BLD, value_BLD))
        if self.rotary is not None:
            query = self.rotary(query, path.asked_positions)
            key = self.rotary(key, path.positions)
        return self.project_out(path.attend(query, key, value).transpose(1, 2).flatten(2))

    def _projected(self, hidden_BLD: Tensor, path: Path) -> tuple[Tensor, ...]:
        """Return query, key and value [B, L, D], the query only where asked for."""
        if path.newest is None:
            return self.project_in(hidden_BLD).chunk(3, dim=-1)
        dim = hidden_BLD.shape[-1]
        query_B1D = _project(self.project_in, path.asked(hidden_BLD), slice(dim))
        others_BLD = _project(self.project_in, hidden_BLD, slice(dim, None))
        return query_B1D, *others_BLD.chunk(2, dim=-1)

    def _as_one_node(self, query: Tensor, key: Tensor, value: Tensor, path: Path) -> Tensor:
        """Return the attention as ONNX's own: without the reshaping of heads, a tenth faster."""
        mask = () if path.visible is None else (path.visible,)
        heads, causal = self.heads, int(not mask)
        return torch.onnx.ops.symbolic(
            "Attention",
            (query, key, value, *mask),
            {"q_num_heads": heads, "kv_num_heads": heads, "is_causal": causal},
            dtype=query.dtype,
            shape=query.shape,
            version=23,
        )


class Rotary(nn.Module):
    """Turns pairs of a head's dimensions by angles that grow with the place (Su et al. 2021)."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        if width % 2:
            raise InputError(f"rotary positions need an even width of heads, not {width}")
        speed_K = 10_000.0 ** -(torch.arange(0, width, 2) / width)
        angles_LK = torch.arange(length)[:, None] * speed_K
        self.register_buffer("cos", angles_LK.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles_LK.sin().repeat(1, 2), persistent=False)

    def forward(self, heads_BHLK: Tensor, positions: Tensor) -> Tensor:
        """Return the heads of `positions`, [L] or [B, L], turned: [B, H, L, K]."""
        cos, sin = (self.get_buffer(name)[positions] for name in ("cos", "sin"))
        if positions.ndim == 2:
            cos, sin = cos[:, None], sin[:, None]
        left, right = heads_BHLK.chunk(2, dim=-1)
        return heads_BHLK * cos + torch.cat([-right, left], dim=-1) * sin


class Mixture(nn.Module):
    """A fixed blend of two ways to mix positions."""

    def __init__(self, first: nn.Module, second: nn.Module, share: float) -> None:
        super().__init__()
        self.first, self.second, self.share = first, second, share

    def forward(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return `share` of the first and the rest of the second."""
        first_BLD, second_BLD = self.first(hidden_BLD, path), self.second(hidden_BLD, path)
        return self.share * first_BLD + (1 - self.share) * second_BLD


class CausalFilter(nn.Module):
    """Splits each dimension's course into a moving average and the rest, and weighs the rest."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"model.layer.width={width}: expected at least 1 position")
        self.taps = nn.Parameter(torch.zeros(width, dim))
        self.rest = nn.Parameter(torch.randn(dim))
        self.norm, self.dropout = nn.LayerNorm(dim), Dropout(dropout)

    def forward(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        """Return the filtered course where asked for, back on the scale of its input."""
        slow_BLD = path.asked(self._average(hidden_BLD, path))
        hidden_BLD = path.asked(hidden_BLD)
        filtered_BLD = slow_BLD + self.rest.square() * (hidden_BLD - slow_BLD)
        return self.norm(self.dropout(filtered_BLD) + hidden_BLD)

    def _average(self, hidden_BLD: Tensor, path: Path) -> Tensor:
        weights_KD = self.taps.exp()
        total_BLD = weights_KD[0] * hidden_BLD
        weight_BLD = weights_KD[0].expand_as(hidden_BLD)
        for back in range(1, len(weights_KD)):
            there_BL1 = (path.positions >= back)[..., None].to(hidden_BLD.dtype)
            earlier_BLD = F.pad(hidden_BLD, (0, 0, back, 0))[:, : hidden_BLD.shape[1]]
            total_BLD = total_BLD + there_BL1 * weights_KD[back] * earlier_BLD
            weight_BLD = weight_BLD + there_BL1 * weights_KD[back]
        return total_BLD / weight_BLD


def _in_half(part_BHLK: Tensor) -> bool:
    """Whether queries, keys or values are of a layer that a CPU trains in bf16."""
    half = torch.is_autocast_enabled("cpu") and part_BHLK.device.type == "cpu"
    return half and part_BHLK.shape[2] <= LONGEST


def _heads(part_BLD: Tensor, heads: int) -> Tensor:
    """Split a part of a projection into its heads: [B, H, L, K]."""
    return part_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)


def _project(linear: nn.Linear, hidden_BLD: Tensor, rows: slice) -> Tensor:
    """Return some of a projection's outputs."""
    return F.linear(hidden_BLD, linear.weight[rows], linear.bias[rows])


def _update_first(gates: Tensor) -> Tensor:
    """Reorder torch's reset, update and new gate as ONNX has them, with its leading 1."""
    reset, update, new = gates.chunk(3)
    return torch.cat([update, reset, new])[None]


def _waves(seconds: Tensor, count: int) -> Tensor:
    """Return smooth features of a time span: cosines of the log of its seconds, [..., count]."""
    place = torch.log1p(seconds.float()) / math.log(2**32)
    return torch.cos(math.pi * place[..., None] * torch.arange(count, device=seconds.device))


def _checked(heads: int, dim: int) -> int:
    if dim % heads:
        raise InputError(f"model.dim={dim} is not a multiple of model.layer.heads={heads}")
    return heads
