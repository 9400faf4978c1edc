"""Search a built index: interests merged, seen items passed over, filters searched exactly.

Shapes: B requests, H interests, D dim, K answers, N items, F fetched, C candidates. Items are
indices 1 to N, 0 is padding; FAISS ids are those minus 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.index import kinds
from recsys.index.kinds import CODED, search_parameters
from recsys.index.shards import Shards
from recsys.index.tuning import RECALL_AT
from recsys.schema import PAD, InputError

if TYPE_CHECKING:
    import faiss

BROAD = 0.5
"""Above this share of all items, or this many bytes, a subset's vectors are not copied."""
GATHERED_BYTES = 64 << 20
STEPS = 4
SPARE = 128
"""So many items to pass over are allowed for at first: where there are more, most lie far off."""
WIDER = 4
"""How much more a second search fetches."""

Indices = NDArray[np.int64]
Scores = NDArray[np.float32]
Out = NDArray[np.integer]
"""Items to pass over, in rising order."""
Hits = tuple[Indices, NDArray[np.floating]]
"""Item indices and their scores, best first."""
NOTHING: Hits = np.zeros(0, np.int64), np.zeros(0, np.float32)


class Found(NamedTuple):
    """Answers, best first; places past the last eligible item hold item 0 and score -inf."""

    indices_BK: NDArray[np.int64]
    scores_BK: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Gathered:
    """A subset of the items, its vectors side by side: searched exactly, without the others."""

    indices: Indices
    index: faiss.Index

    @property
    def nbytes(self) -> int:
        """Bytes of the indices and the vectors."""
        return int(self.indices.nbytes + 4 * self.index.ntotal * self.index.d)

    def holds(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items belong to it."""
        return among(indices, self.indices)


@dataclass(frozen=True, slots=True)
class Masked:
    """A subset too broad to copy: bool [N + 1] by item index, False for padding.

    Where it is not `exact`, the index chooses candidates as it does without a filter.
    """

    mask: NDArray[np.bool_]
    exact: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the mask."""
        return int(self.mask.nbytes)

    def holds(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items belong to it."""
        return self.mask[indices]


Subset = Gathered | Masked


@dataclass(frozen=True, slots=True)
class Gone:
    """Items that were removed since the index was built: bool [N + 1] by item index, and how many.

    However many they are, a search passes over them at the price of a look at the mask.
    """

    mask: NDArray[np.bool_]
    count: int


class ItemIndex:
    """A FAISS index beside the vectors that it was built from.

    Scores are true inner products whatever the kind: where the index is approximate it only
    chooses candidates.
    """

    def __init__(
        self,
        index: faiss.Index | Shards,
        vectors_ND: NDArray[np.float32],
        facts: Mapping[str, Any],
    ) -> None:
        if index.ntotal != len(vectors_ND) or index.d != vectors_ND.shape[1]:
            raise InputError(
                f"index holds {index.ntotal} × {index.d} vectors, expected "
                f"{len(vectors_ND)} × {vectors_ND.shape[1]}; export the bundle again"
            )
        self.index = index
        # A plain view: np.memmap slices slowly.
        self.vectors_ND = np.ascontiguousarray(np.asarray(vectors_ND), np.float32)
        self.kind = str(facts["kind"])
        self.effort = int(facts.get("nprobe") or facts.get("ef_search") or 0)
        # Manifests from before it was tuned have none.
        self.refine = int(facts.get("refine", 2 if self.kind in CODED else 1))
        self.parameters: dict[int, Any] = {}

    @classmethod
    def load(
        cls, files: Path | Sequence[Path], vectors_ND: NDArray[np.float32], facts: Mapping[str, Any]
    ) -> ItemIndex:
        """Read an index file, or its shards; `facts` is the `index` entry of the manifest.

        Codes, vectors and links stay on the disk, mapped: all processes share these pages.
        """
        if isinstance(files, Path):
            return cls(kinds.read(files), vectors_ND, facts)
        parts = [kinds.read(file) for file in files]
        return cls(Shards(parts) if len(parts) > 1 else parts[0], vectors_ND, facts)

    @classmethod
    def exact(cls, vectors_ND: NDArray[np.float32]) -> ItemIndex:
        """Make an index that compares with every vector."""
        return cls(_flat(np.ascontiguousarray(vectors_ND)), vectors_ND, {"kind": "flat"})

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
        """Return `nearest` as arrays of `min(k, N)` columns.

        excluded: item indices to leave out, one array a request. allowed: the only item indices to
        answer with, for all requests; they are searched exactly, since an approximate index
        looks near the query, where a category filter may have left nothing.
        """
        k = min(k, len(self))
        outs = [np.unique(row) for row in excluded or [NOTHING[0]] * len(queries_BHD)]
        subset = None if allowed is None else self.subset(allowed)
        return _stack(self.nearest(queries_BHD, k, outs, subset), k)

    def nearest(
        self,
        queries_BHD: NDArray[np.float32],
        k: int,
        outs: Sequence[Out],
        subset: Subset | None = None,
        gone: Gone | None = None,
    ) -> list[Hits]:
        """Return each request's best items, up to `k`, over all its interests, without repeats.

        outs: item indices to pass over, in rising order, an array a request. subset: the only items
        to answer with. gone: items that no request is answered with.
        """
        queries_BHD = np.ascontiguousarray(queries_BHD, np.float32)
        size = _size(subset, len(self))
        found: dict[int, Hits] = {} if size else dict.fromkeys(range(len(outs)), NOTHING)
        for attempt in range(self._attempts(subset)):
            left = [row for row in range(len(outs)) if row not in found]
            for rows, width in self._together(left, k, outs, subset, gone, attempt):
                lists = self._ranked(queries_BHD[rows], min(width, size), subset, gone)
                for row, ranked in zip(rows, lists, strict=True):
                    hits = _best(*ranked, k, outs[row], queries_BHD.shape[1] > 1)
                    if len(hits[0]) >= k or self._is_all(hits, width, outs[row], subset):
                        found[row] = hits
        return [
            found[row] if row in found else self._scanned(queries_BHD[row], k, out, subset, gone)
            for row, out in enumerate(outs)
        ]

    def subset(self, indices: NDArray[np.integer], *, exact: bool = True) -> Subset:
        """Return some items as what a search is kept to; made once, it serves many searches.

        Of one too broad to copy, the index chooses candidates where it need not be `exact`.
        """
        mask = np.zeros(len(self) + 1, bool)
        mask[np.asarray(indices, np.int64)] = True
        mask[PAD] = False
        inside = np.flatnonzero(mask)
        size = self.vectors_ND.itemsize * self.vectors_ND.shape[1] * len(inside)
        if len(inside) > BROAD * len(self) or size > GATHERED_BYTES:
            return Masked(mask, exact)
        return Gathered(inside, _flat(self.vectors_ND[inside - 1]))

    def score(self, queries_HD: NDArray[np.float32], indices: Indices) -> Scores:
        """Return items' best inner products over the interests: float32 [C]."""
        import faiss

        ids_HC = np.ascontiguousarray(np.broadcast_to(indices - 1, (len(queries_HD), len(indices))))
        scores_HC = np.empty(ids_HC.shape, np.float32)
        # Not NumPy's product: its BLAS wakes a thread a core, and waits for those that are busy.
        faiss.fvec_inner_products_by_idx(
            faiss.swig_ptr(scores_HC),
            faiss.swig_ptr(np.ascontiguousarray(queries_HD, np.float32)),
            faiss.swig_ptr(self.vectors_ND),
            faiss.swig_ptr(ids_HC),
            self.vectors_ND.shape[1],
            *ids_HC.shape,
        )
        return scores_HC.max(axis=0)

    def score_all(self, queries_HD: NDArray[np.float32]) -> Scores:
        """Return all items' best inner products over the interests: float32 [N + 1], 0 is -inf."""
        return np.append(np.float32(-np.inf), products(queries_HD, self.vectors_ND))

    @cached_property
    def norms(self) -> Scores:
        """The vectors' lengths: float32 [N]."""
        return np.sqrt(np.einsum("nd,nd->n", self.vectors_ND, self.vectors_ND))

    def _attempts(self, subset: Subset | None) -> int:
        """Return how many searches to try before all items are scored."""
        hopeless = isinstance(subset, Masked) and subset.exact and self.kind != "flat"
        return 0 if hopeless else 2

    def _together(
        self,
        rows: list[int],
        k: int,
        outs: Sequence[Out],
        subset: Subset | None,
        gone: Gone | None,
        attempt: int,
    ) -> list[tuple[list[int], int]]:
        """Group requests that are searched with the same effort, so that a batch changes none."""
        spare = SPARE if isinstance(subset, Masked) else min(gone.count, SPARE) if gone else 0
        widths = {
            row: WIDER * (k + len(outs[row])) if attempt else k + min(len(outs[row]), SPARE) + spare
            for row in rows
        }
        groups: dict[int, list[int]] = {}
        for row, width in widths.items():
            groups.setdefault(_steps(width), []).append(row)
        return [(members, max(widths[row] for row in members)) for members in groups.values()]

    def _ranked(
        self, queries_BHD: NDArray[np.float32], width: int, subset: Subset | None, gone: Gone | None
    ) -> Iterable[tuple[Indices, Scores]]:
        """Return what one search finds for each request: items and scores, best first.

        Padding and, of several interests, repeats are still among them.
        """
        batch, interests, dim = queries_BHD.shape
        queries = queries_BHD.reshape(-1, dim)
        if isinstance(subset, Gathered):
            scores, ids = subset.index.search(queries, width)
            indices, kind = subset.indices[ids], "flat"
        else:
            fetched = min(self.refine * width, len(self))
            scores, ids = self.index.search(queries, fetched, params=self._parameters(width))
            indices, kind = ids + 1, self.kind
        if isinstance(subset, Masked):
            indices = np.where(subset.mask[indices], indices, PAD)
        if gone:
            indices = np.where(gone.mask[indices], PAD, indices)
        if interests == 1 and kind not in CODED:
            return zip(indices, scores, strict=True)
        shape = (batch, interests, -1)
        rows = zip(queries_BHD, indices.reshape(shape), scores.reshape(shape), strict=True)
        return (self._merged(*row, kind) for row in rows)

    def _merged(
        self, queries_HD: NDArray[np.float32], indices_HF: Indices, scores_HF: Scores, kind: str
    ) -> tuple[Indices, Scores]:
        """Merge what each interest found, down to the best score that one may have left behind."""
        floor = scores_HF[:, -1].max()
        indices, scores = indices_HF.ravel(), scores_HF.ravel()
        if kind != "flat":  # another interest may have missed what it would score higher
            indices = np.unique(indices)
            indices = indices[indices != PAD]
            scores = self.score(queries_HD, indices)
        certain = scores >= floor
        return _ordered(indices[certain], scores[certain])

    def _is_all(self, hits: Hits, width: int, out: Out, subset: Subset | None) -> bool:
        """Whether a search that found fewer than wanted has found all that there is."""
        if isinstance(subset, Gathered) or self.kind == "flat":
            return width >= _size(subset, len(self))
        return subset is None and len(hits[0]) >= len(self) - len(out)

    def _parameters(self, width: int) -> Any:
        """Return the parameters of a search: made once, for making them costs a tenth of it."""
        steps = _steps(width)
        if steps not in self.parameters:
            effort = -(-self.effort * steps // STEPS)
            self.parameters[steps] = search_parameters(self.kind, effort)
        return self.parameters[steps]

    def _scanned(
        self,
        queries_HD: NDArray[np.float32],
        k: int,
        out: Out,
        subset: Subset | None,
        gone: Gone | None,
    ) -> Hits:
        """Score all items: where too few were found near the query, so rare that it may be slow."""
        scores_N = self.score_all(queries_HD)
        scores_N[out[out <= len(self)]] = -np.inf
        if gone:
            scores_N[gone.mask] = -np.inf
        if isinstance(subset, Masked):
            scores_N[~subset.mask] = -np.inf
        best = np.argpartition(-scores_N, min(k, len(self)) - 1)[:k]
        best = best[scores_N[best] > -np.inf]
        return _best(*_ordered(best, scores_N[best]), k, NOTHING[0])


def products(queries_HD: NDArray[np.float32], vectors_ND: NDArray[np.float32]) -> Scores:
    """Return each vector's best inner product over the interests: float32 [N].

    >>> products(np.eye(2, dtype=np.float32), np.array([[1, 3], [2, 1]], np.float32)).tolist()
    [3.0, 2.0]
    """
    import faiss

    best_N = np.full(len(vectors_ND), -np.inf, np.float32)
    scores_N = np.empty(len(vectors_ND), np.float32)
    for query_D in np.ascontiguousarray(queries_HD, np.float32):
        # Not NumPy's product: its BLAS wakes a thread a core, and waits for those that are busy.
        faiss.fvec_inner_products_ny(
            faiss.swig_ptr(scores_N),
            faiss.swig_ptr(query_D),
            faiss.swig_ptr(vectors_ND),
            vectors_ND.shape[1],
            len(vectors_ND),
        )
        np.maximum(best_N, scores_N, out=best_N)
    return best_N


def among(indices: Indices, rising: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return which of some items are among others, which are in rising order.

    >>> among(np.array([7, 2, 9]), np.array([2, 3, 7])).tolist()
    [True, True, False]
    """
    if not len(rising):
        return np.zeros(len(indices), bool)
    places = rising.searchsorted(indices)
    return np.asarray(rising.take(places, mode="clip") == indices)


def _steps(width: int) -> int:
    """Return how far to search for `width` items, in quarters of what was tuned for 100.

    More of them, or more to pass over, lie further; with the root of their number, of 200 items
    .98 were found where of 100 .99 were.

    >>> _steps(10), _steps(100), _steps(400)
    (4, 4, 8)
    """
    return max(STEPS, math.ceil(STEPS * math.sqrt(width / RECALL_AT)))


def _size(subset: Subset | None, num_items: int) -> int:
    return len(subset.indices) if isinstance(subset, Gathered) else num_items


def _flat(vectors_MD: NDArray[np.float32]) -> faiss.Index:
    import faiss

    index = faiss.IndexFlatIP(vectors_MD.shape[1])
    index.add(vectors_MD)
    return index


def _ordered(indices: Indices, scores: Scores) -> tuple[Indices, Scores]:
    order = np.argsort(-scores, kind="stable")
    return indices[order], scores[order]


def _best(indices: Indices, scores: Scores, k: int, out: Out, repeats: bool = False) -> Hits:
    """Return the first `k` that are not to be passed over, of equal ones the smallest first."""
    kept = ~(among(indices, out) | (indices == PAD))
    if repeats:  # the first of each is its best
        firsts = np.zeros(len(indices), bool)
        firsts[np.unique(indices, return_index=True)[1]] = True
        kept &= firsts
    indices, scores = indices[kept][:k], scores[kept][:k]
    if (scores[1:] == scores[:-1]).any():  # smaller indices are more popular items
        indices = indices[np.lexsort((indices, -scores))]
    return indices, scores


def _stack(rows: Sequence[Hits], k: int) -> Found:
    indices_BK = np.full((len(rows), k), PAD, np.int64)
    scores_BK = np.full((len(rows), k), -np.inf, np.float32)
    for row, (indices, scores) in enumerate(rows):
        indices_BK[row, : len(indices)] = indices
        scores_BK[row, : len(indices)] = scores
    return Found(indices_BK, scores_BK)
