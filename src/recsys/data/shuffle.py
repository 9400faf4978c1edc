"""The order in which a training reads its examples: a function of (seed, epoch) alone.

So any process makes any batch, and a place in it is two numbers: epoch and step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class Order(Protocol):
    """Where each example stands in each epoch."""

    def rows(self, epoch: int, first: int, last: int) -> Rows:
        """Return the examples from place `first` up to `last` of an epoch."""


class Everywhere:
    """Any example may follow any: a permutation of all of them, 8 bytes each in memory.

    >>> sorted(Everywhere(5, seed=1).rows(0, 0, 5).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, total: int, seed: int) -> None:
        self.total, self.seed = total, seed
        self.order = lru_cache(maxsize=1)(self._order)

    def rows(self, epoch: int, first: int, last: int) -> Rows:
        """Return the examples from place `first` up to `last` of an epoch."""
        return self.order(epoch)[first:last]

    def _order(self, epoch: int) -> Rows:
        return np.random.default_rng([self.seed, epoch]).permutation(self.total)


class Windows:
    """Blocks of neighbours in a drawn order; examples in any order among those of `count` blocks.

    What lies together on the disk is read together, and two windows of numbers are all that is in
    memory. Each epoch cuts the blocks elsewhere. `ahead` is told each run of examples, from its
    first up to its last, a window before it is read.

    >>> sorted(Windows(5, seed=1, block=2, count=2).rows(0, 0, 5).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        total: int,
        seed: int,
        block: int,
        count: int,
        ahead: Callable[[list[tuple[int, int]]], None] = lambda runs: None,
    ) -> None:
        self.total, self.seed, self.block, self.count = total, seed, block, count
        self.ahead = ahead
        self.starts = lru_cache(maxsize=2)(self._starts)
        self.window = lru_cache(maxsize=2)(self._window)

    def rows(self, epoch: int, first: int, last: int) -> Rows:
        """Return the examples from place `first` up to `last` of an epoch."""
        size, last = self.block * self.count, min(last, self.total)
        return np.concatenate(
            [
                self.window(epoch, place)[max(0, first - place * size) : last - place * size]
                for place in range(first // size, -(-last // size))
            ]
        )

    def _window(self, epoch: int, place: int) -> Rows:
        self.ahead(self.runs(epoch, place))
        self.ahead(self.runs(epoch, place + 1))
        starts = self._blocks(epoch, place)
        rows = (starts[:, None] + np.arange(self.block)).ravel()
        # The last block of all is cut short: what would be past the end is not there.
        rows = (rows[rows < self.total] + self._turn(epoch)) % self.total
        return np.random.default_rng([self.seed, epoch, place, 1]).permutation(rows)

    def runs(self, epoch: int, place: int) -> list[tuple[int, int]]:
        """Return the neighbours that a window reads, from the first up to the last of each run.

        The run over the end of all examples goes on at their beginning, its last before its first.
        """
        firsts = self._blocks(epoch, place)
        lasts = np.minimum(firsts + self.block, self.total)
        firsts = (firsts + self._turn(epoch)) % self.total
        lasts = (lasts + self._turn(epoch) - 1) % self.total + 1
        return list(zip(firsts.tolist(), lasts.tolist(), strict=True))

    def _blocks(self, epoch: int, place: int) -> Rows:
        return self.starts(epoch)[place * self.count : (place + 1) * self.count]

    def _starts(self, epoch: int) -> Rows:
        """Return where each block starts, in the epoch's order; the one cut short is the last."""
        whole = np.random.default_rng([self.seed, epoch]).permutation(self.total // self.block)
        return np.append(whole, len(whole))[: -(-self.total // self.block)] * self.block

    def _turn(self, epoch: int) -> int:
        """Return by how much this epoch's blocks are moved, so that the last one is another."""
        return int(np.random.default_rng([self.seed, epoch, 0, 0]).integers(self.total))
