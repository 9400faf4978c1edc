"""A new day's log as a dataset that grows sees it: like the old one, in codes, without repeats.

Shapes: E events of the new log and those that waited, C their ids (codes), in the order of the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.data.admission import PENDING
from recsys.data.coding import CODES, each_once, encoded
from recsys.data.dataset import Dataset
from recsys.data.engines import Engine, count
from recsys.data.prepare import table_kinds
from recsys.data.settings import PrepareSettings
from recsys.data.sources import Tables
from recsys.data.sources.events import UNTYPED
from recsys.data.sources.files import ROW, parquet
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis

Ints = NDArray[np.int64]


class Day(NamedTuple):
    """Events of the new log that are not in the old dataset, in the order of their arrival.

    columns: `users`, `items` (codes), `times`, `types`, `values`, all [E]. ids: by "user" and
    "item", each code's id [C]. known: the same with its place in the old table, -1 for none.
    rows: how many the log has; dropped: how many of them are gone already, by reason.
    """

    columns: dict[str, NDArray]
    ids: dict[str, pa.Array]
    known: dict[str, Ints]
    rows: int
    dropped: dict[str, int]


def read_day(engine: Engine, old: Dataset, tables: Tables, deduplicate: bool) -> Day:
    """Return what a new log brings, and what waited in the old dataset."""
    new = engine.keep("new_events", engine.rowed(tables.events))
    coded = encoded(engine, _with_waiting(engine, old.path / PENDING, new))
    unique = each_once(engine, coded.events) if deduplicate else coded.events
    engine.keep("new_once", unique)
    table = engine.here("new_once").order_by("row").to_pyarrow()
    names = {"users": "user", "items": "item", "times": "timestamp", "types": "type"}
    columns = {name: table[theirs].to_numpy() for name, theirs in names.items()}
    columns["values"] = table["value"].to_numpy().astype(np.float32)
    ids, known = {}, {}
    for name, kept in CODES.items():
        file = old.path / f"{name}s.parquet"
        ids[name], known[name] = _places(engine.local, engine.here(kept), file, name)
    rows, repeated = count(new), count(coded.events) - len(table)
    day = Day(columns, ids, known, rows, {**tables.dropped, "duplicates": repeated})
    return _without_repeats(old, day) if deduplicate else day


def _with_waiting(engine: Engine, file: Path, new: ibis.Table) -> ibis.Table:
    """Return the new events after those that wait in `file`, where there are any."""
    if not file.is_file():
        return new
    earlier = parquet(engine.local, [file]).rename(row=ROW)
    waiting = engine.take("waiting", earlier.select(*new.columns))
    later = new.mutate(row=new.row + pq.read_metadata(file).num_rows)
    return waiting.union(later)


def _places(
    con: ibis.BaseBackend, codes: ibis.Table, file: Path, name: str
) -> tuple[pa.Array, Ints]:
    """Return the id of each code, and its row in the old table `file`, -1 where it has none."""
    key = f"{name}_id"
    there = parquet(con, [file]).select(key, place=ROW)
    joined = codes.left_join(there, key).order_by(name)
    table = joined.select(key, place=joined.place.fill_null(-1)).to_pyarrow()
    return table[key].combine_chunks(), table["place"].to_numpy().astype(np.int64)


def _without_repeats(old: Dataset, day: Day) -> Day:
    """Leave out events that the old dataset has."""
    columns = day.columns
    users, items = (day.known[n][columns[f"{n}s"]] for n in ("user", "item"))
    both = np.flatnonzero((users >= 0) & (items >= 0))
    asked = (users[both], columns["times"][both], items[both] + 1, columns["types"][both])
    fresh = np.ones(len(users), bool)
    fresh[both] = old.find(*asked) < 0
    dropped = day.dropped | {"duplicates": day.dropped["duplicates"] + int((~fresh).sum())}
    return day._replace(columns={n: c[fresh] for n, c in columns.items()}, dropped=dropped)


def check_growable(old: Dataset) -> None:
    """Raise InputError where a dataset has what cannot grow."""
    if old.manifest.get("impressions") is not None:
        raise InputError(
            f"grow.onto={old.path.name}: it has impressions, which do not grow; prepare it again "
            "from the whole log, or without them (data.source.impressions=null)"
        )
    if not old.has_time:
        raise InputError(
            f"grow.onto={old.path.name}: it has an order but no times, so nobody knows where new "
            "events belong; prepare it from a log with a timestamp column"
        )
    if old.manifest["prepare"]["k_core"] is not None:
        raise InputError(
            f"grow.onto={old.path.name}: data.k_core={old.manifest['prepare']['k_core']} looks at "
            "all events again and again; prepare it with data.min_item_events and "
            "data.min_user_events instead"
        )


def check_alike(old: Dataset, tables: Tables, settings: PrepareSettings) -> None:
    """Raise InputError where the new log is not like the old one, naming both."""
    place = Path(settings.path).name if settings.path else "the new log"
    if tables.impressions is not None:
        raise InputError(
            f"{place}: it has impressions, which grow.onto does not take; leave them out "
            "(data.source.impressions=null, for data=served false), or prepare the whole log again"
        )
    if not tables.has_time:
        raise InputError(f"{place}: no times, but {old.path.name} has; name the column of times")
    was = dict(old.manifest.get("log_columns") or {})
    _compare(old, place, "column", was, dict(tables.columns) if was else {}, UNTYPED)
    for table, key in ((tables.items, "item"), (tables.users, "user")):
        if table is not None:
            declared = getattr(settings, f"{key}_features")
            kinds = table_kinds(table, f"{key}_id", declared)
            _compare(old, place, f"{key} feature", old.manifest[f"{key}_features"], kinds)


def _compare(
    old: Dataset,
    place: str,
    what: str,
    was: Mapping[str, str],
    now: Mapping[str, str],
    unsure: str = "",
) -> None:
    if not now and what == "column":
        return
    for name in sorted({*was, *now}):
        before, after = was.get(name, "missing"), now.get(name, "missing")
        if before != after and ("missing" in (before, after) or unsure not in (before, after)):
            raise InputError(
                f"{place}: {what} {name!r} is {after}, in {old.path.name} it is {before}; map or "
                "cast it so that both agree, or prepare all days again"
            )
