"""Small readers, one a format, that all end in the same event table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from recsys.data.sources.parts import Part

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
    impressions: what was shown, a row an item: `user_id`, `item_id` string or null, `timestamp`
    int64 as that of events, optionally `request_id` string, `position` (0 is the first place),
    `propensity`, `row` int64, `part` (train, validation or test, where the publisher split it); the
    label columns; every other column is context of the request.
    labels: which columns of impressions are labels; () for those with a name in
    `impressions.LABELS`.
    dropped_requests: how many requests of impressions the source left out, by reason.
    skipped: files and parts of files that could not be read and were left out.
    blaming: to read the events in, so that a file which cannot be read is named.
    columns: our name of each column that the log has → what is in it, `untyped` for text files;
    empty for a source whose columns cannot change from one day to the next.
    """

    events: ibis.Table
    items: ibis.Table | None
    users: ibis.Table | None
    has_time: bool
    dropped: Mapping[str, int] = MappingProxyType({})
    impressions: ibis.Table | None = None
    labels: Sequence[str] = ()
    dropped_requests: Mapping[str, int] = MappingProxyType({})
    skipped: Sequence[str] = ()
    blaming: Callable[[], AbstractContextManager[None]] = nullcontext
    columns: Mapping[str, str] = MappingProxyType({})


def no_events() -> ibis.Table:
    """Return an event table with no rows, for a log of impressions alone."""
    import ibis
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    kinds = {"user_id": text, "item_id": text, "timestamp": whole, "event_type": text}
    schema = pa.schema(kinds | {"value": pa.float32(), "row": whole})
    return ibis.memtable(schema.empty_table())


class Source(Protocol):
    """A small dataclass whose fields are the `source:` settings of its YAML."""

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read what is at `path` through the DuckDB connection `con`.

        `scratch` is a folder that lives until the dataset is prepared. Raises InputError.
        """
        ...


OpenParquet = Callable[[Sequence[Part], Sequence[str]], "ibis.Table"]
"""Opens columns of Parquet files as one table with ROW, the place through all of them."""


@runtime_checkable
class ReadsParquet(Source, Protocol):
    """A source whose events may be read by another engine than `con`."""

    def read_with(
        self, con: ibis.BaseBackend, parquet: OpenParquet, path: Path | None, scratch: Path
    ) -> Tables:
        """Read as `read` does, but events in Parquet through `parquet`."""
        ...
