"""Write a bundle: all that a server needs of a run, as one directory that explains itself.

Shapes: N items, D dim, Q queries, H interests.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.artifacts import Workspace, fingerprint, sha256, write_manifest, writing
from recsys.data.dataset import Dataset
from recsys.export.runtime import Encoder, request_times
from recsys.history import Histories
from recsys.index.build import BuiltIndex, IndexSettings, build, check_vectors
from recsys.index.bundle import (
    ENCODER,
    EVENT_ARRAYS,
    EVENTS,
    ITEMS,
    USERS,
    VALUES,
    VECTORS,
    map_vectors,
)
from recsys.index.search import ItemIndex
from recsys.schema import EVENT_TYPES, InputError

if TYPE_CHECKING:
    from recsys.export.ranker import BundledRanker
    from recsys.training.ranker_runs import LoadedRanker

TUNING_USERS = 1000
SELF_TESTS = 5
SELF_TEST_K = 10
NAME_DIGITS = 8
ALIGNED = 64
"""Bytes that the vectors begin at a multiple of, but for the 8 of the length before it."""

Settings = IndexSettings | Mapping[str, Any] | None
Sample = tuple[Histories, NDArray[np.int64]]


def export(
    run: Path, workspace: Workspace, index: Settings = None, name: str | None = None
) -> Path:
    """Turn a run directory into a bundle in the workspace, marked latest; return its path.

    The bundle is named after the run and its own content, so exporting twice makes it once.
    Raises InputError where the run is damaged or its vectors are not finite.
    """
    from recsys.training.ranker_runs import load_ranker
    from recsys.training.runs import is_ranker

    settings = IndexSettings.of(index)
    ranker = load_ranker(run) if is_ranker(run) else None
    path = _export(ranker.retriever if ranker else run, workspace, settings, name, ranker)
    workspace.mark_latest("bundle", path)
    return path


def _export(
    run: Path,
    workspace: Workspace,
    settings: IndexSettings,
    name: str | None,
    ranker: LoadedRanker | None,
) -> Path:
    from recsys.export.onnx import export_encoder
    from recsys.training.runs import load_run

    loaded = load_run(run)
    vectors_ND = item_vectors(loaded.model)
    with tempfile.TemporaryDirectory() as scratch:
        encoder = Path(scratch) / ENCODER
        export_encoder(loaded.model, encoder)
        facts = _run_facts(run, loaded.manifest, loaded.model)
        if ranker is not None:
            facts |= {key: ranker.manifest[key] for key in ("name", "mlflow_run_id")}
        parts = asdict(settings), ranker and ranker.manifest["fingerprint"]
        name = name or _content_name(facts["name"], encoder, vectors_ND, parts)
        path = workspace.folder("bundle") / name
        write_bundle(
            path,
            encoder=encoder,
            vectors_ND=vectors_ND,
            dataset=loaded.dataset,
            facts=facts,
            index=settings,
            ranker=ranker,
        )
    return path


def write_bundle(
    directory: Path,
    *,
    encoder: bytes | Path,
    vectors_ND: NDArray[np.float32],
    dataset: Dataset,
    facts: Mapping[str, Any],
    index: Settings = None,
    ranker: LoadedRanker | None = None,
) -> dict[str, Any]:
    """Write the bundle `directory`, whole or not at all, and return its manifest.

    Needs no torch but for a ranker.

    encoder: an ONNX graph with output `queries` [batch, H, D]. vectors_ND: row i - 1 is item i.
    facts: `encoder_inputs` and `max_length`, and what else the manifest is to say (name, model,
    run, mlflow_run_id, metrics). The index is tuned on up to 1,000 users' query vectors.
    """
    started = time.perf_counter()
    vectors_ND = check_vectors(vectors_ND, "item vectors")
    _check_fit(vectors_ND, dataset)
    with writing(directory) as scratch:
        _write_encoder(encoder, scratch / ENCODER)
        _write_vectors(vectors_ND, scratch / VECTORS)
        vectors_ND = map_vectors(scratch / VECTORS)
        _write_tables(dataset, scratch)
        opened = Encoder.open(
            scratch / ENCODER, tuple(facts["encoder_inputs"]), int(facts["max_length"])
        )
        sample = sample_histories(dataset, opened.max_length)
        queries_QHD = opened.queries(*sample)
        _check_width(queries_QHD, vectors_ND)
        built = build(vectors_ND, index, queries_QHD.reshape(-1, vectors_ND.shape[1]))
        index_facts = built.write(scratch)
        second = _second_stage(scratch, ranker, vectors_ND)
        return write_manifest(
            scratch,
            "bundle",
            **facts,
            version=directory.name,
            dim=vectors_ND.shape[1],
            interests=queries_QHD.shape[1],
            **_dataset_facts(dataset),
            index=index_facts,
            **({} if second is None else {"ranker": second.facts}),
            self_test=_self_tests(dataset, sample, queries_QHD, built, vectors_ND, second),
            seconds=round(time.perf_counter() - started, 3),
        )


def _second_stage(
    directory: Path, ranker: LoadedRanker | None, vectors_ND: NDArray[np.float32]
) -> BundledRanker | None:
    if ranker is None:
        return None
    from recsys.export.ranker import BundledRanker

    return BundledRanker.write(directory, ranker, vectors_ND)


def item_vectors(model: Any) -> NDArray[np.float32]:
    """Return a model's item vectors without padding: float32 [N, D]."""
    import torch

    with torch.no_grad():
        return np.asarray(model.item_vectors()[1:].detach().float().cpu().numpy())


