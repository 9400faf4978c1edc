"""Dataset directories with known contents, and scorers with known answers, for the tests beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys.artifacts import write_manifest, writing
from recsys.data.dataset import Dataset, by_time, leave_one_out

LEAVE_ONE_OUT = {"rule": "leave_one_out"}


def write_dataset(
    path: Path,
    items: Sequence[Sequence[int]],
    times: Sequence[Sequence[int]] | None = None,
    split: dict[str, Any] = LEAVE_ONE_OUT,
    num_items: int | None = None,
) -> Dataset:
    """Write one trajectory of item indices a user (and times in milliseconds) as a dataset."""
    lengths = np.array([len(one) for one in items], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = np.array([i for one in items for i in one], np.int32)
    moments = np.array([t for one in times or map(range, map(len, items)) for t in one], np.int64)
    num_items = num_items or int(flat.max())
    train = _train(flat, moments, offsets, split)
    with writing(path) as scratch:
        _write_events(scratch / "events", flat, moments, offsets)
        _write_tables(scratch, flat, train, lengths, num_items)
        write_manifest(
            scratch,
            "dataset",
            name=path.name,
            num_users=len(lengths),
            num_items=num_items,
            num_events=len(flat),
            has_time=times is not None,
            event_types=["view"],
            has_values=False,
            split=split,
            item_features={},
            user_features={},
        )
    return Dataset(path)


def _train(flat: np.ndarray, moments: np.ndarray, offsets: np.ndarray, split: dict) -> np.ndarray:
    if split["rule"] == "leave_one_out":
        ends = leave_one_out(np.diff(offsets)).train_end
    else:
        ends = by_time(offsets, moments, split["validation_from"], split["test_from"]).train_end
    parts = [flat[start : start + end] for start, end in zip(offsets, ends, strict=False)]
    return np.concatenate(parts)


def _write_events(folder: Path, flat: np.ndarray, moments: np.ndarray, offsets: np.ndarray) -> None:
    folder.mkdir()
    arrays = {
        "items": flat,
        "types": np.ones(len(flat), np.int8),
        "times": moments,
        "values": np.full(len(flat), np.nan, np.float32),
        "offsets": offsets,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _write_tables(
    folder: Path, flat: np.ndarray, train: np.ndarray, lengths: np.ndarray, num_items: int
) -> None:
    counts, train_counts = (np.bincount(x, minlength=num_items + 1)[1:] for x in (flat, train))
    names = [f"item {i}" for i in range(1, num_items + 1)]
    items = {"item_id": names, "count": counts, "train_count": train_counts}
    pq.write_table(pa.table(items), folder / "items.parquet")
    users = {"user_id": [f"user {u}" for u in range(len(lengths))], "count": lengths}
    pq.write_table(pa.table(users), folder / "users.parquet")


class FixedScores:
    """Gives every user a row of a table of scores, and remembers what it was asked."""

    def __init__(self, scores_UN: np.ndarray, name: str = "fixed") -> None:
        self.name = name
        self.scores_UN = torch.from_numpy(np.asarray(scores_UN, np.float32))
        self.batches: list[Any] = []

    def score(self, batch: Any) -> torch.Tensor:
        self.batches.append(batch)
        return self.scores_UN[torch.from_numpy(batch.users)]
