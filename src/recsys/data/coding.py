"""The Ibis expressions of `prepare`: codes for ids, duplicates, filters, ranks.

In the tables here `user` and `item` are codes (places in the order of the ids), so that each id is
compared as text once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from recsys.data.engines import Engine, count
from recsys.data.settings import PrepareSettings
from recsys.schema import EVENT_TYPES, InputError

if TYPE_CHECKING:
    import ibis

SAME_EVENT = ["user", "item", "timestamp", "type"]
CODES = {"user": "user_codes", "item": "item_codes"}
RANKED = "ranked_users"
"""Names under which the vocabularies and the users left are kept."""


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


def encoded(engine: Engine, events: ibis.Table, shown: ibis.Table | None = None) -> Coded:
    """Replace ids by codes in the order of the ids, and event types by theirs.

    shown: `user_id` and `item_id`, perhaps null, which get codes, too.
    """
    events = engine.rowed(events)
    users = _vocabulary(engine, events, "user", shown)
    items = _vocabulary(engine, events, "item", shown)
    codes = [(name, code) for code, name in enumerate(EVENT_TYPES, start=1)]
    flat = (
        events.mutate(type=events.event_type.cases(*codes, else_=0).cast("int8"))
        .join(users, "user_id")
        .join(items, "item_id")
        .select(*SAME_EVENT, "value", "row")
    )
    return Coded(engine.keep("coded_events", flat), users, items)


def _vocabulary(
    engine: Engine, events: ibis.Table, name: str, shown: ibis.Table | None
) -> ibis.Table:
    ids = events.select(f"{name}_id")
    if shown is not None:
        ids = ids.union(shown.select(f"{name}_id").drop_null())
    ids = ids.distinct()
    return engine.numbered(CODES[name], ids, name, [ids[f"{name}_id"]])


def filtered(
    engine: Engine, coded: Coded, settings: PrepareSettings, shown: ibis.Table | None = None
) -> Kept:
    """Drop duplicates, then rare items and users; raise InputError where nothing is left.

    Users who are only in `shown` stay, unless rare ones are left out.
    """
    before = count(coded.events)
    unique = each_once(engine, coded.events) if settings.deduplicate else coded.events
    after = before if unique is coded.events else count(unique)
    events, users, left = _frequent(engine, unique, settings)
    if shown is not None and settings.least("user") == 1:
        users = _with_shown_users(users, coded, shown)
    ranked = engine.numbered(RANKED, users, "rank", [users["count"].desc(), users.user])
    if not left and (before or shown is None):
        raise InputError(
            f"nothing is left of {before} events: min_user_events={settings.min_user_events}, "
            f"min_item_events={settings.min_item_events}, k_core={settings.k_core} drop "
            "everything; lower them, e.g. data.min_user_events=1 data.min_item_events=1 "
            "data.k_core=null"
        )
    dropped = {"duplicates": before - after, "rare": after - left}
    return Kept(events, ranked, dropped, unique.anti_join(events, "row"))


def _with_shown_users(users: ibis.Table, coded: Coded, shown: ibis.Table) -> ibis.Table:
    import ibis

    of_shown = coded.users.semi_join(shown.select("user_id").distinct(), "user_id")
    extra = of_shown.anti_join(users, "user")
    return users.union(extra.select("user", count=ibis.literal(0, "int64")))


def each_once(engine: Engine, events: ibis.Table) -> ibis.Table:
    """Keep the first in the source of events that are the same."""
    counted = events.group_by(SAME_EVENT).aggregate(rows=events.count(), kept=events.row.min())
    repeated = engine.keep("repeated", counted.filter(counted.rows > 1).drop("rows"))
    if not count(repeated):
        return events
    marked = events.left_join(repeated, SAME_EVENT)
    first = marked.filter(marked.kept.isnull() | (marked.kept == marked.row))
    return engine.keep("unique_events", first.select(*events.columns))


def _frequent(
    engine: Engine, events: ibis.Table, settings: PrepareSettings
) -> tuple[ibis.Table, ibis.Table, int]:
    """Return frequent events, users with their count, and how many events there are."""
    least_items, least_users = settings.least("item"), settings.least("user")
    kept, left = events, -1
    for turn in itertools.count():
        # Two names in turn: this round's tables are computed from the last round's.
        items = _at_least(engine, "item", kept, least_items, turn % 2)
        of_items = events.semi_join(items, "item") if least_items > 1 else events
        users = _at_least(engine, "user", of_items, least_users, turn % 2)
        kept = of_items.semi_join(users, "user")
        before, left = left, int(users["count"].sum().to_pyarrow().as_py() or 0)
        if settings.k_core is None or left in (before, 0):
            break
    return kept, users, left


def _at_least(engine: Engine, name: str, events: ibis.Table, least: int, turn: int) -> ibis.Table:
    counted = events.group_by(name).aggregate(count=events.count())
    return engine.keep(f"frequent_{name}s_{turn}", counted.filter(counted["count"] >= least))
