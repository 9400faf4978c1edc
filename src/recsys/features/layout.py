"""What encoded columns look like: the layout that a ranker reads, and the item table.

Shapes: B requests, C candidates, L history length, N items, W codes, G numbers, V vector, X raw.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.features.columns import INDICES
from recsys.features.transitions import Transitions
from recsys.history import Arrays


@dataclass(frozen=True)
class Field:
    """A categorical field of a layout: `width` places of codes 0 to `size` - 1 in a codes array."""

    name: str
    size: int
    width: int = 1


@dataclass(frozen=True)
class Layout:
    """What a ranker reads: the fields and columns of each encoded array, in their order."""

    request_codes: tuple[Field, ...] = ()
    request_numbers: tuple[str, ...] = ()
    item_codes: tuple[Field, ...] = ()
    item_numbers: tuple[str, ...] = ()
    cross_numbers: tuple[str, ...] = ()
    vector_width: int = 0

    @property
    def item_index(self) -> int | None:
        """Where an item's own index is in an array of codes; None where it is not declared."""
        places = accumulate((field.width for field in self.item_codes), initial=0)
        named = zip(self.item_codes, places, strict=False)
        return next((place for field, place in named if field.name == INDICES["item"]), None)


@dataclass(frozen=True)
class ItemTable:
    """All items encoded; row i is item index i, row 0 an unknown item.

    codes: int32 [N + 1, W]; numbers: float32 [N + 1, G], NaN is missing; vectors: float32
    [N + 1, V]; raw: float64 [N + 1, X], numbers that path columns read, in the order of
    `Features.raw_names`; transitions: what came next in the log, a table a declared column;
    embeddings: all that a trained ranker makes of an item alone, float32 [N + 1, E]; added: what
    it makes of one that was added since, of which only the retriever's vector is known: float32
    [1 + D, E], the first row and the vector times the others.
    """

    codes: NDArray[np.int32]
    numbers: NDArray[np.float32]
    vectors: NDArray[np.float32]
    raw: NDArray[np.float64]
    transitions: tuple[Transitions, ...] = ()
    embeddings: NDArray[np.float32] | None = None
    added: NDArray[np.float32] | None = None

    def of_added(self, vectors_AD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the embeddings of items that only have a vector: [A, E]."""
        assert self.added is not None
        embeddings_AE: NDArray[np.float32] = self.added[0] + vectors_AD @ self.added[1:]
        return embeddings_AE


class Rate(NamedTuple):
    """A statistic of the log: the share of events of `task`, for each value of item field `by`."""

    name: str
    by: str
    task: str
    prior: float


def gather(
    table: ItemTable,
    candidates_BC: NDArray[np.integer],
    items_BL: NDArray[np.integer] | None = None,
) -> Arrays:
    """Look up what a ranker reads of the candidates and of the path's items, by index.

    Returns `item_codes` int64 [B, C, W], `item_numbers` float32 [B, C, G] and `item_vectors`
    float32 [B, C, V]; where `items_BL` is given, `path_codes` int64 [B, L, W]; none of zero width.
    Where the table has embeddings, these in place of vectors and the path's codes:
    `item_embeddings` float32 [B, C, E], and `path_embeddings` [B, L, E].
    """
    # `take` is about half the time of indexing.
    found: Arrays = {
        "item_codes": table.codes.take(candidates_BC, axis=0).astype(np.int64),
        "item_numbers": table.numbers.take(candidates_BC, axis=0),
    }
    if table.embeddings is None:
        found["item_vectors"] = table.vectors.take(candidates_BC, axis=0)
        if items_BL is not None:
            found["path_codes"] = table.codes.take(items_BL, axis=0).astype(np.int64)
    else:
        found["item_embeddings"] = table.embeddings.take(candidates_BC, axis=0)
        if items_BL is not None:
            found["path_embeddings"] = table.embeddings.take(items_BL, axis=0)
    return {name: array for name, array in found.items() if array.shape[-1]}
