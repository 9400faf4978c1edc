"""An index in several parts by item ranges, searched one after the other and merged exactly.

Shapes: Q queries, K answers, F found by all shards. Parts of one trained index have its lists and
codes in common, so that together they find what it would find whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import faiss

MISSING = -1
"""FAISS's id of a place for which nothing was found."""


class Shards:
    """FAISS indexes of successive item ranges, with as much of FAISS's own interface as is used."""

    def __init__(self, parts: Sequence[faiss.Index]) -> None:
        self.parts = list(parts)
        self.d = int(self.parts[0].d)
        self.ntotal = sum(int(part.ntotal) for part in self.parts)

    def search(
        self, queries_QD: NDArray[np.float32], k: int, *, params: Any = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return scores and ids [Q, K], best first; of equal scores the smallest id first."""
        scores, ids, first = [], [], 0
        for part in self.parts:
            scores_QK, ids_QK = part.search(queries_QD, min(k, part.ntotal), params=params)
            scores.append(scores_QK)
            ids.append(np.where(ids_QK == MISSING, MISSING, ids_QK + first))
            first += part.ntotal
        scores_QF, ids_QF = np.concatenate(scores, axis=1), np.concatenate(ids, axis=1)
        best_QK = np.argsort(-scores_QF, axis=1, kind="stable")[:, :k]
        return (
            np.take_along_axis(scores_QF, best_QK, axis=1),
            np.take_along_axis(ids_QF, best_QK, axis=1),
        )


def ranges(num_items: int, count: int) -> list[slice]:
    """Return the rows of each shard, as equal as can be.

    >>> ranges(10, 3)
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    """
    ends = [num_items * place // count for place in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def names(count: int) -> tuple[str, ...]:
    """Return the files of an index in so many shards, in their order.

    >>> names(1), names(2)
    (('index.faiss',), ('index-1-of-2.faiss', 'index-2-of-2.faiss'))
    """
    if count == 1:
        return ("index.faiss",)
    return tuple(f"index-{place}-of-{count}.faiss" for place in range(1, count + 1))
