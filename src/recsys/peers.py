"""The processes of one training as torch counts them: who this one is, and what all of them have.

Without a process group there is one process, rank 0 of 1, and nothing is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Return which of them this is, from 0."""
    return dist.get_rank() if _grouped() else 0


def first() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return rank() == 0


def total(mine: Tensor) -> Tensor:
    """Return the sum of every process's tensor; all must call it, with one shape.

    >>> total(torch.tensor([2.0, 3.0]))
    tensor([2., 3.])
    """
    if world() == 1:
        return mine
    summed = mine.detach().clone()
    dist.all_reduce(summed)
    return summed


def number(mine: int) -> int:
    """Return the sum of every process's number; alone, without a tensor made of it.

    >>> number(3)
    3
    """
    return mine if world() == 1 else int(total(torch.tensor(mine)))


def average(mine: Tensor) -> Tensor:
    """Return the mean of every process's tensor.

    What each process divides its sum by, so that the mean of its result over the processes, which
    is what DDP makes of gradients, is the mean over all that they have.
    """
    return mine if world() == 1 else total(mine) / world()


def gathered(mine: Tensor) -> list[Tensor]:
    """Return every process's rows, which may be of different number: [R, …] each.

    >>> gathered(torch.tensor([1, 2]))
    [tensor([1, 2])]
    """
    if world() == 1:
        return [mine]
    count_W = torch.zeros(world(), dtype=torch.int64, device=mine.device)
    count_W[rank()] = len(mine)
    counts = total(count_W).tolist()
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
