"""Taobao's UserBehavior.csv: user, item, category, behaviour, seconds; no header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.sources import Tables
from recsys.data.sources.canonical import Log
from recsys.data.sources.files import delimited, existing, inside, kept_rows, reading

if TYPE_CHECKING:
    import ibis

NAMES = ("user_id", "item_id", "category", "event_type", "timestamp")
EVENT_TYPES = {"pv": "view", "fav": "favourite", "cart": "cart", "buy": "purchase"}


@dataclass(frozen=True)
class Taobao:
    """UserBehavior.csv, or the folder that holds it.

    first_second, last_second: the nine days that the data set's page states (Beijing time). Some
    rows carry other times, even negative ones; they are dropped and counted.
    """

    first_second: int = 1_511_539_200
    last_second: int = 1_512_316_799

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read behaviours as events; an item's category is the item table."""
        found = existing(path)
        file = inside(found, ("UserBehavior.csv",)) if found.is_dir() else found
        with reading(file):
            raw = kept_rows(con, "raw_events", delimited(con, file, names=NAMES), file)
        # A time that is not a number stays in, so that it is refused with its row.
        second = raw.timestamp.try_cast("int64")
        outside = second.notnull() & ~second.between(self.first_second, self.last_second)
        late = int(raw.filter(outside).count().to_pyarrow().as_py())
        log = Log(raw.filter(~outside).drop("category"), file.name, event_types=EVENT_TYPES)
        items = raw.group_by("item_id").aggregate(category=raw.category.max())
        return Tables(log.events(), items, None, True, {"outside_its_days": late})