def sample_histories(dataset: Dataset, max_length: int, count: int = TUNING_USERS) -> Sample:
    """Return the newest `max_length` events of up to `count` users drawn evenly, and their rows."""
    lengths = np.diff(dataset.offsets)
    users = np.flatnonzero(lengths)
    if not len(users):
        raise InputError(f"{dataset.path}: no user has events, so there is nothing to tune on")
    users = np.sort(np.random.default_rng(0).permutation(users)[:count])
    return dataset.histories(users, lengths[users]).last(max_length), users


def _run_facts(run: Path, manifest: Mapping[str, Any], model: Any) -> dict[str, Any]:
    return {
        "name": manifest.get("name", run.name),
        "model": manifest.get("model"),
        "run": run.name,
        "mlflow_run_id": manifest.get("mlflow_run_id"),
        "metrics": manifest.get("metrics", {}),
        "encoder_inputs": list(model.inputs),
        "max_length": model.max_length,
    }


def _dataset_facts(dataset: Dataset) -> dict[str, Any]:
    return {
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "num_items": dataset.num_items,
        "num_users": dataset.num_users,
        "retired": len(dataset.retired),
        "has_time": dataset.has_time,
        "event_types": dataset.manifest["event_types"],
    }


def _content_name(name: str, encoder: Path, vectors_ND: NDArray[np.float32], more: Any) -> str:
    vectors = hashlib.sha256(np.ascontiguousarray(vectors_ND).data).hexdigest()
    content = fingerprint([sha256(encoder), vectors, more])
    return f"{name}-{content[:NAME_DIGITS]}"


def _check_fit(vectors_ND: NDArray[np.float32], dataset: Dataset) -> None:
    if len(vectors_ND) != dataset.num_items:
        raise InputError(
            f"the model has vectors of {len(vectors_ND)} items, the dataset {dataset.name} has "
            f"{dataset.num_items} items; export with the dataset that the run was trained on"
        )


def _check_width(queries_QHD: NDArray[np.float32], vectors_ND: NDArray[np.float32]) -> None:
    if queries_QHD.shape[-1] != vectors_ND.shape[1]:
        raise InputError(
            f"the encoder answers with {queries_QHD.shape[-1]} dimensions, item vectors have "
            f"{vectors_ND.shape[1]}; both must come from one model"
        )


def _write_encoder(encoder: bytes | Path, file: Path) -> None:
    if isinstance(encoder, bytes):
        file.write_bytes(encoder)
    else:
        shutil.copyfile(encoder, file)


def _write_vectors(vectors_ND: NDArray[np.float32], file: Path) -> None:
    """Write a safetensors file of one tensor, without a second copy of it in memory."""
    entry = {"dtype": "F32", "shape": vectors_ND.shape, "data_offsets": [0, vectors_ND.nbytes]}
    header = json.dumps({"vectors": entry}).encode()
    header += b" " * (-len(header) % ALIGNED)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.write(vectors_ND.data)


def _write_tables(dataset: Dataset, directory: Path) -> None:
    pq.write_table(dataset.items.drop_columns(["train_count"]), directory / ITEMS)
    pq.write_table(dataset.users.select(["user_id"]), directory / USERS)
    (directory / EVENTS).mkdir()
    for name in (*EVENT_ARRAYS, *([VALUES] if dataset.has_values else [])):
        shutil.copyfile(dataset.path / EVENTS / f"{name}.npy", directory / EVENTS / f"{name}.npy")


def _self_tests(
    dataset: Dataset,
    sample: Sample,
    queries_QHD: NDArray[np.float32],
    built: BuiltIndex,
    vectors_ND: NDArray[np.float32],
    second: BundledRanker | None,
) -> list[dict[str, Any]]:
    """Return a few histories with the items that a server must answer, seen ones kept."""
    index = ItemIndex(built.index, vectors_ND, built.facts)
    histories, users = sample
    width = SELF_TEST_K if second is None else max(SELF_TEST_K, second.ranker.candidates)
    rows = range(0, len(users), max(1, len(users) // SELF_TESTS))[:SELF_TESTS]
    tests = []
    for row in rows:
        out = [dataset.retired]
        found = index.search(queries_QHD[[row]], min(width, dataset.num_items), excluded=out)
        best = found.indices_BK[0][found.indices_BK[0] > 0]
        if second is not None:
            asks = int(users[row]), _one(histories, row), best, queries_QHD[row], vectors_ND
            best = second.ordered(*asks)
        items = _item_ids(dataset, best[:SELF_TEST_K])
        tests.append(_described(dataset, histories, row, int(users[row])) | {"top": items})
    return tests


def _one(histories: Histories, row: int) -> Histories:
    first, end = histories.offsets[row : row + 2]
    return histories.taking(slice(first, end), np.array([0, end - first]))


def _described(dataset: Dataset, histories: Histories, row: int, user: int) -> dict[str, Any]:
    events = slice(*histories.offsets[row : row + 2])
    return {
        "user_id": dataset.users["user_id"][user].as_py(),
        "history": _item_ids(dataset, histories.items[events]),
        "event_types": [EVENT_TYPES[code - 1] for code in histories.types[events]],
        "timestamps": histories.times[events].tolist() if dataset.has_time else None,
        "values": _known(histories.values[events]) if histories.values is not None else None,
        "now": int(request_times(histories)[row]) if dataset.has_time else None,
    }


def _known(values: NDArray[np.floating]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _item_ids(dataset: Dataset, indices: NDArray[np.integer]) -> list[str]:
    return [str(i) for i in dataset.items["item_id"].take(indices[indices > 0] - 1).to_pylist()]
