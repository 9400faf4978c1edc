"""RetailRocket: events.csv, and the items' newest category with its place in the category tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.sources import Tables
from recsys.data.sources.canonical import Log
from recsys.data.sources.files import (
    delimited,
    existing,
    header,
    inside,
    kept_rows,
    mapped,
    reading,
)

if TYPE_CHECKING:
    import ibis

NAMES = {
    "user_id": "visitorid",
    "item_id": "itemid",
    "timestamp": "timestamp",
    "event_type": "event",
}
EVENT_TYPES = {"addtocart": "cart", "transaction": "purchase"}


@dataclass(frozen=True)
class RetailRocket:
    """The folder as it comes out of its zip, or events.csv alone (then without categories)."""

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read events, and item_properties_part*.csv with category_tree.csv where they are."""
        found = existing(path)
        folder = found if found.is_dir() else found.parent
        file = inside(found, ("events.csv",)) if found.is_dir() else found
        mapped(header(file, ","), NAMES, (), file.name)
        with reading(file):
            table = delimited(con, file)
            chosen = table.select(**{ours: table[theirs] for ours, theirs in NAMES.items()})
            log = Log(kept_rows(con, "raw_events", chosen, file), file.name, NAMES, EVENT_TYPES)
        parts = sorted(folder.glob("item_properties_part*.csv"))
        items = _items(con, parts, folder / "category_tree.csv") if parts else None
        return Tables(log.events(), items, None, has_time=True)


def _items(con: ibis.BaseBackend, parts: list[Path], tree: Path) -> ibis.Table:
    """Return item_id, category and, where the tree is there, parent_category."""
    import ibis

    with reading(parts[0].parent):
        tables = [delimited(con, part) for part in parts]
        properties = ibis.union(*tables) if len(tables) > 1 else tables[0]
        category = properties.filter(properties.property == "categoryid")
        # Of equal times the category that sorts first counts, so that every run agrees.
        order = [category.timestamp.cast("int64").desc(), category.value]
        ranked = category.select(
            item_id=category.itemid,
            category=category.value,
            place=ibis.row_number().over(group_by=category.itemid, order_by=order),
        )
        newest = ranked.filter(ranked.place == 0).drop("place")
        items = con.create_table("raw_items", newest, temp=True)
        if not tree.is_file():
            return items
        parents = delimited(con, tree).rename(category="categoryid", parent_category="parentid")
        return items.left_join(parents, "category").drop("category_right")
