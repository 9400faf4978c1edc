"""An index and what changed since it was built: new items beside it, removed ones passed over.

Shapes: B requests, H interests, D dim, N items of the index, M new ones, C candidates. New items
have the indices N + 1 to N + M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys.index.search import Gone, Hits, Indices, ItemIndex, Out, Scores, Subset, products

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rows:
    """The vectors of old and new items, by row as if they were one matrix."""

    vectors_ND: Vectors
    extra_MD: Vectors

    @property
    def shape(self) -> tuple[int, int]:
        """Return N + M and D."""
        return len(self.vectors_ND) + len(self.extra_MD), self.vectors_ND.shape[1]

    def __getitem__(self, rows: Indices) -> Vectors:
        size = len(self.vectors_ND)
        late = rows >= size
        found = self.vectors_ND[np.where(late, 0, rows)]
        found[late] = self.extra_MD[rows[late] - size]
        return found


@dataclass(frozen=True, slots=True)
class Within:
    """A subset of the index's items, and of the new ones: bool [M]."""

    base: Subset
    extra: NDArray[np.bool_]
    num_items: int

    @property
    def nbytes(self) -> int:
        """Bytes of what is its own."""
        return int(self.extra.nbytes)

    def holds(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items belong to it."""
        late = indices > self.num_items
        held = self.base.holds(np.where(late, 0, indices))
        held[late] = self.extra[indices[late] - self.num_items - 1]
        return held


class DeltaIndex:
    """Searches an index and new items beside it, exactly merged; of `ItemIndex`'s interface."""

    def __init__(self, base: ItemIndex, extra_MD: Vectors, gone: Gone | None = None) -> None:
        self.base, self.extra_MD, self.gone = base, extra_MD, gone
        self.kind, self.vectors_ND = base.kind, Rows(base.vectors_ND, extra_MD)

    def __len__(self) -> int:
        return len(self.base) + len(self.extra_MD)

    @property
    def norms(self) -> Scores:
        """The vectors' lengths: float32 [N + M]."""
        return np.append(self.base.norms, np.linalg.norm(self.extra_MD, axis=1))

    def nearest(
        self, queries_BHD: Vectors, k: int, outs: Sequence[Out], subset: Within | None = None
    ) -> list[Hits]:
        """Return each request's best items, as `ItemIndex.nearest` does."""
        within, allowed = (subset.base, subset.extra) if subset else (None, None)
        found = self.base.nearest(queries_BHD, k, outs, within, self.gone)
        if not len(self.extra_MD):
            return found
        return [
            self._merged(queries_HD, k, hits, out, allowed)
            for queries_HD, hits, out in zip(queries_BHD, found, outs, strict=True)
        ]

    def score(self, queries_HD: Vectors, indices: Indices) -> Scores:
        """Return items' best inner products over the interests: float32 [C]."""
        late = indices > len(self.base)
        if not late.any():
            return self.base.score(queries_HD, indices)
        scores_C = np.empty(len(indices), np.float32)
        scores_C[~late] = self.base.score(queries_HD, indices[~late])
        some = np.ascontiguousarray(self.extra_MD[indices[late] - len(self.base) - 1])
        scores_C[late] = products(queries_HD, some)
        return scores_C

    def score_all(self, queries_HD: Vectors) -> Scores:
        """Return all items' best inner products: float32 [N + M + 1]; 0 and removed ones -inf."""
        scores_N = self.base.score_all(queries_HD)
        if self.gone:
            scores_N[self.gone.mask] = -np.inf
        return np.append(scores_N, products(queries_HD, self.extra_MD))

    def _merged(
        self,
        queries_HD: Vectors,
        k: int,
        hits: Hits,
        out: Out,
        allowed: NDArray[np.bool_] | None,
    ) -> Hits:
        """Return the best of what the index found and of the new items."""
        size = len(self.base)
        scores_M = products(queries_HD, self.extra_MD)
        scores_M[out[out > size] - size - 1] = -np.inf
        if allowed is not None:
            scores_M[~allowed] = -np.inf
        best = np.argpartition(-scores_M, min(k, len(scores_M)) - 1)[:k]
        floor = hits[1][-1] if len(hits[0]) >= k else -np.inf
        best = best[scores_M[best] > floor]
        if not len(best):
            return hits
        indices = np.concatenate([hits[0], best + size + 1])
        scores = np.concatenate([hits[1], scores_M[best]])
        order = np.lexsort((indices, -scores))[:k]
        return indices[order], scores[order]
