"""A bundle of any size in a minute: made-up people, clustered items, an encoder without training.

Who it recommends what to means nothing; what it costs is what a trained one of its shape costs.
Shapes: U users, N items, E events, D dim.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.artifacts import write_manifest, writing
from recsys.data.dataset import Dataset
from recsys.schema import EVENT_TYPES

CLUSTER = 100
"""Items of one cluster, whose vectors lie together, as those of trained models do."""
APART = 0.8
"""How far an item lies from its cluster's middle, beside that middle's length."""
DAY = 86_400_000
FROM = 1_700_000_000_000
TASTES = 3
"""Clusters that a person goes to."""


def big_bundle(folder: Path, users: int, items: int, mean_length: float, seed: int = 0) -> Path:
    """Make `folder`/bundle, once, beside the dataset that it is of; return the bundle's path."""
    import torch

    from recsys.data.catalogue import Catalogue
    from recsys.export.bundle import item_vectors, write_bundle
    from recsys.export.onnx import export_encoder
    from recsys.models import Trajectory

    path = folder / "bundle"
    if path.is_dir():
        return path
    dataset = made_dataset(folder / "dataset", users, items, mean_length, seed)
    torch.manual_seed(seed)
    model = Trajectory(Catalogue.of(dataset)).eval()
    with torch.no_grad():
        model.items.weight[1:] = torch.from_numpy(clustered(items, model.items.embedding_dim, seed))
    export_encoder(model, folder / "encoder.onnx")
    facts = {"name": "big", "model": "trajectory", "run": "none", "metrics": {}}
    facts |= {"encoder_inputs": list(model.inputs), "max_length": model.max_length}
    vectors_ND = item_vectors(model)
    write_bundle(
        path, encoder=folder / "encoder.onnx", vectors_ND=vectors_ND, dataset=dataset, facts=facts
    )
    return path


def clustered(items: int, dim: int, seed: int) -> np.ndarray:
    """Return float32 [N, D]: item i belongs to cluster i mod (N / CLUSTER)."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(max(1, items // CLUSTER), dim))
    near = APART * rng.normal(size=(items, dim))
    vectors = middles[np.arange(items) % len(middles)] + near
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def made_dataset(path: Path, users: int, items: int, mean_length: float, seed: int) -> Dataset:
    """Write a dataset's files without a log: people go to a few clusters, mostly to the head."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.gamma(1.0, mean_length, users), 1, 500).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    drawn = _paths(rng, lengths, items)
    with writing(path) as scratch:
        count = np.bincount(drawn, minlength=items + 1)[1:]
        _tables(scratch, users, items, count)
        arrays = {
            "items": drawn,
            "types": rng.choice([1, 1, 1, 2, 3, 4], len(drawn)).astype(np.int8),
            "times": _times(rng, lengths, offsets),
            "values": np.zeros(len(drawn), np.float32),
            "offsets": offsets,
        }
        (scratch / "events").mkdir()
        for name, array in arrays.items():
            np.save(scratch / "events" / f"{name}.npy", array)
        write_manifest(
            scratch,
            "dataset",
            name="big",
            num_users=users,
            num_items=items,
            num_events=len(drawn),
            has_time=True,
            has_values=False,
            event_types=list(EVENT_TYPES),
            split={"rule": "leave_one_out"},
            item_features={},
            user_features={},
        )
    return Dataset(path)


def _tables(folder: Path, users: int, items: int, count: np.ndarray) -> None:
    ids = pa.array([f"item-{item:07d}" for item in range(items)])
    table = {"item_id": ids, "count": pa.array(count), "train_count": pa.array(count)}
    pq.write_table(pa.table(table), folder / "items.parquet")
    people = pa.array([f"user-{user:09d}" for user in range(users)])
    pq.write_table(pa.table({"user_id": people}), folder / "users.parquet")


def _paths(rng: np.random.Generator, lengths: np.ndarray, items: int) -> np.ndarray:
    """Return each event's item, int32 [E]: one of a cluster of its person's, head items more."""
    clusters = max(1, items // CLUSTER)
    tastes_UT = rng.integers(0, clusters, (len(lengths), TASTES))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    cluster = tastes_UT[owner, rng.integers(0, TASTES, len(owner))]
    place = (items // clusters * rng.random(len(owner)) ** 2).astype(np.int64)
    return (cluster + place * clusters + 1).astype(np.int32)


def _times(rng: np.random.Generator, lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return milliseconds, int64 [E], rising within each person's path, over some 100 days."""
    steps = rng.exponential(DAY, int(lengths.sum())).astype(np.int64)
    total = np.cumsum(steps)
    return FROM + total - np.repeat(total[offsets[:-1]], lengths)
