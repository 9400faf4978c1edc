"""Event log → dataset: filters, vocabularies, order and split, in bounded memory.

Everything that grows with the log is an Ibis expression on DuckDB, which spills to disk past
`memory_limit`; the result streams into flat files. In the tables here `user` and `item` are codes
(places in the order of the ids), so that each id is compared as text once.
"""

from __future__ import annotations

import errno
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.artifacts import (
    SCHEMA_VERSIONS,
    Workspace,
    fingerprint,
    read_manifest,
    write_manifest,
    writing,
)
from recsys.data.admission import PENDING, waiting
from recsys.data.dataset import EVENT_ARRAYS, Dataset
from recsys.data.features import check_key, feature_kinds, typed, write_features
from recsys.data.sources import Source
from recsys.data.splits import SplitRule, count_items, split_rule
from recsys.schema import EVENT_TYPES, InputError, suggestion

if TYPE_CHECKING:
    import ibis
    import pyarrow as pa
    from rich.table import Table as RichTable

    from recsys.data.impressions import Shown
    from recsys.data.sources import Tables

CHUNK = 1_000_000
"""Events held in Python at a time."""
SAME_EVENT = ["user", "item", "timestamp", "type"]
STAYS_THE_SAME = ("memory_limit", "threads", "spill")
"""Settings that change how a dataset is made but not what is in it."""


@dataclass(frozen=True)
class PrepareSettings:
    """The `data:` group of the config, without its source.

    min_user_events, min_item_events: rarer items go first, then users left with too few.
    k_core: do both again and again until every user and item has at least this many.
    deduplicate: keep one of events equal in user, item, type and time.
    item_features, user_features, request_features: column → kind, where the guess from its type
    is wrong; those of requests are the context columns of impressions.
    memory_limit: DuckDB's, e.g. 2GB; past it data spill to `spill` (default: beside the dataset).
    """

    name: str
    path: str | None = None
    min_user_events: int = 1
    min_item_events: int = 1
    k_core: int | None = None
    deduplicate: bool = True
    item_features: Mapping[str, str] = field(default_factory=dict)
    user_features: Mapping[str, str] = field(default_factory=dict)
    request_features: Mapping[str, str] = field(default_factory=dict)
    memory_limit: str = "2GB"
    threads: int = 2
    spill: str | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise InputError(f"data.name={self.name!r}: expected a plain name for a folder")
        for name in ("min_user_events", "min_item_events", "k_core", "threads"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"data.{name}={value}: expected a whole number, at least 1")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> PrepareSettings:
        """Return the settings of a config group; its `source` node belongs to the source."""
        known = [one.name for one in fields(cls)]
        # `get` gives None for a value still missing (`???`), and the source then says so.
        given: dict[str, Any] = {
            str(name): settings.get(name) for name in settings if name != "source"
        }
        for name in given:
            if name not in known:
                raise InputError(
                    f"data.{name}: no such setting; known are {', '.join(known)}"
                    + suggestion(str(name), known)
                )
        return cls(**given)


class Coded(NamedTuple):
    """Events in codes (user, item, timestamp, type, value, row), and the ids behind the codes."""

    events: ibis.Table
    users: ibis.Table
    items: ibis.Table


class Kept(NamedTuple):
    """What the filters leave: events, users with count and rank (0 is the busiest), rare events."""

    events: ibis.Table
    users: ibis.Table
    dropped: dict[str, int]
    rare: ibis.Table


def prepare(
    settings: PrepareSettings | Mapping[str, Any],
    source: Source,
    split: Mapping[str, Any],
    workspace: Workspace,
    stage: Callable[[str], None] = lambda name: None,
) -> Dataset:
    """Make the dataset, or find it where the same settings and files made it before.

    stage: called with what begins now, for a status line. Raises InputError; then nothing is left.
    """
    chosen = settings if isinstance(settings, PrepareSettings) else PrepareSettings.of(settings)
    rule = split_rule(split)
    facts = resolved(chosen, source, rule)
    lasting = {name: value for name, value in facts.items() if name not in STAYS_THE_SAME}
    path = workspace.folder("dataset") / f"{chosen.name}-{fingerprint(lasting)[:8]}"
    if not is_ready(path):
        with making(path, chosen, facts) as (con, folder, scratch):
            _make(con, folder, scratch, chosen, source, rule, facts, stage)
    workspace.mark_latest("dataset", path)
    return Dataset(path)


