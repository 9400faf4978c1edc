"""The Ibis expressions of `prepare`: codes for ids, duplicates, filters, ranks.

In the tables here `user` and `item` are codes (places in the order of the ids), so that each id is
compared as text once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from recsys.data.engines import count, keep
from recsys.data.settings import PrepareSettings
from recsys.schema import EVENT_TYPES, InputError

if TYPE_CHECKING:
    import ibis

    from recsys.data.impressions import Shown

SAME_EVENT = ["user", "item", "timestamp", "type"]


class Coded(NamedTuple):
    """Events in codes (user, item, timestamp, type, value, row), and the ids behind the codes."""

    events: ibis.Table
    users: ibis.Table
    items: ibis.Table


class Kept(NamedTuple):
    """What the filters leave: events, and users with count and rank (0 is the busiest)."""

    events: ibis.Table
    users: ibis.Table
    dropped: dict[str, int]


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
    unique = _unique(con, coded.events) if settings.deduplicate else coded.events
    after = count(unique)
    events, users, left = _frequent(con, unique, settings)
    if shown is not None and settings.least("user") == 1:
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
    return Kept(events, keep(con, "ranked_users", ranked), dropped)


def _with_shown_users(users: ibis.Table, coded: Coded, shown: Shown) -> ibis.Table:
    import ibis

    of_shown = coded.users.semi_join(shown.table.select("user_id").distinct(), "user_id")
    extra = of_shown.anti_join(users, "user")
    return users.union(extra.select("user", count=ibis.literal(0, "int64")))


def _unique(con: ibis.BaseBackend, events: ibis.Table) -> ibis.Table:
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
    least_items, least_users = settings.least("item"), settings.least("user")
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
