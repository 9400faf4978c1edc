"""Small bundles with a known answer: the encoder's query is the last item's vector.

Items of one aisle point one way, so whoever looked at an aisle last is answered from it. Shapes:
N items, D dim, B requests, L history length.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from recsys.artifacts import write_manifest, writing
from recsys.data.dataset import Dataset
from recsys.data.transitions import TransitionLog
from recsys.features import Features, ItemTable
from recsys.features.transitions import Followed, kept
from recsys.index.build import build

AISLES = ("shoes", "hats", "books", "garden")
ODD_IDS = ("a b", 'say "hi"', "a/b", "名前", "🎧", "50%", "x?y=1#z", "../up")
START = 1_700_000_000_000
MAX_LENGTH = 8
DAY = 86_400_000
TASKS = ("view", "purchase")
BLEND = {"view": 0.25, "purchase": 1.0}
DEVICES = ("phone", "tablet", "desk")
COLUMNS: dict[str, dict[str, object]] = {
    "item_id": {"of": "item", "kind": "categorical"},
    "category": {"of": "item", "kind": "categorical"},
    "price": {"of": "item", "kind": "numeric", "scale": "log"},
    "vector": {"of": "item", "kind": "vector"},
    "region": {"of": "user", "kind": "categorical"},
    "age": {"of": "user", "kind": "numeric", "scale": "standard"},
    "device": {"of": "request", "kind": "categorical"},
    "budget": {"of": "request", "kind": "numeric", "default": 5.0},
    "hour": {"of": "request", "kind": "hour"},
    "position": {"of": "shown", "kind": "position"},
    "category_seen": {"of": "path", "kind": "count", "by": "category"},
    "category_since": {"of": "path", "kind": "since", "by": "category"},
    "price_ratio": {"of": "path", "kind": "ratio", "by": "price"},
    "category_next": {"of": "path", "kind": "transition", "by": "category"},
}
"""What the tiny ranker reads, one column or more of each kind that a server has a part in."""
RANKER_INPUTS = {
    "request_codes": (TensorProto.INT64, ["b", "wr"]),
    "request_numbers": (TensorProto.FLOAT, ["b", "gr"]),
    "item_codes": (TensorProto.INT64, ["b", "c", "wi"]),
    "item_numbers": (TensorProto.FLOAT, ["b", "c", "gi"]),
    "item_vectors": (TensorProto.FLOAT, ["b", "c", "v"]),
    "cross_numbers": (TensorProto.FLOAT, ["b", "c", "gx"]),
    "path_codes": (TensorProto.INT64, ["b", "l", "wi"]),
    "retrieval_scores": (TensorProto.FLOAT, ["b", "c"]),
    "types": (TensorProto.INT64, ["b", "l"]),
    "lengths": (TensorProto.INT64, ["b"]),
}


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


def tiny_features(items: pa.Table, users: pa.Table) -> Features:
    """Return the columns above, learnt of some items, users and three requests."""
    asked = {"device": pa.array(DEVICES), "budget": pa.array([1.0, 5.0, 9.0])}
    return Features.fit(COLUMNS, items, users, asked)


def tasks_ranker(inputs: tuple[str, ...] = tuple(RANKER_INPUTS)) -> onnx.ModelProto:
    """Return a ranker of two tasks to whose logit everything that it reads adds something.

    Each array is summed over all but requests and candidates, a missing number as 7.
    """
    nodes, parts = [], []
    for place, name in enumerate(inputs):
        shape = RANKER_INPUTS[name][1]
        nodes.append(helper.make_node("Cast", [name], [f"{name}_f"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("IsNaN", [f"{name}_f"], [f"{name}_nan"]))
        nodes.append(
            helper.make_node("Where", [f"{name}_nan", "seven", f"{name}_f"], [f"{name}_w"])
        )
        per_item = "c" in shape
        axes = "last" if len(shape) > 1 + per_item else "none"
        several = "both" if name == "path_codes" else axes
        nodes.append(
            helper.make_node(
                "ReduceSum",
                [f"{name}_w", several],
                [f"{name}_s"],
                keepdims=0,
                noop_with_empty_axes=1,
            )
        )
        summed = f"{name}_s"
        if not per_item:
            nodes.append(helper.make_node("Unsqueeze", [summed, "one"], [f"{name}_u"]))
            summed = f"{name}_u"
        nodes.append(helper.make_node("Mul", [summed, f"share_{place}"], [f"{name}_p"]))
        parts.append(f"{name}_p")
    nodes += [
        helper.make_node("Sum", parts, ["total"]),
        helper.make_node("Unsqueeze", ["total", "two"], ["logit"]),
        helper.make_node("Mul", ["logit", "signs"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["probabilities"]),
    ]
    constants = {
        "seven": np.float32(7),
        "last": np.array([-1]),
        "both": np.array([1, 2]),
        "none": np.array([], np.int64),
        "one": np.array([1]),
        "two": np.array([2]),
        "signs": np.array([1.0, -0.5], np.float32),
    } | {f"share_{place}": np.float32(0.01 * (place + 1)) for place in range(len(inputs))}
    graph = helper.make_graph(
        nodes,
        "tasks",
        [helper.make_tensor_value_info(name, *RANKER_INPUTS[name]) for name in inputs],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["b", "c", 2])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


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
    featured: bool = False,
    index: str = "flat",
    effort: int | None = None,
    alike: int = 0,
) -> Path:
    """Write a bundle: user u looked at items u + 1 to u + 3; the first items are most popular.

    featured: the ranker answers with `TASKS`, and reads features of `COLUMNS`. index: its kind;
    effort: lists to look into, in place of what it was tuned to. alike: so many items that follow
    each other in an aisle have one vector.
    """
    ids = item_ids(num_items)
    vectors_ND = item_vectors(num_items, dim)
    if alike:
        items = np.arange(num_items)
        vectors_ND = vectors_ND[items // (alike * len(AISLES)) * alike * len(AISLES) + items % 4]
    columns = {"item_id": ids, "count": np.arange(num_items, 0, -1) * 10}
    if has_categories:
        columns["title"] = [f"Title {i + 1}" for i in range(num_items)]
        columns["category"] = [AISLES[i % len(AISLES)] for i in range(num_items)]
        columns["price"] = np.linspace(1, 9, num_items)
        columns["vector"] = list(vectors_ND)
    built = build(vectors_ND, {"kind": index})
    facts_of_index = built.facts | ({} if effort is None else {"nprobe": effort})
    with writing(path) as scratch:
        pq.write_table(pa.table(columns), scratch / "items.parquet")
        users = tiny_users(num_users)
        pq.write_table(users.select(["user_id"]), scratch / "users.parquet")
        _write_events(scratch / "events", num_users, has_time)
        save_file({"vectors": vectors_ND}, scratch / "item_vectors.safetensors")
        onnx.save(encoder(vectors_ND, inputs), scratch / "encoder.onnx")
        _write_index(built.index, scratch / "index.faiss")
        ranked = {}
        if ranker is not None:
            onnx.save(ranker, scratch / "ranker.onnx")
            names = [value.name for value in ranker.graph.input]
            ranked = {"ranker": {"inputs": names, "candidates": candidates}}
        if featured:
            ranked["ranker"] |= {"tasks": list(TASKS), "blend": BLEND}
            _write_features(scratch / "ranker", pa.table(columns), users)
        facts = {"name": "tiny", "version": path.name, "model": "trajectory", "run": "none"}
        sizes = {"dim": dim, "interests": 1, "max_length": MAX_LENGTH}
        counts = {"num_items": num_items, "num_users": num_users, "has_time": has_time}
        more = {"encoder_inputs": list(inputs), "event_types": ["view"], "index": facts_of_index}
        facts |= sizes | counts | more | ranked
        write_manifest(scratch, "bundle", **facts, self_test=[])
    return path


def tiny_users(count: int) -> pa.Table:
    """Return the users: their region and age go by their number."""
    return pa.table(
        {
            "user_id": pa.array([f"u{u}" for u in range(count)], pa.string()),
            "region": pa.array([("north", "south", "west")[u % 3] for u in range(count)]),
            "age": pa.array([20.0 + u for u in range(count)]),
        }
    )


def _write_features(folder: Path, items: pa.Table, users: pa.Table) -> None:
    folder.mkdir()
    features = tiny_features(items, users)
    table, (codes, numbers) = features.items(items, {}), features.users(users)
    (folder / "features.json").write_text(json.dumps(features.as_json()))
    arrays: dict[str, np.ndarray] = {
        "item_codes": table.codes,
        "item_numbers": table.numbers,
        "item_vectors": table.vectors,
        "item_raw": table.raw,
        "user_codes": codes,
        "user_numbers": numbers,
    }
    for name, array in (arrays | kept([tiny_transitions(features, table)])).items():
        np.save(folder / f"{name}.npy", array)


def tiny_transitions(features: Features, table: ItemTable) -> Followed:
    """Return what came next: after a view of every item the one four places on, in its aisle."""
    items = np.arange(1, len(table.codes) - 4)
    paths = np.stack([items, items + 4], axis=1).ravel()
    events = {"items": paths, "types": np.ones_like(paths), "times": np.full(len(paths), START)}
    log = SimpleNamespace(events=events, offsets=np.arange(len(items) + 1) * 2)
    codes = features.codes_of("category", table)
    return TransitionLog(cast(Dataset, log), codes, features.transitions[0].prior).before(None)


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
