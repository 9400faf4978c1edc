"""Build a FAISS index over item vectors and tune it on real query vectors to a stated recall.

Shapes: N items, D dim, Q queries. All indexes answer by inner product; id = item index - 1. The
vectors may be a memory map: an index is trained on a sample of them, and they are added in parts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recsys.index import kinds
from recsys.index.kinds import MAKERS, Vectors, chunks
from recsys.index.shards import Shards, names, ranges
from recsys.index.tuning import one_thread, queries_of, tune
from recsys.schema import InputError, suggestion

if TYPE_CHECKING:
    import faiss

__all__ = ["BuiltIndex", "IndexSettings", "build", "check_vectors", "one_thread"]

KINDS = ("auto", *MAKERS)
OPTIONS: dict[str, tuple[str, ...]] = {
    "auto": ("exact_up_to", "whole_up_to_mib", "target_recall", "nlist", "code_bytes", "shards"),
    "flat": ("shards",),
    "ivf_flat": ("target_recall", "nlist", "shards"),
    "hnsw": ("target_recall", "neighbours", "ef_construction", "shards"),
    "ivf_sq8": ("target_recall", "nlist", "shards"),
    "ivf_pq": ("target_recall", "nlist", "code_bytes", "shards"),
}
"""Settings that have an effect with each kind; any other is refused."""
FLOAT_BYTES = 4
LOOKED_EVERY = 0.02
"""Seconds between two looks at the memory of a build."""


@dataclass(frozen=True)
class IndexSettings:
    """How to build the index; mirrors `configs/index/*.yaml`.

    kind: `auto` is exact up to `exact_up_to` items, ivf_flat while the vectors take no more than
    `whole_up_to_mib`, and ivf_pq above. target_recall: recall@100 against exact search to tune for.
    nlist: inverted lists (4 √N where not given). neighbours, ef_construction: HNSW's links an item
    and width of its build. code_bytes: of a product-quantised vector, a divisor of D (D / 2 where
    not given). shards: parts by item ranges, each a file.
    """

    kind: str = "auto"
    exact_up_to: int = 20_000
    whole_up_to_mib: int = 512
    target_recall: float = 0.99
    nlist: int | None = None
    neighbours: int = 32
    ef_construction: int = 200
    code_bytes: int | None = None
    shards: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"index.kind={self.kind!r} is not one of {', '.join(KINDS)}"
                + suggestion(str(self.kind), KINDS)
            )
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in OPTIONS[self.kind]:
                raise InputError(
                    f"index.{field.name}={value} has no effect with index.kind={self.kind}; "
                    "leave it out, or choose another index.kind"
                )
            if value is not None and not value > 0:
                raise InputError(f"index.{field.name}={value} must be above 0")
        if self.target_recall > 1:
            raise InputError(f"index.target_recall={self.target_recall} must be at most 1")

    @classmethod
    def of(cls, settings: IndexSettings | Mapping[str, Any] | None) -> IndexSettings:
        """Read settings from a resolved config group; an unknown name is an error.

        >>> IndexSettings.of({"kind": "hnsw"}).neighbours
        32
        """
        if isinstance(settings, IndexSettings):
            return settings
        given = {str(k): v for k, v in (settings or {}).items() if k != "_target_"}
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise InputError(
                    f"unknown setting index.{name}; expected one of {', '.join(known)}"
                    + suggestion(name, known)
                )
        return cls(**given)

    def resolve(self, num_items: int, dim: int = 64) -> str:
        """Return the kind to build for this many items.

        >>> sizes = (20_000, 20_001, 2_097_152, 2_097_153)
        >>> [IndexSettings().resolve(size) for size in sizes]
        ['flat', 'ivf_flat', 'ivf_flat', 'ivf_pq']
        """
        if self.kind != "auto":
            return self.kind
        if num_items <= self.exact_up_to:
            return "flat"
        whole = num_items * dim * FLOAT_BYTES <= self.whole_up_to_mib << 20
        return "ivf_flat" if whole else "ivf_pq"


@dataclass(frozen=True)
class BuiltIndex:
    """A FAISS index, or its shards, and what the manifest says of it."""

    index: faiss.Index | Shards
    facts: dict[str, Any]

    def write(self, directory: Path) -> dict[str, Any]:
        """Write the index into a bundle's directory; return the facts with its size on disk."""
        parts = self.index.parts if isinstance(self.index, Shards) else [self.index]
        files = [directory / name for name in names(len(parts))]
        for part, file in zip(parts, files, strict=True):
            kinds.write(part, file)
        return {**self.facts, "bytes": sum(file.stat().st_size for file in files)}


