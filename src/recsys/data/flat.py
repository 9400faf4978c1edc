"""The files of a dataset, written in bounded memory: flat event columns, item and user tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recsys.data.coding import RANKED, Kept
from recsys.data.dataset import EVENT_ARRAYS
from recsys.data.engines import CHUNK, Engine, batches, count, keep
from recsys.data.features import typed, write_features
from recsys.data.splits import SplitRule, count_items
from recsys.schema import EVENT_TYPES, InputError

if TYPE_CHECKING:
    import ibis


def write_events(engine: Engine, kept: Kept, folder: Path, has_time: bool) -> NDArray[np.int64]:
    """Stream events by (user rank, time, source order) into `.npy` files; return the offsets.

    `items.npy` holds item codes for now. Where there is no time, `times` are places.
    """
    folder.mkdir()
    counts = engine.here(RANKED).order_by("rank").select("count").to_pyarrow()["count"].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    np.save(folder / "offsets.npy", offsets)
    ordered = (
        kept.events.join(kept.users.select("user", "rank"), "user")
        .select("rank", "row", times="timestamp", items="item", types="type", values="value")
        .order_by("rank", "times", "row")
        .select(*EVENT_ARRAYS)
    )
    total = int(offsets[-1])
    files = {name: npy(folder / f"{name}.npy", name, total) for name in EVENT_ARRAYS}
    try:
        written = 0
        for batch in engine.batches(ordered):
            columns = {name: batch.column(name) for name in EVENT_ARRAYS}
            arrays = {k: v.to_numpy(zero_copy_only=False) for k, v in columns.items()}
            if not has_time:
                arrays["times"] = _places(offsets, written, len(batch))
            for name, stream in files.items():
                stream.write(np.ascontiguousarray(arrays[name], EVENT_ARRAYS[name]).data)
            written += len(batch)
    finally:
        for stream in files.values():
            stream.close()
    assert written == total, f"{written} events written, {total} counted"
    return offsets


def npy(file: Path, name: str, total: int) -> Any:
    """Open a `.npy` file of `total` events, its header written, for its data to follow."""
    # Plain writes fail cleanly on a full disk; a memory map ends the process.
    stream = file.open("wb")
    descr = np.lib.format.dtype_to_descr(np.dtype(EVENT_ARRAYS[name]))
    header = {"descr": descr, "fortran_order": False, "shape": (total,)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream


def _places(offsets: NDArray[np.int64], start: int, size: int) -> NDArray[np.int64]:
    """Return the place in its user's trajectory of each of `size` events from `start` on."""
    events = np.arange(start, start + size)
    return events - offsets[np.searchsorted(offsets, events, side="right") - 1]


def index_items(
    folder: Path, offsets: NDArray[np.int64], rule: SplitRule
) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Turn item codes into indices, most trained first; return the split and the popularity.

    The popularity has one row an item in index order: `item` (its code), `count`, `train_count`.
    """
    codes = np.load(folder / "items.npy", mmap_mode="r+")
    times = np.load(folder / "times.npy", mmap_mode="r")
    where = rule.place(times, offsets)
    train_counts = rule.trains(codes, times, offsets)
    counts = count_items(codes, len(train_counts))
    # Codes are in the order of the ids, and lexsort is stable: ties end in that order.
    order = np.lexsort((-counts, -train_counts))
    order = order[counts[order] > 0]
    if len(order) < 2:
        raise InputError(
            "only one item is left, so there is nothing to choose between; give a log with more "
            "items, or lower data.min_item_events"
        )
    index = np.zeros(len(counts), np.int32)
    index[order] = np.arange(1, len(order) + 1)
    for start in range(0, len(codes), CHUNK):
        codes[start : start + CHUNK] = index[codes[start : start + CHUNK]]
    codes.flush()
    return where, {"item": order, "count": counts[order], "train_count": train_counts[order]}


def write_items(
    con: ibis.BaseBackend,
    ids: ibis.Table,
    popularity: dict[str, NDArray],
    features: ibis.Table | None,
    kinds: dict[str, str],
    folder: Path,
) -> None:
    """Write `items.parquet`, row i - 1 being item index i."""
    import ibis
    import pyarrow as pa

    ranked = ibis.memtable(
        pa.table(
            {
                "item": popularity["item"].astype(np.int32),
                "count": popularity["count"],
                "train_count": popularity["train_count"],
                "rank": np.arange(len(popularity["item"])),
            }
        )
    )
    ranked = keep(con, "ranked_items", ranked)
    table = _described(ranked.join(ids, "item"), "item_id", features, kinds)
    chosen = table.order_by("rank").select("item_id", "count", "train_count", *kinds)
    write_features(batches(con, chosen), folder / "items.parquet", "item_id", kinds)


def write_users(
    con: ibis.BaseBackend,
    ids: ibis.Table,
    ranked: ibis.Table,
    features: ibis.Table | None,
    kinds: dict[str, str],
    folder: Path,
) -> None:
    """Write `users.parquet`, row u being user row u."""
    table = _described(ranked.join(ids, "user"), "user_id", features, kinds)
    chosen = table.order_by("rank").select("user_id", "count", *kinds)
    write_features(batches(con, chosen), folder / "users.parquet", "user_id", kinds)


def _described(
    table: ibis.Table, key: str, features: ibis.Table | None, kinds: dict[str, str]
) -> ibis.Table:
    if features is None:
        return table
    _check_meeting(table, key, features)
    return table.left_join(typed(features.select(key, *kinds), kinds), key)


def _check_meeting(table: ibis.Table, key: str, features: ibis.Table) -> None:
    """Raise InputError where a feature table says nothing of anything in the log."""
    if count(table.semi_join(features, key)) or not count(table):
        return
    log, told = (
        one.select(key).limit(1).to_pyarrow()[key].to_pylist() for one in (table, features)
    )
    raise InputError(
        f"the {key[:4]} table has none of the log's {key}s: the log has {log[0]!r}, the table "
        f"{repr(told[0]) if told else 'no row'}; both name {key[:4]}s alike, or name the column of "
        f"the same ids, data.source.{key}=COLUMN"
    )


def occurring(folder: Path) -> list[str]:
    """Return the names of the event types that occur, weakest first."""
    types = np.load(folder / "types.npy", mmap_mode="r")
    counts = count_items(types, len(EVENT_TYPES) + 1)
    assert counts[0] == 0, "a source gave an event type that it did not check"
    return [name for name, number in zip(EVENT_TYPES, counts[1:], strict=True) if number]


def any_value(folder: Path) -> bool:
    """Return whether any event has a value."""
    values = np.load(folder / "values.npy", mmap_mode="r")
    chunks = (values[at : at + CHUNK] for at in range(0, len(values), CHUNK))
    return any(np.isfinite(chunk).any() for chunk in chunks)