@contextmanager
def making(
    path: Path, settings: PrepareSettings, facts: dict[str, Any]
) -> Iterator[tuple[ibis.BaseBackend, Path, Path]]:
    """Yield a connection, the folder that becomes the dataset `path`, and one for scratch files."""
    with (
        _scratch(path.parent, settings) as scratch,
        connected(settings, scratch) as con,
        writing(path) as folder,
        _room(path.parent, settings, facts),
    ):
        yield con, folder, scratch


def resolved(settings: PrepareSettings, source: Source, rule: SplitRule) -> dict[str, Any]:
    """Return everything that decides what is in the dataset, as plain JSON values."""
    said = plain(source)
    names = [settings.path, *(said.values() if isinstance(said, dict) else ())]
    return plain(settings) | {
        "source": {"_target_": f"{type(source).__module__}.{type(source).__name__}", **said},
        "split": plain(rule),
        "schema_version": SCHEMA_VERSIONS["dataset"],
        "files": [stat for name in names if isinstance(name, str) for stat in _stats(name)],
    }


def plain(value: Any) -> Any:
    """Return dataclasses, mappings and sequences as plain dicts and lists, paths as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple) or type(value).__name__ == "ListConfig":
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _stats(name: str) -> list[list[Any]]:
    """Return name, size and time of change of a file, or of every file in a folder."""
    path = Path(name).expanduser()
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    except OSError:
        return []
    stats = ((file, file.stat()) for file in files if file.is_file())
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def is_ready(path: Path) -> bool:
    """Return whether there is a whole dataset."""
    with suppress(InputError):
        return bool(read_manifest(path, "dataset") and Dataset(path))
    return False


@contextmanager
def connected(settings: PrepareSettings, scratch: Path) -> Iterator[ibis.BaseBackend]:
    """Open DuckDB with the memory limit; what does not fit spills under `scratch`."""
    import duckdb
    import ibis

    try:
        con = ibis.duckdb.connect(
            memory_limit=settings.memory_limit,
            threads=settings.threads,
            temp_directory=str(scratch / "spill"),
        )
    except duckdb.Error as error:
        raise InputError(
            f"data.memory_limit={settings.memory_limit}: expected a size such as 2GB"
        ) from error
    con.raw_sql("SET TimeZone = 'UTC'")
    con.raw_sql("SET enable_progress_bar = false")
    try:
        yield con
    finally:
        con.disconnect()


def _make(
    con: ibis.BaseBackend,
    folder: Path,
    scratch: Path,
    settings: PrepareSettings,
    source: Source,
    rule: SplitRule,
    facts: dict[str, Any],
    stage: Callable[[str], None],
) -> None:
    """Write a whole dataset into `folder`."""
    began = time.monotonic()
    stage("reading")
    tables = source.read(con, Path(settings.path) if settings.path else None, scratch)
    _check_time(rule, tables.has_time)
    item_kinds = table_kinds(tables.items, "item_id", settings.item_features)
    user_kinds = table_kinds(tables.users, "user_id", settings.user_features)
    shown = _shown(con, tables, settings.request_features)
    coded = encoded(con, tables.events, shown)
    stage("filtering")
    kept = filtered(con, coded, settings, shown)
    stage("sorting")
    offsets = write_events(con, kept, folder / "events", tables.has_time)
    stage("indexing")
    if offsets[-1]:
        where, popularity = index_items(folder / "events", offsets, rule)
    else:
        where, popularity = _without_events(con, rule, shown)
    popularity = _with_shown_items(popularity, coded, settings, shown)
    write_items(con, coded.items, popularity, tables.items, item_kinds, folder)
    write_users(con, coded.users, kept.users, tables.users, user_kinds, folder)
    if kept.dropped["rare"] and settings.k_core is None:
        rare = waiting(kept.rare, coded.users, coded.items)
        write_features(batches(con, rare), folder / PENDING, "user_id", {})
    if shown is not None:
        stage("writing impressions")
    impressions = _write_shown(con, shown, coded, kept, folder)
    event_types = occurring(folder / "events") if offsets[-1] else []
    write_manifest(
        folder,
        "dataset",
        name=settings.name,
        num_users=len(offsets) - 1,
        num_items=len(popularity["item"]),
        num_events=int(offsets[-1]),
        has_time=tables.has_time,
        event_types=event_types,
        split=where,
        item_features=item_kinds,
        user_features=user_kinds,
        impressions=impressions,
        log_columns=dict(tables.columns),
        prepare=facts,
        source_rows=count(coded.events) + sum(tables.dropped.values()),
        dropped={**tables.dropped, **kept.dropped, **tables.dropped_requests},
        seconds=round(time.monotonic() - began, 3),
    )


def _check_time(rule: SplitRule, has_time: bool) -> None:
    if rule.rule == "temporal" and not has_time:
        raise InputError(
            "split=temporal needs times, and this source has only an order of events; "
            "type split=leave_one_out, or give a log with a timestamp column"
        )


def table_kinds(table: ibis.Table | None, key: str, declared: Mapping[str, str]) -> dict[str, str]:
    """Return column → kind of a feature table, {} where there is none; check its key."""
    if table is None:
        if declared:
            raise InputError(
                f"data.{key[:4]}_features says {', '.join(declared)}, but there is no {key[:4]} "
                f"table; leave the setting out or give a table with {key}"
            )
        return {}
    check_key(table, key)
    return feature_kinds(table, key, declared)


def _shown(con: ibis.BaseBackend, tables: Tables, declared: Mapping[str, str]) -> Shown | None:
    """Return the checked impressions of a source, or None where it has none."""
    if tables.impressions is None:
        if declared or tables.labels:
            raise InputError(
                "data.request_features and data.source.labels are about impressions, and this "
                "source has none; leave them out, or name the file: data.source.impressions=FILE"
            )
        return None
    from recsys.data.impressions import checked

    return checked(tables.impressions, tables.labels, declared, partial(keep, con))


def _without_events(
    con: ibis.BaseBackend, rule: SplitRule, shown: Shown | None
) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Return the split of a log of impressions alone, and a popularity without items."""
    assert shown is not None, "filters refuse a log without events or impressions"
    nothing = np.zeros(0, np.int64)
    popularity = {"item": nothing, "count": nothing, "train_count": nothing}
    if rule.rule != "temporal":
        return plain(rule), popularity
    times = shown.table.select("timestamp").to_pyarrow()["timestamp"].to_numpy()
    return rule.place(times, np.array([0, len(times)])), popularity


