"""A dataset grows by new days: a new dataset, in which everybody and everything keeps its index.

Only the new log is read as a log. Users and items that it brings come after those that are there,
its events go where their users and times say, and of the old arrays nothing but a copy is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.artifacts import Workspace, fingerprint, write_manifest
from recsys.data.admission import PENDING, SCHEMA, Newcomers, admitted
from recsys.data.dataset import Dataset
from recsys.data.day import Day, check_alike, check_growable, read_day
from recsys.data.features import typed, write_features
from recsys.data.flat import any_value, occurring
from recsys.data.merge import Arriving, Merged, merge
from recsys.data.prepare import is_ready, making
from recsys.data.settings import STAYS_THE_SAME, PrepareSettings, resolved
from recsys.data.sources import Source, Tables
from recsys.data.splits import DAY, FOREVER, SplitRule, count_items, rule_of
from recsys.schema import EVENT_TYPES, InputError

if TYPE_CHECKING:
    import ibis

Ints = NDArray[np.int64]
KEPT = ("name", "min_user_events", "min_item_events", "k_core", "deduplicate")
"""Settings that a grown dataset has from the one that it grows from."""


@dataclass(frozen=True)
class Growth:
    """The `grow:` section of the config.

    onto: name or path of the dataset that grows. keep_days: events that are older than so many
    days, counted back from the newest, expire; None: none do. retire: bundles of the dataset no
    longer answer with items that have no event left.
    """

    onto: str
    keep_days: float | None = None
    retire: bool = False

    def __post_init__(self) -> None:
        if self.retire and self.keep_days is None:
            raise InputError(
                "grow.retire=true has no effect without grow.keep_days, after which items are "
                "stale; give both"
            )
        days = self.keep_days
        if days is not None and (isinstance(days, bool | str) or not days > 0):
            raise InputError(f"grow.keep_days={self.keep_days}: expected days above 0, or null")

    def since(self, newest: int) -> int:
        """Return the moment before which events expire."""
        return FOREVER if self.keep_days is None else newest + 1 - round(self.keep_days * DAY)


def grow(
    growth: Growth,
    settings: Mapping[str, Any],
    source: Source,
    workspace: Workspace,
    stage: Callable[[str], None] = lambda name: None,
) -> Dataset:
    """Make the dataset that `growth.onto` becomes with the log of `source`, or find it.

    settings: as for `prepare`; what `KEPT` names is the old dataset's. Takes the memory of the new
    log's events, some 60 bytes each, and of the vocabularies. Raises InputError; then nothing is
    left.
    """
    old = Dataset(workspace.find("dataset", growth.onto))
    check_growable(old)
    kept = {name: old.manifest["prepare"][name] for name in KEPT}
    chosen = replace(PrepareSettings.of(settings), **kept)
    rule = rule_of(old.manifest["split"])
    facts = resolved(chosen, source, rule)
    facts |= {"onto": old.fingerprint, "keep_days": growth.keep_days}
    facts |= {"retire": True} if growth.retire else {}
    lasting = {name: value for name, value in facts.items() if name not in STAYS_THE_SAME}
    path = workspace.folder("dataset") / f"{chosen.name}-{fingerprint(lasting)[:8]}"
    if not is_ready(path):
        with making(path, chosen, facts) as (engine, folder, scratch):
            stage("reading")
            began = time.monotonic()
            tables = engine.read(source, Path(chosen.path) if chosen.path else None, scratch)
            check_alike(old, tables, chosen)
            with tables.blaming():
                day = read_day(engine, old, tables, chosen.deduplicate)
            stage("merging")
            grown = _Grown(old, day, growth, chosen, rule, folder)
            grown.write(tables, began, facts)
    workspace.mark_latest("dataset", path)
    return Dataset(path)


class _Grown:
    """The new dataset while it is made: who comes in, what expires, and where events go."""

    def __init__(
        self,
        old: Dataset,
        day: Day,
        growth: Growth,
        settings: PrepareSettings,
        rule: SplitRule,
        folder: Path,
    ) -> None:
        self.old, self.settings, self.rule, self.folder = old, settings, rule, folder
        times, old_times = day.columns["times"], old.events["times"]
        newest = max(int(one.max(initial=FOREVER)) for one in (times, old_times))
        self.since, self.retires = growth.since(newest), growth.retire
        alive = times >= self.since
        self._check_something_new(day, growth, alive)
        self.expired = int((~alive).sum())
        self.day = day._replace(columns={n: c[alive] for n, c in day.columns.items()})
        columns = self.day.columns
        known_users, known_items = (self.day.known[n] >= 0 for n in ("user", "item"))
        least = settings.min_user_events, settings.min_item_events
        self.new: Newcomers = admitted(
            columns["users"], columns["items"], known_users, known_items, least
        )
        self.num_users = old.num_users + len(self.new.users)
        self.num_items = old.num_items + len(self.new.items)

    def _check_something_new(self, day: Day, growth: Growth, alive: NDArray[np.bool_]) -> None:
        place = self.settings.path or "the new log"
        if not len(alive):
            raise InputError(
                f"{place}: all of its {day.rows:,} events are in {self.old.path.name} already; "
                "give the log of a new day"
            )
        if not alive.any():
            raise InputError(
                f"{place}: all of its events are before {_date(self.since)}, from which "
                f"grow.keep_days={growth.keep_days:g} keeps; give newer days, or keep more"
            )
        if int(self.old.events["times"].max(initial=FOREVER)) < self.since:
            raise InputError(
                f"grow.keep_days={growth.keep_days:g}: everything in {self.old.path.name} would "
                f"expire, as the newest event of {place} is of "
                f"{_date(int(day.columns['times'].max()))}; is its clock right? Keep more days, "
                "or prepare that log alone"
            )

    def write(self, tables: Tables, began: float, facts: dict[str, Any]) -> None:
        """Write everything into the folder."""
        columns = self._placed()
        arriving = Arriving.of(columns.pop("users"), columns)
        merged = merge(self.old, arriving, self.num_users, self.since, self.folder / "events")
        where, counts, train_counts = self._counted(merged)
        self._write_table(
            "item", self.new.items, {"count": counts, "train_count": train_counts}, tables.items
        )
        self._write_table("user", self.new.users, {"count": np.diff(merged.offsets)}, tables.users)
        waiting = self._write_pending()
        was = self.old.manifest
        expired = self.expired + merged.expired
        dropped = self._dropped(was["dropped"], expired, waiting)
        write_manifest(
            self.folder,
            "dataset",
            name=self.settings.name,
            num_users=self.num_users,
            num_items=self.num_items,
            num_events=int(merged.offsets[-1]),
            has_time=True,
            event_types=occurring(self.folder / "events"),
            has_values=any_value(self.folder / "events"),
            split=where,
            item_features=was["item_features"],
            user_features=was["user_features"],
            impressions=None,
            log_columns=was.get("log_columns") or dict(tables.columns),
            item_order="arrival",
            grown={
                "onto": {
                    "name": self.old.path.name,
                    "path": str(self.old.path.resolve()),
                    "fingerprint": self.old.fingerprint,
                },
                "ancestors": [*ancestors(self.old), self.old.fingerprint],
                "rows": self.day.rows,
                "added": len(arriving.users),
                "late": merged.late,
                "expired": expired,
                "waiting": waiting,
                "new_users": len(self.new.users),
                "new_items": len(self.new.items),
                "retired": int((counts == 0).sum()) if self.retires else None,
            },
            prepare=facts,
            source_rows=was["source_rows"] + self.day.rows + sum(tables.dropped.values()),
            dropped=dropped,
            seconds=round(time.monotonic() - began, 3),
        )

    def _placed(self) -> dict[str, NDArray]:
        """Return the events that come in, with user rows and item indices of the new dataset."""
        columns = {name: c[self.new.events] for name, c in self.day.columns.items()}
        rows, indices = self.day.known["user"].copy(), self.day.known["item"] + 1
        rows[self.new.users] = self.old.num_users + np.arange(len(self.new.users))
        indices[self.new.items] = self.old.num_items + 1 + np.arange(len(self.new.items))
        return columns | {"users": rows[columns["users"]], "items": indices[columns["items"]]}

    def _counted(self, merged: Merged) -> tuple[dict[str, Any], Ints, Ints]:
        """Return the split, moved on, and each item's events, all and those that train: [N]."""
        items, times = (
            np.load(self.folder / "events" / f"{name}.npy", mmap_mode="r")
            for name in ("items", "times")
        )
        where = self.rule.place(times, merged.offsets)
        counts = count_items(items, self.num_items + 1)[1:]
        if "validation_from" in where:
            moment = int(where["validation_from"])
            trained = count_items(items, self.num_items + 1, times, moment)[1:]
        else:
            trained = self.rule.trains(items, times, merged.offsets)[1:]
            trained = np.pad(trained, (0, self.num_items - len(trained)))
        return where, counts, trained

    def _write_table(
        self, name: str, new: Ints, counts: Mapping[str, Ints], features: ibis.Table | None
    ) -> None:
        """Write the old rows with new counts, then the new ones; newer features replace older."""
        key, file = f"{name}_id", f"{name}s.parquet"
        kinds = self.old.manifest[f"{name}_features"]
        was = pq.read_table(self.old.path / file)
        ids = pa.chunked_array([*was[key].chunks, self.day.ids[name].take(pa.array(new))])
        columns = {key: ids, **{n: pa.array(c) for n, c in counts.items()}}
        latest = None if features is None else typed(features.select(key, *kinds), kinds)
        table = None if latest is None else latest.to_pyarrow()
        columns |= {n: self._feature(n, was[n], ids, key, table) for n in kinds}
        table = pa.table(columns)
        write_features(table.combine_chunks().to_batches(), self.folder / file, key, kinds)

    def _feature(
        self, name: str, was: pa.ChunkedArray, ids: pa.ChunkedArray, key: str, latest: Any
    ) -> pa.ChunkedArray:
        missing = pa.nulls(len(ids) - len(was), was.type)
        column = pa.chunked_array([*was.chunks, missing])
        if latest is None:
            return column
        try:
            given = latest[name].cast(was.type)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"feature {name!r} is {latest[name].type}, in {self.old.path.name} it is "
                f"{was.type} ({error}); cast it so that both agree, or prepare all days again"
            ) from error
        there = pc.index_in(ids.combine_chunks(), latest[key].combine_chunks())
        at = pc.if_else(pc.is_valid(there), pc.add(there, len(ids)), pa.array(range(len(ids))))
        return pa.chunked_array([*column.chunks, *given.chunks]).take(at)

    def _write_pending(self) -> int:
        left = {name: c[~self.new.events] for name, c in self.day.columns.items()}
        if len(left["users"]):
            types = np.array(["", *EVENT_TYPES])[left["types"]]
            values = pa.array(left["values"], from_pandas=True)
            ids = (self.day.ids[n].take(pa.array(left[f"{n}s"])) for n in ("user", "item"))
            arrays = [*ids, pa.array(left["times"]), pa.array(types, pa.string()), values]
            pq.write_table(pa.table(arrays, schema=SCHEMA), self.folder / PENDING)
        return len(left["users"])

    def _dropped(self, was: Mapping[str, int], expired: int, waiting: int) -> dict[str, int]:
        """Return how many events of all logs so far are not in the dataset, by reason."""
        now = self.day.dropped | ({"expired": expired} if expired else {})
        both = {name: was.get(name, 0) + now.get(name, 0) for name in {**was, **now}}
        return both | {"rare": waiting}


def ancestors(dataset: Dataset) -> list[str]:
    """Return the fingerprints of the datasets that this one has grown from, the oldest first."""
    return list(dataset.manifest.get("grown", {}).get("ancestors", []))


def _date(moment: int) -> str:
    return f"{datetime.fromtimestamp(moment / 1000, UTC):%Y-%m-%d %H:%M}"
