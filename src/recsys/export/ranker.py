"""The second stage of a bundle: a ranker's graph, and all that it reads of items and users.

Shapes: C candidates, T tasks, K found items, N items, D dim of a retriever, V of item vectors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.data.shown import as_model, asked
from recsys.export.onnx import export_ranker
from recsys.export.runtime import open_session, request_times
from recsys.features import ItemTable
from recsys.history import Histories
from recsys.index.bundle import FEATURES, RANKER
from recsys.models.ranker import Calibrated
from recsys.training.ranker_runs import LoadedRanker


class BundledRanker:
    """A ranker as it lies in a bundle, asked as a server asks it.

    facts: what the manifest says of it.
    """

    def __init__(self, directory: Path, ranker: LoadedRanker) -> None:
        self.session, self.ranker = open_session(directory / RANKER), ranker
        self.weight_T = np.array([ranker.blend.get(task, 0.0) for task in ranker.model.tasks])

    @classmethod
    def write(
        cls, directory: Path, ranker: LoadedRanker, vectors_ND: NDArray[np.float32]
    ) -> BundledRanker:
        """Write graph, columns and tables into a bundle's directory; row 0 is item 1's vector."""
        ranker = _embedded(ranker, vectors_ND)
        export_ranker(ranker.model, ranker.tables.features.layout, directory / RANKER)
        ranker.tables.save((directory / FEATURES).parent)
        return cls(directory, ranker)

    @property
    def facts(self) -> dict[str, Any]:
        """What a server needs to know, and where the ranker comes from."""
        ranker, model = self.ranker, self.ranker.model
        return {
            "run": ranker.path.name,
            "inputs": list(model.inputs),
            "tasks": list(model.tasks),
            "blend": ranker.blend,
            "candidates": ranker.candidates,
            "max_length": model.max_length,
            "metrics": ranker.manifest["metrics"],
        }

    def ordered(
        self,
        user: int,
        history: Histories,
        items_C: NDArray[np.int64],
        query_HD: NDArray[np.float32],
        vectors_ND: NDArray[np.float32],
    ) -> NDArray[np.int64]:
        """Return what was found for a user's history in the ranker's order; row 0 is item 1's."""
        asks = np.array([user]), history, request_times(history), items_C[None], query_HD[None]
        model, padded_ND = self.ranker.model, np.pad(vectors_ND, ((1, 0), (0, 0)))
        arrays = asked(self.ranker.tables, model.max_length, *asks, padded_ND)
        given = {name: as_model(arrays[name]) for name in model.inputs}
        probability_CT = np.asarray(self.session.run(None, given)[0][0])
        return items_C[np.argsort(-(probability_CT @ self.weight_T), kind="stable")]


def _embedded(ranker: LoadedRanker, vectors_ND: NDArray[np.float32]) -> LoadedRanker:
    """Return a ranker with all that it makes of items alone, as far as it makes something."""
    model, items = Calibrated(ranker.model.ranker, embedded=True).eval(), ranker.tables.items
    if model.inputs == ranker.model.inputs:
        return ranker
    padded_ND = np.pad(vectors_ND, ((1, 0), (0, 0)))
    items = replace(
        items,
        embeddings=model.item_embeddings(items.codes, items.vectors, padded_ND),
        added=embeddings_of_added(model, items, vectors_ND.shape[1]),
    )
    return replace(ranker, model=model, tables=replace(ranker.tables, items=items))


def embeddings_of_added(model: Calibrated, items: ItemTable, dim: int) -> NDArray[np.float32]:
    """Return what is made of an unknown item by its vector, which is linear: [1 + D, E]."""
    unknown = np.zeros(1 + dim, np.int64)
    each = np.concatenate([np.zeros((1, dim), np.float32), np.eye(dim, dtype=np.float32)])
    rows = model.item_embeddings(items.codes[unknown], items.vectors[unknown], each)
    rows[1:] -= rows[0]
    return rows
