"""Dropout that does not wait for random numbers on a CPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.schema import InputError

LEVELS = 256


PLACES = 1 << 22
"""A mask begins at one of so many places of its tape."""


class Dropout(nn.Module):
    """Zeroes a share `p` of the elements in training and scales the others up by what is left.

    On a CPU a mask is a piece of one long tape of random bits, from a place that is drawn: to draw
    bits and to turn them into factors takes ten times as long as to multiply by them. `p` is then
    the nearest multiple of 1/256. Source: Srivastava et al. 2014, section 4.

    >>> kept = Dropout(0.5)(torch.ones(10_000))
    >>> sorted(set(kept.tolist())), 0.48 < kept.mean().item() / 2 < 0.52
    ([0.0, 2.0], True)
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise InputError(f"model.dropout={p}: expected 0 to below 1, as in 0.2")
        self.p = p

    def forward(self, hidden: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        if not self.training or self.p == 0:
            return hidden
        if hidden.device.type != "cpu":
            return F.dropout(hidden, self.p)
        return hidden * self._mask(hidden)

    def _mask(self, hidden: Tensor) -> Tensor:
        count, at = hidden.numel(), int(torch.randint(PLACES, ()))
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        tape = _tape(dropped, hidden.dtype, (count + PLACES).bit_length())
        return tape[at : at + count].view(hidden.shape)


@lru_cache(maxsize=8)
def _tape(dropped: int, dtype: torch.dtype, bits: int) -> Tensor:
    """Return 2 ** bits factors, 0 for `dropped` of 256; a longer tape begins with a shorter one.

    So a mask depends on the place drawn alone, and a resumed run draws what it would have drawn.
    """
    words = torch.empty((1 << bits) // 8, dtype=torch.int64)
    # From the lowest value up: all 64 bits are drawn, the sign too.
    words.random_(torch.iinfo(torch.int64).min, None, generator=torch.Generator().manual_seed(0))
    kept = words.view(torch.uint8) >= dropped
    return kept.to(dtype).mul_(LEVELS / (LEVELS - dropped))