def _with_shown_items(
    popularity: dict[str, NDArray],
    coded: Coded,
    settings: PrepareSettings,
    shown: Shown | None,
) -> dict[str, NDArray]:
    """Put items that were only shown behind those of events, unless rare ones are left out."""
    if shown is None or _least(settings, "item") > 1:
        return popularity
    ids = shown.table.select("item_id").distinct()
    codes = coded.items.semi_join(ids, "item_id").order_by("item").select("item")
    extra = np.setdiff1d(codes.to_pyarrow()["item"].to_numpy(), popularity["item"])
    zeros = np.zeros(len(extra), np.int64)
    more = {"item": extra, "count": zeros, "train_count": zeros}
    return {name: np.concatenate([popularity[name], more[name]]) for name in popularity}


def _write_shown(
    con: ibis.BaseBackend, shown: Shown | None, coded: Coded, kept: Kept, folder: Path
) -> dict[str, Any] | None:
    if shown is None:
        return None
    from recsys.data.impressions import write_impressions

    users = coded.users.join(kept.users, "user").select("user_id", "rank")
    ranked = coded.items.join(con.table("ranked_items"), "item")
    items = ranked.select("item_id", index=ranked["rank"] + 1)
    file = folder / "impressions.parquet"
    return write_impressions(shown, users, items, file, partial(keep, con), partial(batches, con))


def keep(con: ibis.BaseBackend, name: str, table: ibis.Table) -> ibis.Table:
    """Compute a table once, into DuckDB's memory or its spill folder."""
    con.raw_sql(f'DROP TABLE IF EXISTS temp.main."{name}"')
    return con.create_table(name, table, temp=True)


def count(table: ibis.Table) -> int:
    """Return the number of rows."""
    return int(table.count().to_pyarrow().as_py())


def batches(con: ibis.BaseBackend, table: ibis.Table) -> Iterator[pa.RecordBatch]:
    """Stream a table as record batches of at most CHUNK rows; at least one, perhaps empty."""
    import ibis
    import pyarrow as pa

    # Ibis 12's own stream asks the cursor for a method that DuckDB 2 does not have.
    relation = con.con.sql(str(ibis.to_sql(table, dialect="duckdb")))
    stream = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch
    reader = stream(CHUNK)
    first = next(reader, None)
    yield pa.RecordBatch.from_pylist([], reader.schema) if first is None else first
    yield from reader


def encoded(con: ibis.BaseBackend, events: ibis.Table, shown: Shown | None = None) -> Coded:
    """Replace ids by codes in the order of the ids, and event types by theirs.

    The codes are of the ids in `shown`, too.
    """
    import ibis

    if "row" in events.columns:
        # The order is in `row`, so DuckDB need not keep it: less memory, all threads.
        con.raw_sql("SET preserve_insertion_order = false")
    else:
        events = events.mutate(row=ibis.row_number())
    users = _vocabulary(con, events, "user", shown)
    items = _vocabulary(con, events, "item", shown)
    codes = [(name, code) for code, name in enumerate(EVENT_TYPES, start=1)]
    flat = (
        events.mutate(type=events.event_type.cases(*codes, else_=0).cast("int8"))
        .join(users, "user_id")
        .join(items, "item_id")
        .select(*SAME_EVENT, "value", "row")
    )
    return Coded(keep(con, "coded_events", flat), users, items)


