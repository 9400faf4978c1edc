"""Event log → dataset: filters, vocabularies, order and split, in bounded memory.

Everything that grows with the log is an Ibis expression (`coding`) on DuckDB, which spills to
disk past `memory_limit`, or on Spark (`engines`); the result streams into flat files (`flat`).
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.artifacts import (
    Workspace,
    fingerprint,
    read_manifest,
    write_manifest,
    writing,
)
from recsys.data.admission import PENDING, waiting
from recsys.data.coding import CODES, RANKED, encoded, filtered
from recsys.data.dataset import Dataset
from recsys.data.engines import Engine, batches, count, engine_of, keep
from recsys.data.features import check_key, feature_kinds, write_features
from recsys.data.flat import (
    any_value,
    index_items,
    occurring,
    write_events,
    write_items,
    write_users,
)
from recsys.data.settings import STAYS_THE_SAME, PrepareSettings, plain, resolved
from recsys.data.sources import Source
from recsys.data.sources.parts import engine_errors, lacks
from recsys.data.splits import SplitRule, split_rule
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis

    from recsys.data.impressions import Shown
    from recsys.data.sources import Tables


class Known(NamedTuple):
    """Ids with their codes, and users left with count and rank: tables of DuckDB."""

    users: ibis.Table
    items: ibis.Table
    ranked: ibis.Table


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
        with making(path, chosen, facts) as (engine, folder, scratch):
            _make(engine, folder, scratch, chosen, source, rule, facts, stage)
    workspace.mark_latest("dataset", path)
    return Dataset(path)


@contextmanager
def making(
    path: Path, settings: PrepareSettings, facts: dict[str, Any]
) -> Iterator[tuple[Engine, Path, Path]]:
    """Yield an engine, the folder that becomes the dataset `path`, and one for scratch files."""
    with (
        _scratch(path.parent, settings) as scratch,
        engine_of(settings, scratch) as engine,
        writing(path) as folder,
        _room(path.parent, settings, facts),
    ):
        yield engine, folder, scratch


def is_ready(path: Path) -> bool:
    """Return whether there is a whole dataset."""
    with suppress(InputError):
        return bool(read_manifest(path, "dataset") and Dataset(path))
    return False


def _make(
    engine: Engine,
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
    tables = engine.read(source, Path(settings.path) if settings.path else None, scratch)
    _check_time(rule, tables.has_time)
    item_kinds = table_kinds(tables.items, "item_id", settings.item_features)
    user_kinds = table_kinds(tables.users, "user_id", settings.user_features)
    con = engine.local
    shown = _shown(con, tables, settings.request_features)
    ids = None if shown is None else _ids_of(engine, shown)
    with tables.blaming():
        coded = encoded(engine, tables.events, ids)
    stage("filtering")
    kept = filtered(engine, coded, settings, ids)
    known = Known(*(engine.here(name) for name in (CODES["user"], CODES["item"], RANKED)))
    stage("sorting")
    offsets = write_events(engine, kept, folder / "events", tables.has_time)
    stage("indexing")
    if offsets[-1]:
        where, popularity = index_items(folder / "events", offsets, rule)
    else:
        where, popularity = _without_events(con, rule, shown)
    popularity = _with_shown_items(popularity, known, settings, shown)
    write_items(con, known.items, popularity, tables.items, item_kinds, folder)
    write_users(con, known.users, known.ranked, tables.users, user_kinds, folder)
    if kept.dropped["rare"] and settings.k_core is None:
        rare = engine.batches(waiting(kept.rare, coded.users, coded.items))
        write_features(rare, folder / PENDING, "user_id", {})
    if shown is not None:
        stage("writing impressions")
    impressions = _write_shown(con, shown, known, folder)
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
        has_values=any_value(folder / "events"),
        split=where,
        item_features=item_kinds,
        user_features=user_kinds,
        impressions=impressions,
        log_columns=dict(tables.columns),
        prepare=facts,
        source_rows=count(coded.events) + sum(tables.dropped.values()),
        dropped={**tables.dropped, **kept.dropped, **tables.dropped_requests},
        seconds=round(time.monotonic() - began, 3),
        **({"skipped": list(tables.skipped)} if tables.skipped else {}),
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


def _ids_of(engine: Engine, shown: Shown) -> ibis.Table:
    return engine.take("shown_ids", shown.table.select("user_id", "item_id"))


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
    known: Known,
    settings: PrepareSettings,
    shown: Shown | None,
) -> dict[str, NDArray]:
    """Put items that were only shown behind those of events, unless rare ones are left out."""
    if shown is None or settings.least("item") > 1:
        return popularity
    ids = shown.table.select("item_id").distinct()
    codes = known.items.semi_join(ids, "item_id").order_by("item").select("item")
    extra = np.setdiff1d(codes.to_pyarrow()["item"].to_numpy(), popularity["item"])
    zeros = np.zeros(len(extra), np.int64)
    more = {"item": extra, "count": zeros, "train_count": zeros}
    return {name: np.concatenate([popularity[name], more[name]]) for name in popularity}


def _write_shown(
    con: ibis.BaseBackend, shown: Shown | None, known: Known, folder: Path
) -> dict[str, Any] | None:
    if shown is None:
        return None
    from recsys.data.impressions import write_impressions

    users = known.users.join(known.ranked, "user").select("user_id", "rank")
    ranked = known.items.join(con.table("ranked_items"), "item")
    items = ranked.select("item_id", index=ranked["rank"] + 1)
    file = folder / "impressions.parquet"
    return write_impressions(shown, users, items, file, partial(keep, con), partial(batches, con))


@contextmanager
def _scratch(folder: Path, settings: PrepareSettings) -> Iterator[Path]:
    """Yield a folder for spilled and intermediate files, gone afterwards."""
    place = Path(settings.spill).expanduser() if settings.spill else folder
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"data.spill={settings.spill}: {error.strerror}; name a folder") from error
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
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(_full(folder, settings, facts)) from error
    except engine_errors() as error:
        lack = lacks(error)
        if lack == "disk":
            raise InputError(_full(folder, settings, facts)) from error
        if lack == "memory":
            raise InputError(
                f"preparing needs more than data.memory_limit={settings.memory_limit} with "
                f"data.threads={settings.threads}; give it more, e.g. data.memory_limit=8GB, "
                "or data.threads=1"
            ) from error
        raise


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
