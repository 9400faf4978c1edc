"""Small bundles with a known answer: the encoder's query is the last item's vector.

Items of one aisle point one way, so whoever looked at an aisle last is answered from it. Shapes:
N items, D dim, B requests, L history length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from recsys.artifacts import write_manifest, writing
from recsys.index.build import build

AISLES = ("shoes", "hats", "books", "garden")
ODD_IDS = ("a b", 'say "hi"', "a/b", "名前", "🎧", "50%", "x?y=1#z", "../up")
START = 1_700_000_000_000
MAX_LENGTH = 8
DAY = 86_400_000


def item_vectors(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Return [N, D] vectors: item i belongs to aisle i modulo 4, all a little apart."""
    vectors_ND = np.random.default_rng(seed).normal(0, 0.05, (count, dim))
    vectors_ND[np.arange(count), np.arange(count) % len(AISLES)] += 1
    return vectors_ND.astype(np.float32)


def item_ids(count: int) -> list[str]:
    """Return the odd ids first, then i9, i10, …"""
    return [ODD_IDS[i] if i < len(ODD_IDS) else f"i{i + 1}" for i in range(count)]


def encoder(vectors_ND: np.ndarray, inputs: tuple[str, ...]) -> onnx.ModelProto:
    """Return a graph whose query [B, 1, D] is the vector of each history's last item."""
    padded = np.concatenate([np.zeros_like(vectors_ND[:1]), vectors_ND])
    constants = {"table": padded, "one": np.array(1), "axis": np.array([1])}
    nodes = [
        helper.make_node("Sub", ["lengths", "one"], ["end_B"]),
        helper.make_node("Unsqueeze", ["end_B", "axis"], ["end_B1"]),
        helper.make_node("GatherElements", ["items", "end_B1"], ["last_B1"], axis=1),
        helper.make_node("Gather", ["table", "last_B1"], ["queries"]),
    ]
    grids = {"items", "types", "gaps"}
    shapes = {name: ["batch", "length"] if name in grids else ["batch"] for name in inputs}
    graph = helper.make_graph(
        nodes,
        "last_item",
        [helper.make_tensor_value_info(n, TensorProto.INT64, s) for n, s in shapes.items()],
        [
            helper.make_tensor_value_info(
                "queries", TensorProto.FLOAT, ["batch", 1, padded.shape[1]]
            )
        ],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10)


def write_tiny_bundle(
    path: Path,
    *,
    num_items: int = 120,
    num_users: int = 20,
    dim: int = 8,
    has_time: bool = True,
    has_categories: bool = True,
    inputs: tuple[str, ...] = ("items", "lengths"),
    ranker: onnx.ModelProto | None = None,
    candidates: int = 20,
) -> Path:
    """Write a bundle: user u looked at items u + 1 to u + 3; the first items are most popular."""
    ids = item_ids(num_items)
    vectors_ND = item_vectors(num_items, dim)
    columns = {"item_id": ids, "count": np.arange(num_items, 0, -1) * 10}
    if has_categories:
        columns["title"] = [f"Title {i + 1}" for i in range(num_items)]
        columns["category"] = [AISLES[i % len(AISLES)] for i in range(num_items)]
        columns["price"] = np.linspace(1, 9, num_items)
        columns["vector"] = list(vectors_ND)
    built = build(vectors_ND, {"kind": "flat"})
    with writing(path) as scratch:
        pq.write_table(pa.table(columns), scratch / "items.parquet")
        users = pa.table({"user_id": pa.array([f"u{u}" for u in range(num_users)], pa.string())})
        pq.write_table(users, scratch / "users.parquet")
        _write_events(scratch / "events", num_users, has_time)
        save_file({"vectors": vectors_ND}, scratch / "item_vectors.safetensors")
        onnx.save(encoder(vectors_ND, inputs), scratch / "encoder.onnx")
        _write_index(built.index, scratch / "index.faiss")
        ranked = {}
        if ranker is not None:
            onnx.save(ranker, scratch / "ranker.onnx")
            names = [value.name for value in ranker.graph.input]
            ranked = {"ranker": {"inputs": names, "candidates": candidates}}
        facts = {"name": "tiny", "version": path.name, "model": "trajectory", "run": "none"}
        sizes = {"dim": dim, "interests": 1, "max_length": MAX_LENGTH}
        counts = {"num_items": num_items, "num_users": num_users, "has_time": has_time}
        more = {"encoder_inputs": list(inputs), "event_types": ["view"], "index": built.facts}
        facts |= sizes | counts | more | ranked
        write_manifest(scratch, "bundle", **facts, self_test=[])
    return path


def _write_events(folder: Path, num_users: int, has_time: bool) -> None:
    folder.mkdir()
    items = np.arange(num_users)[:, None] + [1, 2, 3]
    step, start = (DAY, START) if has_time else (1, 0)
    times = np.tile(start + np.arange(3) * step, num_users)
    np.save(folder / "items.npy", items.ravel().astype(np.int32))
    np.save(folder / "types.npy", np.ones(items.size, np.int8))
    np.save(folder / "times.npy", times.astype(np.int64))
    np.save(folder / "offsets.npy", np.arange(num_users + 1, dtype=np.int64) * 3)


def _write_index(index: object, file: Path) -> None:
    import faiss

    faiss.write_index(index, str(file))
