"""Where tables that grow with the log are computed: DuckDB, spilling past its limit, or Spark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from recsys.data.settings import ENGINES, PrepareSettings
from recsys.data.sources import Source, Tables
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis
    import ibis.expr.types as ir
    import pyarrow as pa

CHUNK = 1_000_000
"""Events held in Python at a time."""


class Engine(Protocol):
    """Computes what grows with the log; all the rest is done by `local`, which is DuckDB.

    Events of a source, coded events and vocabularies are tables of the engine. Feature tables,
    impressions and what the dataset says of items and users are tables of `local`.
    """

    @property
    def local(self) -> ibis.BaseBackend:
        """DuckDB on this machine."""
        ...

    def read(self, source: Source, path: Path | None, scratch: Path) -> Tables:
        """Read a source: its events into this engine, its other tables into `local`."""
        ...

    def rowed(self, events: ibis.Table) -> ibis.Table:
        """Return events with `row`, their place in the source."""
        ...

    def keep(self, name: str, table: ibis.Table) -> ibis.Table:
        """Compute a table of this engine once."""
        ...

    def numbered(
        self, name: str, table: ibis.Table, number: str, order: Sequence[ir.Value]
    ) -> ibis.Table:
        """Compute a table once, with each row's place in a total order as int32 `number`."""
        ...

    def batches(self, table: ibis.Table) -> Iterator[pa.RecordBatch]:
        """Stream a table in its order, at least one batch."""
        ...

    def take(self, name: str, table: ibis.Table) -> ibis.Table:
        """Hand a table of `local` to this engine."""
        ...

    def here(self, name: str) -> ibis.Table:
        """Return a table that was kept or numbered under `name` as one of `local`."""
        ...


@dataclass(frozen=True)
class DuckDB:
    """One machine; `local` does everything."""

    local: ibis.BaseBackend

    def read(self, source: Source, path: Path | None, scratch: Path) -> Tables:
        """Read a source."""
        return source.read(self.local, path, scratch)

    def rowed(self, events: ibis.Table) -> ibis.Table:
        """Return events with `row`, their place in the source."""
        import ibis

        if "row" not in events.columns:
            return events.mutate(row=ibis.row_number())
        # The order is in `row`, so DuckDB need not keep it: less memory, all threads.
        self.local.raw_sql("SET preserve_insertion_order = false")
        return events

    def keep(self, name: str, table: ibis.Table) -> ibis.Table:
        """Compute a table once, into memory or the spill folder."""
        return keep(self.local, name, table)

    def numbered(
        self, name: str, table: ibis.Table, number: str, order: Sequence[ir.Value]
    ) -> ibis.Table:
        """Compute a table once, with each row's place in a total order as int32 `number`."""
        import ibis

        place = ibis.row_number().over(order_by=order).cast("int32")
        return self.keep(name, table.mutate(**{number: place}))

    def batches(self, table: ibis.Table) -> Iterator[pa.RecordBatch]:
        """Stream a table in its order, at least one batch."""
        return batches(self.local, table)

    def take(self, name: str, table: ibis.Table) -> ibis.Table:
        """Return the table itself."""
        return table

    def here(self, name: str) -> ibis.Table:
        """Return the table that was kept under `name`."""
        return self.local.table(name)


@contextmanager
def _duckdb(settings: PrepareSettings, scratch: Path) -> Iterator[Engine]:
    with connected(settings, scratch) as con:
        yield DuckDB(con)


@contextmanager
def _spark(settings: PrepareSettings, scratch: Path) -> Iterator[Engine]:
    from recsys.data.spark_session import opened

    with connected(settings, scratch) as local, opened(settings, scratch) as con:
        from recsys.data.spark import Spark

        yield Spark(local, con, scratch)


OPENED = {"duckdb": _duckdb, "spark": _spark}
assert set(OPENED) == set(ENGINES)


def engine_of(settings: PrepareSettings, scratch: Path) -> AbstractContextManager[Engine]:
    """Open the engine that the settings name."""
    return OPENED[settings.engine](settings, scratch)


@contextmanager
def connected(settings: PrepareSettings, scratch: Path) -> Iterator[ibis.BaseBackend]:
    """Open DuckDB with the memory limit; what does not fit spills under `scratch`."""
    import duckdb
    import ibis

    try:
        con = ibis.duckdb.connect(
            memory_limit=settings.memory_limit,
            threads=settings.threads,
            temp_directory=str(scratch / "spill"),
        )
    except duckdb.Error as error:
        raise InputError(
            f"data.memory_limit={settings.memory_limit}: expected a size such as 2GB"
        ) from error
    con.raw_sql("SET TimeZone = 'UTC'")
    con.raw_sql("SET enable_progress_bar = false")
    try:
        yield con
    finally:
        con.disconnect()


def keep(con: ibis.BaseBackend, name: str, table: ibis.Table) -> ibis.Table:
    """Compute a table once, into DuckDB's memory or its spill folder."""
    con.raw_sql(f'DROP TABLE IF EXISTS temp.main."{name}"')
    return con.create_table(name, table, temp=True)


def count(table: ibis.Table) -> int:
    """Return the number of rows."""
    return int(table.count().to_pyarrow().as_py())


def batches(con: ibis.BaseBackend, table: ibis.Table) -> Iterator[pa.RecordBatch]:
    """Stream a table as record batches of at most CHUNK rows; at least one, perhaps empty."""
    import ibis
    import pyarrow as pa

    # Ibis 12's own stream asks the cursor for a method that DuckDB 2 does not have.
    relation = con.con.sql(str(ibis.to_sql(table, dialect="duckdb")))
    stream = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch
    reader = stream(CHUNK)
    first = next(reader, None)
    yield pa.RecordBatch.from_pylist([], reader.schema) if first is None else first
    yield from reader
