"""The number format of matrix products: bf16 where the processor multiplies it faster."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Products = Literal["auto", "bf16", "fp32"]


def bf16_pays(operand: Tensor) -> bool:
    """Whether bf16 products are faster here: on a CPU with such instructions, under autocast."""
    if operand.is_cuda:
        return torch.is_autocast_enabled("cuda")
    return operand.dtype == torch.float32 and _bf16_cpu()


@cache
def _bf16_cpu() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
