"""Search a built index: several interests merged, seen items left out, lists of allowed items.

Shapes: B requests, H interests, D dim, K answers, N items, C candidates. Items are indices 1 to N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.index.build import RECALL_AT, fetch_count, search_parameters
from recsys.schema import PAD, InputError

if TYPE_CHECKING:
    import faiss

BROAD = 0.5
"""Above this share of allowed items, scoring all and masking beats gathering the allowed ones."""


Ids = NDArray[np.int64]
"""FAISS ids: item index - 1."""
Mask = NDArray[np.bool_]
"""Which of the N items may be answered with."""
_NONE: Ids = np.zeros(0, np.int64)


class Found(NamedTuple):
    """Answers, best first; places past the last eligible item hold item 0 and score -inf."""

    indices_BK: NDArray[np.int64]
    scores_BK: NDArray[np.float32]


class ItemIndex:
    """A FAISS index beside the vectors that it was built from.

    Scores are true inner products whatever the kind: where the index is approximate it only
    chooses candidates.
    """

    def __init__(
        self, index: faiss.Index, vectors_ND: NDArray[np.float32], facts: Mapping[str, Any]
    ) -> None:
        if index.ntotal != len(vectors_ND) or index.d != vectors_ND.shape[1]:
            raise InputError(
                f"index holds {index.ntotal} × {index.d} vectors, expected "
                f"{len(vectors_ND)} × {vectors_ND.shape[1]}; export the bundle again"
            )
        self.index = index
        self.vectors_ND = np.asarray(vectors_ND)  # a plain view: np.memmap slices slowly
        self.kind = str(facts["kind"])
        self.effort = int(facts.get("nprobe") or facts.get("ef_search") or 0)

    @classmethod
    def load(
        cls, file: Path, vectors_ND: NDArray[np.float32], facts: Mapping[str, Any]
    ) -> ItemIndex:
        """Read an index file; `facts` is the `index` entry of the bundle's manifest."""
        import faiss

        try:
            return cls(faiss.read_index(str(file)), vectors_ND, facts)
        except RuntimeError as error:
            raise InputError(f"{file}: not a FAISS index; export the bundle again") from error

    def __len__(self) -> int:
        return len(self.vectors_ND)

    def search(
        self,
        queries_BHD: NDArray[np.float32],
        k: int,
        *,
        excluded: Sequence[NDArray[np.integer]] | None = None,
        allowed: NDArray[np.integer] | None = None,
    ) -> Found:
        """Return each request's `min(k, N)` best items over all its interests, without repeats.

        excluded: item indices to leave out, one array a request. allowed: the only item indices to
        answer with, for all requests; they are searched exactly, since an approximate index
        looks near the query, where a category filter may have left nothing.
        """
        k = min(k, len(self))
        queries_BHD = np.ascontiguousarray(queries_BHD, np.float32)
        out_B = [self._ids(row) for row in excluded or [_NONE] * len(queries_BHD)]
        only_N = None if allowed is None else self._mask(self._ids(allowed))
        if self._is_plain(queries_BHD, out_B, only_N):
            scores_BK, ids_BK = self.index.search(queries_BHD[:, 0], k)
            return Found(ids_BK + 1, scores_BK)
        pairs = zip(queries_BHD, out_B, strict=True)
        return _stack([self._one(queries_HD, k, out, only_N) for queries_HD, out in pairs], k)

    def _ids(self, indices: NDArray[np.integer]) -> Ids:
        ids = np.asarray(indices, np.int64) - 1
        return ids[(ids >= 0) & (ids < len(self))]

    def _mask(self, ids: Ids) -> Mask:
        mask_N = np.zeros(len(self), bool)
        mask_N[ids] = True
        return mask_N

    def _is_plain(self, queries_BHD: NDArray, out_B: list[Ids], only_N: Mask | None) -> bool:
        """Whether one exact FAISS call answers all requests: no filter, one interest each."""
        unfiltered = only_N is None and not any(map(len, out_B))
        return self.kind == "flat" and unfiltered and queries_BHD.shape[1] == 1

    def _one(
        self, queries_HD: NDArray[np.float32], k: int, out: Ids, only_N: Mask | None
    ) -> tuple[Ids, NDArray[np.float32]]:
        """Answer one request: ids and scores, best first, as many as there are up to `k`."""
        if only_N is not None:
            return self._filtered(queries_HD, k, _without(only_N, out))
        out = np.unique(out)
        selector = _all_but(out) if len(out) else None
        near = self._candidates(queries_HD, k, len(out), selector)
        if len(near) >= min(k, len(self) - len(out)):
            return _top(near, self._scores(queries_HD, near), k)
        # Too few lists or links were followed to find k: rare, so the exact answer may be slow.
        return self._exact(queries_HD, k, _without(np.ones(len(self), bool), out))

    def _filtered(
        self, queries_HD: NDArray[np.float32], k: int, eligible_N: Mask
    ) -> tuple[Ids, NDArray[np.float32]]:
        if self.kind != "flat":
            return self._exact(queries_HD, k, eligible_N)
        ids = self._candidates(queries_HD, k, 0, _within(eligible_N))
        return _top(ids, self._scores(queries_HD, ids), k)

    def _candidates(
        self, queries_HD: NDArray[np.float32], k: int, passed_over: int, selector: Any
    ) -> Ids:
        """Return the union of what each interest finds in the index."""
        # The effort was tuned for 100 answers: more of them, or more to pass over, lie further.
        effort = self.effort * -(-(k + passed_over) // RECALL_AT)
        parameters = search_parameters(self.kind, effort, selector)
        fetched = min(fetch_count(self.kind, k), len(self))
        ids_HK = self.index.search(queries_HD, fetched, params=parameters)[1]
        return np.unique(ids_HK[ids_HK >= 0])

    def _exact(
        self, queries_HD: NDArray[np.float32], k: int, eligible_N: Mask
    ) -> tuple[Ids, NDArray[np.float32]]:
        if np.count_nonzero(eligible_N) < BROAD * len(self):
            ids = np.flatnonzero(eligible_N)
            return _top(ids, self._scores(queries_HD, ids), k)
        scores_N = (self.vectors_ND @ queries_HD.T).max(axis=1)
        scores_N[~eligible_N] = -np.inf
        ids, scores = _top(np.arange(len(self)), scores_N, k)
        real = scores > -np.inf
        return ids[real], scores[real]

    def _scores(self, queries_HD: NDArray[np.float32], ids: Ids) -> NDArray[np.float32]:
        """Return each item's best inner product over the interests: float32 [C]."""
        return (self.vectors_ND[ids] @ queries_HD.T).max(axis=1)


def _without(mask_N: Mask, out: Ids) -> Mask:
    left_N = mask_N.copy()
    left_N[out] = False
    return left_N


def _all_but(out: Ids) -> Any:
    import faiss

    return faiss.IDSelectorNot(faiss.IDSelectorBatch(out))


def _within(eligible_N: Mask) -> Any:
    import faiss

    return faiss.IDSelectorBitmap(np.packbits(eligible_N, bitorder="little"))


def _top(ids: Ids, scores: NDArray[np.float32], k: int) -> tuple[Ids, NDArray[np.float32]]:
    """Return the `k` best, of equal ones the smallest id (the most popular item) first."""
    if len(ids) > k:
        kept = np.argpartition(-scores, k - 1)[:k]
        ids, scores = ids[kept], scores[kept]
    order = np.lexsort((ids, -scores))
    return ids[order], scores[order]


def _stack(rows: list[tuple[Ids, NDArray[np.float32]]], k: int) -> Found:
    indices_BK = np.full((len(rows), k), PAD, np.int64)
    scores_BK = np.full((len(rows), k), -np.inf, np.float32)
    for row, (ids, scores) in enumerate(rows):
        indices_BK[row, : len(ids)] = ids + 1
        scores_BK[row, : len(ids)] = scores
    return Found(indices_BK, scores_BK)