def _vocabulary(
    con: ibis.BaseBackend, events: ibis.Table, name: str, shown: Shown | None
) -> ibis.Table:
    import ibis

    ids = events.select(f"{name}_id")
    if shown is not None:
        ids = ids.union(shown.table.select(f"{name}_id").drop_null())
    ids = ids.distinct()
    codes = ibis.row_number().over(order_by=ids[f"{name}_id"]).cast("int32")
    return keep(con, f"{name}_codes", ids.mutate(**{name: codes}))


def filtered(
    con: ibis.BaseBackend, coded: Coded, settings: PrepareSettings, shown: Shown | None = None
) -> Kept:
    """Drop duplicates, then rare items and users; raise InputError where nothing is left.

    Users who are only in `shown` stay, unless rare ones are left out.
    """
    import ibis

    before = count(coded.events)
    unique = each_once(con, coded.events) if settings.deduplicate else coded.events
    after = count(unique)
    events, users, left = _frequent(con, unique, settings)
    if shown is not None and _least(settings, "user") == 1:
        users = _with_shown_users(users, coded, shown)
    order = [users["count"].desc(), users.user]
    ranked = users.mutate(rank=ibis.row_number().over(order_by=order).cast("int32"))
    if not left and (before or shown is None):
        raise InputError(
            f"nothing is left of {before} events: min_user_events={settings.min_user_events}, "
            f"min_item_events={settings.min_item_events}, k_core={settings.k_core} drop "
            "everything; lower them, e.g. data.min_user_events=1 data.min_item_events=1 "
            "data.k_core=null"
        )
    dropped = {"duplicates": before - after, "rare": after - left}
    rare = unique.anti_join(events, "row")
    return Kept(events, keep(con, "ranked_users", ranked), dropped, rare)


def _least(settings: PrepareSettings, name: str) -> int:
    return max(getattr(settings, f"min_{name}_events"), settings.k_core or 1)


def _with_shown_users(users: ibis.Table, coded: Coded, shown: Shown) -> ibis.Table:
    import ibis

    of_shown = coded.users.semi_join(shown.table.select("user_id").distinct(), "user_id")
    extra = of_shown.anti_join(users, "user")
    return users.union(extra.select("user", count=ibis.literal(0, "int64")))


def each_once(con: ibis.BaseBackend, events: ibis.Table) -> ibis.Table:
    """Keep the first in the source of events that are the same."""
    counted = events.group_by(SAME_EVENT).aggregate(rows=events.count(), kept=events.row.min())
    repeated = keep(con, "repeated", counted.filter(counted.rows > 1).drop("rows"))
    if not count(repeated):
        return events
    marked = events.left_join(repeated, SAME_EVENT)
    first = marked.filter(marked.kept.isnull() | (marked.kept == marked.row))
    return keep(con, "unique_events", first.select(*events.columns))


def _frequent(
    con: ibis.BaseBackend, events: ibis.Table, settings: PrepareSettings
) -> tuple[ibis.Table, ibis.Table, int]:
    """Return frequent events, users with their count, and how many events there are."""
    least_items, least_users = _least(settings, "item"), _least(settings, "user")
    kept, left = events, -1
    for turn in itertools.count():
        # Two names in turn: this round's tables are computed from the last round's.
        items = _at_least(con, "item", kept, least_items, turn % 2)
        of_items = events.semi_join(items, "item") if least_items > 1 else events
        users = _at_least(con, "user", of_items, least_users, turn % 2)
        kept = of_items.semi_join(users, "user")
        before, left = left, int(users["count"].sum().to_pyarrow().as_py() or 0)
        if settings.k_core is None or left in (before, 0):
            break
    return kept, users, left


def _at_least(
    con: ibis.BaseBackend, name: str, events: ibis.Table, least: int, turn: int
) -> ibis.Table:
    counted = events.group_by(name).aggregate(count=events.count())
    return keep(con, f"frequent_{name}s_{turn}", counted.filter(counted["count"] >= least))