def build(
    vectors_ND: Vectors,
    settings: IndexSettings | Mapping[str, Any] | None = None,
    queries: Vectors | None = None,
) -> BuiltIndex:
    """Build an index over item vectors and tune its search effort on `queries` [Q, D].

    Without queries it is tuned on a sample of the items themselves. The facts hold kind, nlist,
    nprobe or ef_search, of codes how many are scored exactly for each answer (refine), the
    recall@100 reached, the whole curve against p50 latency on one thread, and what the build took.
    Raises InputError on NaN, infinite or no vectors, and settings that do not fit them.

    >>> build(np.eye(3, dtype=np.float32)).facts["kind"]
    'flat'
    """
    chosen = IndexSettings.of(settings)
    vectors_ND = check_vectors(vectors_ND, "item vectors")
    if queries is not None:
        queries = check_vectors(queries, "query vectors")
    kind = chosen.resolve(*vectors_ND.shape)
    started = time.perf_counter()
    with peak_memory() as held:
        empty = MAKERS[kind](vectors_ND, chosen)
        index = _filled(empty, vectors_ND, chosen.shards)
    facts = {"kind": kind, **_shape_facts(kind, empty)}
    facts |= {"shards": chosen.shards} if chosen.shards > 1 else {}
    facts["build_seconds"] = round(time.perf_counter() - started, 3)
    facts["build_peak_mib"] = round(held["mib"], 1)
    asked = queries_of(queries, vectors_ND)
    facts |= tune(index, kind, vectors_ND, asked, chosen.target_recall, facts.get("nlist", 0))
    facts["tuned_on"] = "items" if queries is None else "queries"
    return BuiltIndex(index, facts)


def check_vectors(vectors: NDArray[np.floating], what: str) -> Vectors:
    """Return a contiguous float32 matrix, or raise InputError naming the first bad row."""
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise InputError(f"{what}: expected a non-empty matrix, found shape {vectors.shape}")
    parts = (_bad_rows(vectors, part) for part in chunks(vectors))
    bad = np.concatenate(list(parts))
    if len(bad):
        raise InputError(
            f"{what}: {len(bad)} of {len(vectors)} rows hold NaN or infinite values, the first is "
            f"row {bad[0]}; the training diverged: train again with a lower learning rate"
        )
    return np.ascontiguousarray(vectors, np.float32)


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Yield a dict whose `mib` is in the end the most that the block held beyond its start.

    Pages of mapped files are not counted: the system takes them back where it needs them.
    """
    import psutil

    process, ended, held = psutil.Process(), threading.Event(), {"mib": 0.0}

    def own() -> float:
        memory = process.memory_info()
        return (memory.rss - getattr(memory, "shared", 0)) / 2**20

    before = own()

    def look() -> None:
        while not ended.wait(LOOKED_EVERY):
            held["mib"] = max(held["mib"], own() - before)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield held
    finally:
        ended.set()
        watcher.join()
        held["mib"] = max(held["mib"], own() - before)


def _filled(empty: faiss.Index, vectors_ND: Vectors, count: int) -> faiss.Index | Shards:
    """Add the vectors to an index that is trained, or each range of them to a copy of it."""
    import faiss

    if count > len(vectors_ND):
        raise InputError(f"index.shards={count} is more than the {len(vectors_ND)} items; lower it")
    if count == 1:
        return _added(empty, vectors_ND)
    rows = ranges(len(vectors_ND), count)
    return Shards([_added(faiss.clone_index(empty), vectors_ND[part]) for part in rows])


def _added(index: faiss.Index, vectors_ND: Vectors) -> faiss.Index:
    for part in chunks(vectors_ND):
        index.add(np.asarray(vectors_ND[part]))
    return index


def _bad_rows(vectors: NDArray[np.floating], part: slice) -> NDArray[np.int64]:
    return part.start + np.flatnonzero(~np.isfinite(vectors[part]).all(axis=1))


def _shape_facts(kind: str, index: faiss.Index) -> dict[str, Any]:
    if kind == "hnsw":
        return {
            "neighbours": index.hnsw.nb_neighbors(1),
            "ef_construction": index.hnsw.efConstruction,
        }
    if kind == "flat":
        return {}
    facts = {"nlist": index.nlist}
    return {**facts, "code_bytes": index.code_size} if kind == "ivf_pq" else facts
