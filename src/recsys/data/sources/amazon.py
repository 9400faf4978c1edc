"""Amazon reviews: ratings CSV, or the JSON lines of 2014, 2018 and 2023 with their metadata."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.sources import Tables
from recsys.data.sources.canonical import Log
from recsys.data.sources.files import (
    delimited,
    existing,
    first_json,
    json_lines,
    kept_rows,
    open_text,
    reading,
)
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis
    import ibis.expr.types as ir

OLD = {
    "user_id": "reviewerID",
    "item_id": "asin",
    "value": "overall",
    "timestamp": "unixReviewTime",
}
NEW = {
    "user_id": "user_id",
    "item_id": "parent_asin",
    "value": "rating",
    "timestamp": "timestamp",
}
ASIN_LENGTH = 10
METADATA = {
    "asin": "VARCHAR",
    "parent_asin": "VARCHAR",
    "title": "VARCHAR",
    "brand": "VARCHAR",
    "store": "VARCHAR",
    "main_cat": "VARCHAR",
    "main_category": "VARCHAR",
    "price": "VARCHAR",
    "category": "VARCHAR[]",
    "categories": "VARCHAR[]",
}


@dataclass(frozen=True)
class Amazon:
    """A reviews file (`.csv`, `.json`, `.jsonl`, each also `.gz`); the release is told by its keys.

    metadata: the item metadata file of the same release, JSON lines; null for none.
    """

    metadata: str | None = None

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read reviews as events, value being the stars; metadata as items."""
        file = existing(path)
        with reading(file):
            names, table = _csv(con, file) if ".csv" in file.suffixes else _json(con, file)
        chosen = table.select(**{ours: table[theirs] for ours, theirs in names.items()})
        log = Log(kept_rows(con, "raw_events", chosen, file), file.name, names)
        return Tables(log.events(), self._items(con), None, has_time=True)

    def _items(self, con: ibis.BaseBackend) -> ibis.Table | None:
        import ibis

        if self.metadata is None:
            return None
        file = existing(self.metadata, "data.source.metadata")
        first_json(file)
        raw = json_lines(con, file, METADATA)
        items = raw.select(
            item_id=raw.parent_asin.coalesce(raw.asin),
            title=raw.title,
            brand=raw.brand.coalesce(raw.store),
            category=raw.main_category.coalesce(raw.main_cat),
            price=_price(raw.price),
            categories=raw.categories.coalesce(raw.category),
        )
        stored = kept_rows(con, "raw_items", items, file)
        # The releases repeat some products; the first line of each counts.
        place = ibis.row_number().over(group_by=stored.item_id, order_by=stored.row)
        ranked = stored.filter(stored.item_id.notnull()).mutate(place=place)
        return ranked.filter(ranked.place == 0).drop("row", "place")


def _csv(con: ibis.BaseBackend, file: Path) -> tuple[dict[str, str], ibis.Table]:
    """Open ratings with a header (2023), or without: user first (2014) or item first (2018)."""
    with open_text(file) as stream:
        head = next(csv.reader(stream), [])
    if set(NEW.values()) <= set(head):
        return NEW, delimited(con, file)
    if len(head) != 4:
        raise InputError(
            f"{file}: expected four columns (user, item, rating, time) or a header with "
            f"{', '.join(NEW.values())}; found {', '.join(head)}"
        )
    item_first = len(head[0]) == ASIN_LENGTH and len(head[1]) != ASIN_LENGTH
    order = ("item_id", "user_id") if item_first else ("user_id", "item_id")
    names = (*order, "value", "timestamp")
    return {name: name for name in names}, delimited(con, file, names=names)


def _json(con: ibis.BaseBackend, file: Path) -> tuple[dict[str, str], ibis.Table]:
    keys = first_json(file)
    for names in (NEW, OLD):
        if set(names.values()) <= set(keys):
            return names, json_lines(con, file, dict.fromkeys(names.values(), "VARCHAR"))
    raise InputError(
        f"{file}: expected keys {', '.join(NEW.values())} (2023) or {', '.join(OLD.values())} "
        f"(2014, 2018); found {', '.join(keys)}"
    )


def _price(text: ir.StringValue) -> ir.FloatingValue:
    """Read `$1,299.99`, `12.5` or `from 3.99`; anything else is null."""
    digits = text.replace(",", "").re_extract(r"(\d+(\.\d+)?)", 1)
    return digits.try_cast("float32")
