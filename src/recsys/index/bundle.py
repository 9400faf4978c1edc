"""Open a bundle without torch: manifest, item table, vocabularies, vectors and trajectories.

Shapes: N items, U users, E events, D dim. Items are indices 1 to N; users are rows 0 to U - 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.artifacts import MANIFEST, read_manifest
from recsys.artifacts import verify as verify_files
from recsys.history import Histories
from recsys.index.shards import names
from recsys.schema import InputError

ENCODER = "encoder.onnx"
RANKER = "ranker.onnx"
FEATURES = "ranker/features.json"
VECTORS = "item_vectors.safetensors"
ITEMS = "items.parquet"
USERS = "users.parquet"
EVENTS = "events"
EVENT_ARRAYS = ("items", "types", "times", "offsets")
VALUES = "values"
ALWAYS = (ENCODER, VECTORS, ITEMS, USERS, *(f"{EVENTS}/{name}.npy" for name in EVENT_ARRAYS))
FILES = (*ALWAYS, *names(1))
"""What a bundle holds beside its manifest, where its index is whole; with a ranker `RANKER` too."""
TABLES = ("item_codes", "item_numbers", "item_raw", "user_codes", "user_numbers")
"""With `FEATURES`, a bundle holds each as `ranker/NAME.npy`: everything of items and users encoded
as the ranker reads it; row 0 belongs to what is unknown. Beside them what its graph reads of
`item_embeddings`, with `added_embeddings`, and `item_vectors`.
"""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle directory; what is large is memory-mapped, or read when first asked for."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> Bundle:
        """Open the bundle at `path`; `verify` also hashes every file against the manifest.

        Raises InputError where a file is missing or changed, or the schema version is another.
        """
        path = Path(path).resolve()
        manifest = read_manifest(path, "bundle")
        _require_files(path, manifest)
        if verify:
            verify_files(path, manifest)
        return cls(path, manifest)

    @property
    def version(self) -> str:
        """Return the bundle's name, which answers carry."""
        return str(self.manifest["version"])

    @property
    def num_items(self) -> int:
        """Return N."""
        return int(self.manifest["num_items"])

    @property
    def dim(self) -> int:
        """How wide the item vectors are."""
        return int(self.manifest["dim"])

    @property
    def num_users(self) -> int:
        """Return U."""
        return int(self.manifest["num_users"])

    @property
    def has_time(self) -> bool:
        """Whether event times are real moments, not only an order."""
        return bool(self.manifest["has_time"])

    @property
    def max_length(self) -> int:
        """Return how many of the newest events the encoder reads."""
        return int(self.manifest["max_length"])

    @property
    def encoder_inputs(self) -> tuple[str, ...]:
        """Names of the arrays that the encoder reads."""
        return tuple(self.manifest["encoder_inputs"])

    @property
    def encoder_path(self) -> Path:
        """Return the ONNX graph's path."""
        return self.path / ENCODER

    @property
    def ranker(self) -> dict[str, Any] | None:
        """The manifest's entry of the ranker, its `inputs` and `candidates`; None without one."""
        entry: dict[str, Any] | None = self.manifest.get("ranker")
        return entry

    @property
    def ranker_path(self) -> Path:
        """Return the ranker's path, where there is one."""
        return self.path / RANKER

    @cached_property
    def ranker_features(self) -> dict[str, Any] | None:
        """The columns that the ranker reads, as `Features.as_json` wrote them; None without any."""
        if FEATURES not in self.manifest["files"]:
            return None
        try:
            facts: dict[str, Any] = json.loads((self.path / FEATURES).read_bytes())
        except ValueError as error:
            raise InputError(
                f"{self.path / FEATURES}: not JSON; export the bundle again"
            ) from error
        return facts

    def ranker_table(self, name: str) -> NDArray[Any]:
        """Return one of `TABLES`, memory-mapped; raise InputError where it is not there."""
        file = self.path / "ranker" / f"{name}.npy"
        if not file.is_file():
            raise InputError(f"{file}: missing; export the bundle again")
        return _map_array(file)

    @property
    def index_paths(self) -> list[Path]:
        """Return the FAISS index's path, or those of its shards."""
        return [self.path / name for name in _index_files(self.manifest)]

    @cached_property
    def items(self) -> pa.Table:
        """The item table (item_id, count, features); row i - 1 belongs to item index i."""
        return _read_table(self.path / ITEMS)

    @cached_property
    def item_ids(self) -> NDArray[np.object_]:
        """Item id by index: str [N + 1], "" for padding."""
        ids = np.empty(self.num_items + 1, object)
        ids[0], ids[1:] = "", self.items["item_id"].to_pylist()
        return ids

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Item index, 1 to N, by id."""
        return {item_id: index for index, item_id in enumerate(self.item_ids[1:].tolist(), 1)}

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Events of each item: int64 [N + 1], 0 for padding."""
        return np.array([0, *self.items["count"].to_pylist()], np.int64)

    @cached_property
    def retired(self) -> NDArray[np.int64]:
        """Indices of items that are known but not answered with, in rising order."""
        if not self.manifest.get("retired"):
            return np.zeros(0, np.int64)
        return np.flatnonzero(self.counts[1:] == 0) + 1

    @cached_property
    def popular(self) -> NDArray[np.int64]:
        """All item indices, most events first: int64 [N]; what a newcomer is shown."""
        return np.argsort(-self.counts[1:], kind="stable") + 1

    @cached_property
    def users(self) -> UserRows:
        """User row by id."""
        return UserRows(_read_table(self.path / USERS)["user_id"])

    @cached_property
    def vectors_ND(self) -> NDArray[np.float32]:
        """Item vectors, memory-mapped and read-only; row i - 1 belongs to item index i."""
        return map_vectors(self.path / VECTORS)

    @cached_property
    def events(self) -> dict[str, NDArray[Any]]:
        """The users' trajectories, memory-mapped: items, types, times [E] and offsets [U + 1].

        And `values` [E] where the log has any.
        """
        files = {name: self.path / EVENTS / f"{name}.npy" for name in (*EVENT_ARRAYS, VALUES)}
        return {
            name: _map_array(file)
            for name, file in files.items()
            if name != VALUES or file.is_file()
        }

    def histories(self, rows: NDArray[np.integer]) -> Histories:
        """Return the whole trajectories of user `rows` [B]; a negative row has an empty one."""
        rows = np.asarray(rows, np.int64)
        offsets_U = self.events["offsets"]
        known = rows >= 0
        starts = np.where(known, offsets_U[rows], 0)
        lengths = np.where(known, offsets_U[rows + known] - starts, 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        items, types, times = (np.asarray(self.events[n][source]) for n in EVENT_ARRAYS[:3])
        values = np.asarray(self.events[VALUES][source]) if VALUES in self.events else None
        return Histories(items, types, times, offsets, values)


class UserRows:
    """User id → row in a few bytes a user: sorted hashes beside the id column.

    A dict of ten million ids would take more than a gigabyte of a server's memory.

    >>> rows = UserRows(pa.chunked_array([["ann", "bob"]]))
    >>> rows.get("bob"), rows.get("eve"), "ann" in rows, len(rows)
    (1, None, True, 2)
    """

    def __init__(self, ids: pa.ChunkedArray) -> None:
        self.ids = ids.combine_chunks() if ids.num_chunks != 1 else ids.chunk(0)
        hashes = np.fromiter((hash(i) for i in self.ids.to_pylist()), np.int64, len(self.ids))
        self.rows = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.rows]

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, user_id: str) -> bool:
        return self.get(user_id) is not None

    def get(self, user_id: str) -> int | None:
        """Return the row of `user_id`, or None where it is unknown."""
        wanted = hash(user_id)
        place = int(np.searchsorted(self.hashes, wanted))
        # Different ids may share a hash: look at each of the run.
        while place < len(self.hashes) and self.hashes[place] == wanted:
            if self.ids[int(self.rows[place])].as_py() == user_id:
                return int(self.rows[place])
            place += 1
        return None

    def id(self, row: int) -> str:
        """Return the id of user `row`."""
        return str(self.ids[row].as_py())


