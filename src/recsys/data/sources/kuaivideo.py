"""KuaiVideo_x1 of BARS: micro-videos shown and clicked, with a vector of each cover picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis
import numpy as np

from recsys.data.sources import Tables
from recsys.data.sources.files import existing, inside
from recsys.data.sources.sets import ShownLog, check_count, home, shown_logs, there, together
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis.expr.types as ir

FILES = {"train.csv": "train", "test.csv": "test"}
LABELS = {"click": "is_click", "like": "is_like", "follow": "is_follow"}
SEQUENCES = ("pos_items", "neg_items")
COLUMNS = ("timestamp", "user_id", "item_id", *LABELS.values(), *SEQUENCES)
VECTORS = ("item_visual_emb_dim64.h5", "item_visual_emb_dim64.npz")
EVENTS = {"click": "view", "like": "favourite"}
ROWS_A_BATCH = 100_000


@dataclass(frozen=True)
class KuaiVideo:
    """The folder with train.csv, test.csv and item_visual_emb_dim64.h5 (or .npz: key, value).

    sequences: how many of each row's clicked and passed videos (pos_items, neg_items) to keep;
    0: leave them out. vectors: whether to read those of the pictures; .h5 needs h5py.
    """

    sequences: int = 100
    vectors: bool = True

    def __post_init__(self) -> None:
        check_count("sequences", self.sequences)

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read what was shown; events are what training rows were clicked or liked, and no more.

        Times count from a moment that the publisher hides: their order and gaps are true.
        """
        folder = home(path, tuple(FILES), "kuaivideo_x1")
        files = [(inside(folder, (name,)), part) for name, part in FILES.items()]
        shown = together(shown_logs(con, files, COLUMNS), self._columns)
        items = _vectors(con, folder, scratch) if self.vectors else None
        return Tables(_events(shown), items, None, True, impressions=shown, labels=tuple(LABELS))

    def _columns(self, log: ShownLog) -> Mapping[str, ir.Value]:
        kept = SEQUENCES if self.sequences else ()
        flags = log.flags(LABELS.values())
        return {
            "user_id": log.ids("user_id"),
            "item_id": log.ids("item_id"),
            "timestamp": log.moments("timestamp"),
            **{ours: flags[theirs] for ours, theirs in LABELS.items()},
            **{name: log.lists(name, "^")[: self.sequences] for name in kept},
        }


def _events(shown: ir.Table) -> ir.Table:
    """Return training rows that were clicked as views, liked as favourites: no test row's."""
    training = shown.filter(shown.part == "train")
    tables = [
        training.filter(training[label] == 1).select(
            "user_id",
            "item_id",
            "timestamp",
            event_type=ibis.literal(kind),
            value=ibis.null("float32"),
            row=training.row,
        )
        for label, kind in EVENTS.items()
    ]
    return tables[0].union(*tables[1:])


def _vectors(con: ibis.BaseBackend, folder: Path, scratch: Path) -> ir.Table:
    """Return item_id and `picture`, its vector, by way of a Parquet file in `scratch`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = [file for name in VECTORS for file in there(folder, name)]
    if not found:
        raise InputError(
            f"{folder}: no {' or '.join(VECTORS)} in it; put it there, or type "
            "data.source.vectors=false"
        )
    file = scratch / "item_vectors.parquet"
    schema = pa.schema({"item_id": pa.string(), "picture": pa.list_(pa.float32())})
    with pq.ParquetWriter(file, schema) as writer:
        for keys, vectors_NV in _batches(existing(found[0])):
            flat = pa.array(vectors_NV.astype(np.float32).ravel())
            ends = np.arange(len(keys) + 1, dtype=np.int32) * vectors_NV.shape[1]
            lists = pa.ListArray.from_arrays(pa.array(ends), flat)
            ids = pa.array([str(key) for key in keys.tolist()])
            writer.write_table(pa.table([ids, lists], schema=schema))
    return con.read_parquet(str(file))


def _batches(file: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids [N] and vectors [N, V] from `key` and `value` of an .h5 or .npz file."""
    with _opened(file) as arrays:
        keys, values = (_array(file, arrays, name) for name in ("key", "value"))
        if len(values.shape) != 2 or len(keys) != len(values):
            raise InputError(
                f"{file}: key is {keys.shape} and value {values.shape}; expected [N] ids and "
                "[N, V] vectors. Fetch the file again"
            )
        for start in range(0, len(keys), ROWS_A_BATCH):
            stop = start + ROWS_A_BATCH
            yield np.asarray(keys[start:stop]), np.asarray(values[start:stop])


def _opened(file: Path) -> Any:
    try:
        if file.suffix == ".npz":
            return np.load(file, allow_pickle=False)
        import h5py

        return h5py.File(file)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{file}: reading it needs h5py; type pip install h5py, or data.source.vectors=false"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); fetch the file again") from error


def _array(file: Path, arrays: Any, name: str) -> Any:
    if name not in arrays:
        raise InputError(
            f"{file}: no array {name!r}; found {', '.join(arrays)}. Expected key, value"
        )
    return arrays[name]
