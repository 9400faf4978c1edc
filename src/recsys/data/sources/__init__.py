"""Small readers, one a format, that all end in the same event table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import ibis


class Tables(NamedTuple):
    """What a source reads, as lazy Ibis tables.

    events: `user_id` string, `item_id` string, `timestamp` int64 (milliseconds since 1970; the
    place 0, 1, … in the user's order where `has_time` is false), `event_type` string (one of
    `schema.EVENT_TYPES`), `value` float32 or null, and optionally `row` int64, the place in the
    source, by which events of one user at one moment are ordered.
    items, users: `item_id` or `user_id` string, unique, and feature columns.
    dropped: how many events the source itself left out, by reason.
    """

    events: ibis.Table
    items: ibis.Table | None
    users: ibis.Table | None
    has_time: bool
    dropped: Mapping[str, int] = MappingProxyType({})


class Source(Protocol):
    """A small dataclass whose fields are the `source:` settings of its YAML."""

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read what is at `path` through the DuckDB connection `con`.

        `scratch` is a folder that lives until the dataset is prepared. Raises InputError.
        """
        ...
