"""Where tables that grow with the log are computed: DuckDB, which spills past its limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.settings import PrepareSettings
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis
    import pyarrow as pa

CHUNK = 1_000_000
"""Events held in Python at a time."""


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
