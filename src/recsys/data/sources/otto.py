"""OTTO: one JSON object a line, a session with its clicks, carts and orders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.sources import Tables
from recsys.data.sources.canonical import Log
from recsys.data.sources.files import existing, first_json, json_lines, kept_rows
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis

COLUMNS = {
    "session": "VARCHAR",
    "events": "STRUCT(aid VARCHAR, ts VARCHAR, type VARCHAR)[]",
}
EVENT_TYPES = {"clicks": "view", "carts": "cart", "orders": "purchase"}
EVENTS_A_LINE = 1 << 20


@dataclass(frozen=True)
class Otto:
    """`otto-recsys-train.jsonl` or `-test.jsonl`, also `.gz`; a session stands for a user."""

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read every session's events; those at one moment keep the order of the line."""
        file = existing(path)
        if not set(COLUMNS) <= set(keys := first_json(file)):
            raise InputError(f"{file}: expected keys session, events; found {', '.join(keys)}")
        lines = kept_rows(con, "raw_events", json_lines(con, file, COLUMNS), file)
        events = lines.unnest("events", offset="place")
        log = events.select(
            user_id=events.session,
            item_id=events.events["aid"],
            timestamp=events.events["ts"],
            event_type=events.events["type"],
            row=events.row * EVENTS_A_LINE + events.place,
        )
        names = {"user_id": "session", "item_id": "aid", "timestamp": "ts", "event_type": "type"}
        return Tables(
            Log(log, file.name, names, EVENT_TYPES, EVENTS_A_LINE).events(), None, None, True
        )