def write_events(
    con: ibis.BaseBackend, kept: Kept, folder: Path, has_time: bool
) -> NDArray[np.int64]:
    """Stream events by (user rank, time, source order) into `.npy` files; return the offsets.

    `items.npy` holds item codes for now. Where there is no time, `times` are places.
    """
    folder.mkdir()
    counts = kept.users.order_by("rank").select("count").to_pyarrow()["count"].to_numpy()
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
        for batch in batches(con, ordered):
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
    return table.left_join(typed(features.select(key, *kinds), kinds), key)


def occurring(folder: Path) -> list[str]:
    """Return the names of the event types that occur, weakest first."""
    types = np.load(folder / "types.npy", mmap_mode="r")
    counts = count_items(types, len(EVENT_TYPES) + 1)
    assert counts[0] == 0, "a source gave an event type that it did not check"
    return [name for name, number in zip(EVENT_TYPES, counts[1:], strict=True) if number]


@contextmanager
def _scratch(folder: Path, settings: PrepareSettings) -> Iterator[Path]:
    """Yield a folder for spilled and intermediate files, gone afterwards."""
    place = Path(settings.spill).expanduser() if settings.spill else folder
    place.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".prepare-", dir=place))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if place == folder:
            with suppress(OSError):
                folder.rmdir()  # only where nothing was made in it


@contextmanager
def _room(folder: Path, settings: PrepareSettings, facts: dict[str, Any]) -> Iterator[None]:
    """Say which place is full, or that memory is too small, and what to do about it."""
    import duckdb

    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(_full(folder, settings, facts)) from error
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"preparing needs more than data.memory_limit={settings.memory_limit} with "
            f"data.threads={settings.threads}; give it more, e.g. data.memory_limit=8GB, "
            "or data.threads=1"
        ) from error
    except duckdb.IOException as error:
        if "No space left" not in str(error):
            raise
        raise InputError(_full(folder, settings, facts)) from error


def _full(folder: Path, settings: PrepareSettings, facts: dict[str, Any]) -> str:
    place = Path(settings.spill) if settings.spill else folder
    there = next(one for one in (place, *place.parents) if one.exists())
    free = shutil.disk_usage(there).free / 1e6
    # Coded events, their sorted copy and the result together are about three times a packed log.
    needed = 3 * sum(size for _, size, _ in facts["files"]) / 1e6 + 10
    return (
        f"no space left in {folder}"
        + (f" or {place}" if place != folder else "")
        + f" ({free:,.0f} MB free now); this log needs about {needed:,.0f} MB. Free some, or work "
        "on another disk: RECSYS_HOME=/a/bigger/disk, data.spill=/a/bigger/disk/tmp"
    )


def summary(dataset: Dataset) -> RichTable:
    """Return a table of what is in a dataset, for the terminal."""
    from rich.table import Table

    manifest, lengths = dataset.manifest, np.diff(dataset.offsets)
    split = dataset.split
    table = Table("", "", title=f"dataset {dataset.path.name}", show_header=False)
    rows = {
        "users": f"{dataset.num_users:,}",
        "items": f"{dataset.num_items:,}",
        "events": f"{int(lengths.sum()):,} of {manifest['source_rows']:,} read",
        "dropped": ", ".join(f"{n:,} {why}" for why, n in manifest["dropped"].items()),
        "event types": ", ".join(manifest["event_types"]),
        "events a user": _lengths(lengths),
        "impressions": _impressions(manifest.get("impressions")),
        "time": _span(dataset),
        "split": str(manifest["split"]["rule"]),
        "train": f"{int(split.train_end.sum()):,} events",
        "validation": f"{int((split.validation >= 0).sum()):,} users",
        "test": f"{int((split.test >= 0).sum()):,} users",
        "item features": ", ".join(f"{n} ({k})" for n, k in manifest["item_features"].items()),
        "user features": ", ".join(f"{n} ({k})" for n, k in manifest["user_features"].items()),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _lengths(lengths: NDArray[np.int64]) -> str:
    return f"median {np.median(lengths):,.0f}, most {lengths.max():,}" if len(lengths) else ""


def _impressions(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return ""
    context = f"; context {', '.join(facts['context'])}" if facts["context"] else ""
    return (
        f"{facts['rows']:,} in {facts['requests']:,} requests; labels "
        f"{', '.join(facts['labels'])}{context}"
    )


def _span(dataset: Dataset) -> str:
    if not dataset.has_time:
        return "an order only"
    if not len(times := dataset.events["times"]):
        import pyarrow.parquet as pq

        file = dataset.path / "impressions.parquet"
        times = pq.read_table(file, columns=["timestamp"])["timestamp"].to_numpy()
    ends = (datetime.fromtimestamp(int(t) / 1000, UTC) for t in (times.min(), times.max()))
    return " to ".join(f"{end:%Y-%m-%d}" for end in ends)
