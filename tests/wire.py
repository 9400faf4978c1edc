"""Paths of a dataset as a request brings them."""

from __future__ import annotations

from typing import Any

import numpy as np

from recsys.data.dataset import Dataset
from recsys.evaluation.scorers import EvaluationBatch
from recsys.schema import EVENT_TYPES


def history(dataset: Dataset, batch: EvaluationBatch, b: int) -> list[dict[str, Any]]:
    """Return the path of place `b` in a batch, values and all."""
    ids = dataset.items["item_id"]
    part = slice(batch.histories.offsets[b], batch.histories.offsets[b + 1])
    paths = batch.histories
    assert paths.values is not None
    columns = (column[part] for column in (paths.items, paths.types, paths.times, paths.values))
    return [
        {
            "item_id": ids[int(item) - 1].as_py(),
            "event_type": EVENT_TYPES[int(kind) - 1],
            "timestamp": int(time),
            "value": None if np.isnan(value) else float(value),
        }
        for item, kind, time, value in zip(*columns, strict=True)
    ]