def map_vectors(file: Path, name: str = "vectors") -> NDArray[np.float32]:
    """Memory-map one float32 tensor of a safetensors file.

    Source: the format's layout, https://huggingface.co/docs/safetensors (8 bytes of header
    length, a JSON header, then the tensors; offsets count from the header's end).
    """
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        try:
            entry = json.loads(stream.read(header_bytes))[name]
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{file}: no tensor {name!r} in it; export the bundle again"
            ) from error
    if entry["dtype"] != "F32":
        raise InputError(f"{file}: {name} is {entry['dtype']}, expected F32; export it again")
    start = 8 + header_bytes + entry["data_offsets"][0]
    return np.memmap(file, np.float32, mode="r", offset=start, shape=tuple(entry["shape"]))


def _read_table(file: Path) -> pa.Table:
    # Not pyarrow.parquet.read_table, nor to_numpy on its columns: both import pandas where it is
    # installed, some 40 MB of a server's memory.
    with pq.ParquetFile(file) as parquet:
        return parquet.read()


def _map_array(file: Path) -> NDArray[Any]:
    empty = file.stat().st_size <= 128  # a header alone: nothing to map
    return np.load(file, mmap_mode=None if empty else "r", allow_pickle=False)


def _require_files(path: Path, manifest: dict[str, Any]) -> None:
    expected = _expected(manifest)
    missing = [name for name in expected if not (path / name).is_file()]
    unlisted = [name for name in expected if name not in manifest.get("files", {})]
    if missing:
        raise InputError(
            f"{path}: not a whole bundle: {', '.join(missing)} missing; copy it again from its "
            "source, or make it again with `recsys export`"
        )
    if unlisted:
        raise InputError(f"{path / MANIFEST}: does not list {', '.join(unlisted)}; export it again")


def _index_files(manifest: dict[str, Any]) -> tuple[str, ...]:
    return names(int(manifest.get("index", {}).get("shards", 1)))


def _expected(manifest: dict[str, Any]) -> tuple[str, ...]:
    always = (*ALWAYS, *_index_files(manifest))
    if not manifest.get("ranker"):
        return always
    if FEATURES not in manifest.get("files", {}):
        return (*always, RANKER)
    return (*always, RANKER, FEATURES, *(f"ranker/{name}.npy" for name in TABLES))
