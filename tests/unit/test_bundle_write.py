"""A bundle is written whole, read back without torch, and refused when anything in it is off."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper

from recsys.artifacts import SCHEMA_VERSIONS, Workspace, write_manifest
from recsys.data.dataset import Dataset
from recsys.export.bundle import export, write_bundle
from recsys.history import encode
from recsys.index.bundle import FILES, Bundle, UserRows
from recsys.index.search import ItemIndex
from recsys.schema import InputError

# N items, D dim
ITEM_IDS = ["plain", "with space", 'quote"s', "emoji 🎈", "中文", "x/y", "'; --"]
USER_IDS = ["ann", "bob 🎈", "王"]
N, D = len(ITEM_IDS), 4
PATHS = [[1, 2, 3, 1], [4, 5], [7]]
VECTORS_ND = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
FACTS = {
    "name": "tiny",
    "model": "trajectory",
    "run": "tiny",
    "mlflow_run_id": None,
    "encoder_inputs": ["items", "lengths"],
    "max_length": 3,
    "metrics": {"test": {"ndcg@10": 0.5}},
}


def mean_encoder(vectors_ND: np.ndarray = VECTORS_ND) -> bytes:
    """An encoder whose query is the mean vector of the history: the answer is known by hand."""
    table = np.concatenate([np.zeros((1, vectors_ND.shape[1]), np.float32), vectors_ND])
    nodes = [
        helper.make_node("Gather", ["table", "items"], ["read"]),
        helper.make_node("ReduceSum", ["read", "axis"], ["sum"], keepdims=1),
        helper.make_node("Cast", ["lengths"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["count", "last"], ["column"]),
        helper.make_node("Div", ["sum", "column"], ["queries"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [
            helper.make_tensor_value_info("items", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["batch", 1, table.shape[1]])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([1]), "axis"),
            numpy_helper.from_array(np.array([1, 2]), "last"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return tiny_dataset(tmp_path / "datasets" / "tiny")


def tiny_dataset(path: Path) -> Dataset:
    (path / "events").mkdir(parents=True)
    flat = np.concatenate(PATHS).astype(np.int32)
    offsets = np.cumsum([0, *map(len, PATHS)]).astype(np.int64)
    arrays = {
        "items": flat,
        "types": np.ones(len(flat), np.int8),
        "times": 1_600_000_000_000 + np.arange(len(flat), dtype=np.int64) * 60_000,
        "values": np.full(len(flat), np.nan, np.float32),
        "offsets": offsets,
    }
    for name, array in arrays.items():
        np.save(path / "events" / f"{name}.npy", array)
    counts = np.bincount(flat, minlength=N + 1)[1:]
    items = {"item_id": ITEM_IDS, "count": counts, "train_count": counts, "title": ITEM_IDS}
    pq.write_table(pa.table(items), path / "items.parquet")
    pq.write_table(pa.table({"user_id": USER_IDS, "age": [1, 2, 3]}), path / "users.parquet")
    write_manifest(
        path,
        "dataset",
        name="tiny",
        num_users=len(USER_IDS),
        num_items=N,
        num_events=len(flat),
        has_time=True,
        event_types=["view"],
        has_values=False,
        split={"rule": "leave_one_out"},
        item_features={"title": "text"},
        user_features={},
    )
    return Dataset(path)


def write(directory: Path, dataset: Dataset, **changes) -> dict:
    given = {
        "encoder": mean_encoder(),
        "vectors_ND": VECTORS_ND,
        "dataset": dataset,
        "facts": FACTS,
    }
    return write_bundle(directory, **(given | changes))


@pytest.fixture
def bundle(tmp_path: Path, dataset: Dataset) -> Path:
    write(tmp_path / "bundles" / "tiny-1", dataset)
    return tmp_path / "bundles" / "tiny-1"


def test_a_missing_shard_is_named(tmp_path: Path, dataset: Dataset) -> None:
    path = tmp_path / "sharded"
    manifest = write(path, dataset, index={"kind": "flat", "shards": 2})
    assert manifest["index"]["shards"] == 2
    assert len(Bundle.open(path).index_paths) == 2
    (path / "index-2-of-2.faiss").unlink()
    with pytest.raises(InputError, match=r"not a whole bundle: index-2-of-2\.faiss missing"):
        Bundle.open(path)


def test_manifest_describes_the_bundle(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert set(manifest["files"]) == set(FILES)
    wanted = {
        **FACTS,
        "version": "tiny-1",
        "dim": D,
        "interests": 1,
        "num_items": N,
        "num_users": 3,
        "has_time": True,
        "event_types": ["view"],
    }
    assert {name: manifest[name] for name in wanted} == wanted
    assert manifest["index"]["kind"] == "flat"


def test_reads_back_what_was_written(bundle: Path, dataset: Dataset) -> None:
    opened = Bundle.open(bundle)
    np.testing.assert_array_equal(opened.vectors_ND, VECTORS_ND)
    assert opened.item_ids.tolist() == ["", *ITEM_IDS]
    assert opened.item_index == {item_id: row for row, item_id in enumerate(ITEM_IDS, 1)}
    assert [opened.users.get(user) for user in USER_IDS] == [0, 1, 2]
    assert opened.users.get("nobody") is None
    assert opened.items.column_names == ["item_id", "count", "title"]
    assert opened.popular.tolist()[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        opened.vectors_ND[0, 0] = 1


def test_histories_of_users_and_of_nobody(bundle: Path) -> None:
    histories = Bundle.open(bundle).histories(np.array([1, -1, 0]))
    assert histories.lengths.tolist() == [2, 0, 4]
    assert histories.items.tolist() == PATHS[1] + PATHS[0]
    assert histories.times[0] == 1_600_000_000_000 + 4 * 60_000


def test_self_tests_are_what_the_stored_graph_and_index_answer(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    session = onnxruntime.InferenceSession(opened.encoder_path)
    index = ItemIndex.load(opened.index_paths, opened.vectors_ND, opened.manifest["index"])
    tests = opened.manifest["self_test"]
    assert [test["user_id"] for test in tests] == USER_IDS
    assert tests[0]["history"] == ["with space", 'quote"s', "plain"]  # the newest max_length
    for row, test in enumerate(tests):
        arrays = encode(opened.histories(np.array([row])), 3, np.array([test["now"]]))
        feed = {name: arrays[name] for name in opened.encoder_inputs}
        found = index.search(session.run(["queries"], feed)[0], 10).indices_BK[0]
        assert [opened.item_ids[i] for i in found] == test["top"]
    by_hand = np.argsort(-(VECTORS_ND @ VECTORS_ND[6])) + 1
    assert tests[2]["top"] == [ITEM_IDS[i - 1] for i in by_hand]


def test_opens_without_torch(bundle: Path) -> None:
    code = (
        "import sys, numpy as np; from recsys.index.bundle import Bundle; "
        f"b = Bundle.open({str(bundle)!r}); b.vectors_ND.sum(); b.users; b.item_index; "
        "from recsys.index.search import ItemIndex; "
        "ItemIndex.load(b.index_paths, b.vectors_ND, b.manifest['index']); "
        "heavy = {'torch', 'pytorch_lightning', 'hydra', 'pandas', 'mlflow', 'duckdb'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: content differs from its manifest"):
        Bundle.open(bundle)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_missing_file(bundle: Path, name: str, verify: bool) -> None:
    (bundle / name).unlink()
    with pytest.raises(InputError, match=f"not a whole bundle: {name} missing"):
        Bundle.open(bundle, verify=verify)


def test_half_copied(bundle: Path) -> None:
    vectors = bundle / "item_vectors.safetensors"
    vectors.write_bytes(vectors.read_bytes()[:-20])
    with pytest.raises(InputError, match="content differs from its manifest"):
        Bundle.open(bundle)


def test_no_manifest_another_kind_another_version(bundle: Path, dataset: Dataset) -> None:
    with pytest.raises(InputError, match="expected a bundle, found a dataset"):
        Bundle.open(dataset.path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    newer = SCHEMA_VERSIONS["bundle"] + 1
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"schema_version": newer}))
    with pytest.raises(InputError, match=f"schema version {newer}; .*recsys export"):
        Bundle.open(bundle)
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        Bundle.open(bundle)
    (bundle / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json in it; make it again with `recs"):
        Bundle.open(bundle)
    with pytest.raises(InputError, match="not a bundle"):
        Bundle.open(bundle / "nowhere")


def test_manifest_that_lists_too_little(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["encoder.onnx"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"does not list encoder\.onnx"):
        Bundle.open(bundle)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*")) if folder.exists() else []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_vectors_leave_nothing(tmp_path: Path, dataset: Dataset, value: float) -> None:
    vectors_ND = VECTORS_ND.copy()
    vectors_ND[2, 1] = value
    with pytest.raises(InputError, match="1 of 7 rows hold NaN or infinite"):
        write(tmp_path / "bundles" / "b", dataset, vectors_ND=vectors_ND)
    assert left_in(tmp_path / "bundles") == []


def test_bad_queries_leave_nothing(tmp_path: Path, dataset: Dataset) -> None:
    broken = mean_encoder(np.full((N, D), np.nan, np.float32))
    with pytest.raises(InputError, match="query vectors: 3 of 3 rows"):
        write(tmp_path / "bundles" / "b", dataset, encoder=broken)
    assert left_in(tmp_path / "bundles") == []


def test_vectors_of_another_model(tmp_path: Path, dataset: Dataset) -> None:
    with pytest.raises(InputError, match="vectors of 6 items, the dataset tiny has 7"):
        write(tmp_path / "b", dataset, vectors_ND=VECTORS_ND[:6])
    wide = np.ones((N, D + 1), np.float32)
    with pytest.raises(InputError, match="answers with 4 dimensions, item vectors have 5"):
        write(tmp_path / "b", dataset, vectors_ND=wide)


def test_no_space_left_keeps_the_old_bundle(
    bundle: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle / "manifest.json").read_bytes()

    def full(self: Path, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="no space left on the disk; nothing was written"):
        write(bundle, dataset)
    monkeypatch.undo()
    assert left_in(bundle.parent) == ["tiny-1"]
    assert (bundle / "manifest.json").read_bytes() == before
    Bundle.open(bundle)


@pytest.mark.parametrize("kind", ["ivf_flat", "hnsw", "ivf_sq8"])
def test_index_kind_is_kept(tmp_path: Path, dataset: Dataset, kind: str) -> None:
    manifest = write(tmp_path / "b", dataset, index={"kind": kind})
    opened = Bundle.open(tmp_path / "b")
    assert manifest["index"]["kind"] == kind
    index = ItemIndex.load(opened.index_paths, opened.vectors_ND, manifest["index"])
    assert index.search(VECTORS_ND[:1, None], 10).indices_BK.shape == (1, 7)


def test_user_rows_with_shared_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.hash", lambda _: 7)
    rows = UserRows(pa.chunked_array([["a", "b"], ["c"]]))
    assert [rows.get(user) for user in "abcd"] == [0, 1, 2, None]
    assert rows.id(2) == "c"


def once(function):
    """Do it the first time and copy its file after that: it takes seconds."""
    made: list[bytes] = []

    def wrapped(model, path: Path) -> None:
        if made:
            path.write_bytes(made[0])
        else:
            function(model, path)
            made.append(path.read_bytes())

    return wrapped


def test_export_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the shipped model becomes a bundle; again, the same one; latest points at it."""
    from recsys.data.catalogue import Catalogue
    from recsys.export import onnx as onnx_export
    from recsys.models.trajectory import Trajectory

    workspace = Workspace(tmp_path)
    dataset = tiny_dataset(workspace.folder("dataset") / "tiny")
    model = Trajectory(Catalogue.of(dataset), max_length=6, dim=8).eval()
    manifest = {"name": "tiny-run", "model": "trajectory", "metrics": {"test": {"ndcg@10": 1.0}}}
    loaded = SimpleNamespace(manifest=manifest, dataset=dataset, model=model)
    monkeypatch.setattr("recsys.training.runs.load_run", lambda path: loaded)
    monkeypatch.setattr("recsys.training.runs.is_ranker", lambda path: False)
    monkeypatch.setattr("recsys.export.onnx.export_encoder", once(onnx_export.export_encoder))
    path = export(tmp_path / "runs" / "tiny-run", workspace)
    opened = Bundle.open(path)
    assert path.name.startswith("tiny-run-")
    assert workspace.find("bundle") == path.resolve()
    assert opened.encoder_inputs == model.inputs
    assert opened.manifest["dim"] == 8
    np.testing.assert_array_equal(opened.vectors_ND, model.item_vectors()[1:].detach())
    assert export(tmp_path / "runs" / "tiny-run", workspace) == path
    other = export(tmp_path / "runs" / "tiny-run", workspace, {"kind": "hnsw"})
    assert other != path
    assert left_in(workspace.folder("bundle")) == sorted(["latest", path.name, other.name])
