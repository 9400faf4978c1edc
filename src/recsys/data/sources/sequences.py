"""Sequence text: one user a line, `user item item …` or items only, oldest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.sources import Tables
from recsys.data.sources.files import existing, open_text, reading
from recsys.schema import EVENT_TYPES, InputError

if TYPE_CHECKING:
    import ibis

EVENTS_A_BATCH = 500_000
Line = tuple[int, str, list[str]]


@dataclass(frozen=True)
class Sequences:
    """Whitespace-separated ids, plain or `.gz`. There is an order but no time.

    has_users: whether each line begins with the user's id; else its line number (from 1) is one.
    """

    has_users: bool = True

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read the lines of `path`; blank ones are skipped."""
        import ibis

        file = existing(path)
        flat = scratch / "sequences.parquet"
        with reading(file):
            count = _write_flat(self._lines(file), flat)
        if not count:
            raise InputError(f"{file}: no events in it; expected lines of `user item item …`")
        table = con.read_parquet(str(flat))
        events = table.mutate(event_type=ibis.literal(EVENT_TYPES[0]), value=ibis.null("float32"))
        return Tables(events, None, None, has_time=False)

    def _lines(self, file: Path) -> Iterator[Line]:
        """Yield (line number, user, items), refusing a user who comes twice."""
        seen: dict[str, int] = {}
        with open_text(file) as stream:
            for number, line in enumerate(stream, start=1):
                words = line.split()
                if not words:
                    continue
                user, items = (words[0], words[1:]) if self.has_users else (str(number), words)
                _check(file.name, number, user, items, seen)
                yield number, user, items


def _check(place: str, number: int, user: str, items: list[str], seen: dict[str, int]) -> None:
    if user in seen:
        raise InputError(
            f"{place}: line {number}: user {user!r} already has line {seen[user]}; join the two, "
            "or, if lines hold items only, set data.source.has_users=false"
        )
    if not items:
        raise InputError(
            f"{place}: line {number}: user {user!r} has no items; leave the line out, or, if "
            "lines hold items only, set data.source.has_users=false"
        )
    seen[user] = number


def _write_flat(lines: Iterator[Line], file: Path) -> int:
    """Write one row an event in batches; return how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("timestamp", pa.int64()),
            ("row", pa.int64()),
        ]
    )
    total = 0
    with pq.ParquetWriter(file, schema) as writer:
        for columns in _columns(lines):
            writer.write_batch(pa.record_batch(columns, schema=schema))
            total += len(columns[0])
    return total


def _columns(lines: Iterator[Line]) -> Iterator[list[list]]:
    batch: list[list] = [[], [], [], []]
    for number, user, items in lines:
        size = len(items)
        added: list[Iterable] = [[user] * size, items, range(size), [number] * size]
        for column, values in zip(batch, added, strict=True):
            column.extend(values)
        if len(batch[0]) >= EVENTS_A_BATCH:
            yield batch
            batch = [[], [], [], []]
    if batch[0]:
        yield batch
