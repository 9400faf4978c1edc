"""Spark as the engine of `prepare`: what grows with the log, in local mode or on a cluster.

What is computed once is Parquet below the scratch folder, which the driver and every executor must
see (`data.spill`). Parquet events are read by Spark; text, JSON, feature tables and impressions by
DuckDB on the driver, which hands events over as Parquet, so that both engines parse them alike.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import sqlglot.expressions as sge
from pyarrow import types

from recsys.data.engines import CHUNK
from recsys.data.sources import ReadsParquet, Source, Tables
from recsys.data.sources.files import ROW, parquet_parts
from recsys.data.sources.parts import Part, kind_of, part_of

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from pyspark.sql import Column, DataFrame, SparkSession

WHERE = ("_metadata.file_path", "_metadata.row_index")
"""What Spark says of a row of a file."""


@dataclass(frozen=True)
class Spark:
    """Spark for what grows with the log; `local` is DuckDB on the driver for the rest."""

    local: ibis.BaseBackend
    con: ibis.BaseBackend
    scratch: Path
    numbers: dict[str, str] = field(default_factory=dict)

    @property
    def session(self) -> SparkSession:
        """The Spark session behind Ibis."""
        return self.con._session

    def read(self, source: Source, path: Path | None, scratch: Path) -> Tables:
        """Read a source by `local`, and Parquet events by Spark."""
        if isinstance(source, ReadsParquet):
            tables = source.read_with(self.local, self.parquet, path, scratch)
        else:
            tables = source.read(self.local, path, scratch)
        if tables.events.get_backend() is self.con:
            return tables
        events = tables.events
        if "row" not in events.columns:
            events = events.mutate(row=ibis.row_number())
        return tables._replace(events=self.take("read_events", events))

    def parquet(self, parts: Sequence[Part], names: Sequence[str]) -> ibis.Table:
        """Open columns of Parquet files as one table with ROW, counted through all files."""
        kinds = {name: _kind(parts, name) for name in names}
        alike: dict[tuple[str, ...], list[Path]] = {}
        for part in parts:
            schema = tuple(str(part.schema.field(name).type) for name in names)
            alike.setdefault(schema, []).append(part.file)
        frames = [self._frame(files, kinds) for files in alike.values()]
        whole = reduce(lambda one, more: one.unionByName(more), frames)
        return self._table(self._placed(whole, parts, ROW))

    def _frame(self, files: Sequence[Path], kinds: dict[str, str]) -> DataFrame:
        """Open files of one schema, their columns as `kinds`, with file and row number."""
        frame = self.session.read.parquet(*map(_literal, files))
        return frame.select(*(_cast(frame, name, kind) for name, kind in kinds.items()), *WHERE)

    def _placed(self, frame: DataFrame, parts: Sequence[Part], name: str) -> DataFrame:
        """Turn file and row number into the place through all files, in the order of `parts`."""
        from pyspark.sql import functions as F

        firsts = accumulate((part.rows for part in parts), initial=0)
        starts = dict(zip((os.path.abspath(part.file) for part in parts), firsts, strict=False))
        # Spark writes a path as a URI in its own way, so it is asked for that.
        uris = [re.sub("^file:/+", "/", uri) for uri in frame.inputFiles()]
        known = _values([(uri, starts[unquote(uri)]) for uri in uris])
        place = F.col("row_index") + F.col("recsys_start")
        columns = [column for column in frame.columns if column not in ("file_path", "row_index")]
        joined = frame.withColumn("recsys_uri", F.regexp_replace("file_path", "^file:/+", "/"))
        return joined.join(F.broadcast(self.session.sql(known)), "recsys_uri").select(
            *columns, place.alias(name)
        )

    def rowed(self, events: ibis.Table) -> ibis.Table:
        """Return the events, which `read` gave their places."""
        return events

    def keep(self, name: str, table: ibis.Table) -> ibis.Table:
        """Compute a table once, into Parquet files."""
        self._write(name, table)
        return self._table(self.session.read.parquet(_literal(self.scratch / name)))

    def numbered(
        self, name: str, table: ibis.Table, number: str, order: Sequence[ir.Value]
    ) -> ibis.Table:
        """Compute a table once, sorted, with each row's place as int32 `number`.

        A window over all rows would move them to one executor; here it is the place in the files.
        """
        from pyspark.sql import functions as F

        parts = self._write(name, table.order_by(list(order)))
        frame = self.session.read.parquet(_literal(self.scratch / name)).select("*", *WHERE)
        placed = self._placed(frame, parts, number)
        self.numbers[name] = number
        return self._table(placed.withColumn(number, F.col(number).cast("int")))

    def batches(self, table: ibis.Table) -> Iterator[pa.RecordBatch]:
        """Write a table sorted, and stream its row groups: the driver holds CHUNK rows at most."""
        parts = self._write("streamed", table)
        yield pa.RecordBatch.from_pylist([], parts[0].schema.remove_metadata())
        for part in parts:
            with pq.ParquetFile(part.file) as opened:
                for batch in opened.iter_batches(CHUNK):
                    yield batch.replace_schema_metadata()  # Spark's own
            part.file.unlink()

    def take(self, name: str, table: ibis.Table) -> ibis.Table:
        """Hand a table of `local` to Spark, as one Parquet file."""
        file = self.scratch / f"{name}.parquet"
        self.local.to_parquet(table, file)
        return self._table(self.session.read.parquet(_literal(file)))

    def here(self, name: str) -> ibis.Table:
        """Open what was kept or numbered under `name` in `local`."""
        table = parquet_parts(self.local, self._parts(name))
        number = self.numbers.get(name)
        if number is None:
            return table.drop(ROW)
        return table.mutate(**{number: table[ROW].cast("int32")}).drop(ROW)

    def _write(self, name: str, table: ibis.Table) -> list[Part]:
        """Compute a table into a folder of files, which are in its order; return them."""
        frame = self.session.sql(str(ibis.to_sql(table, dialect="pyspark")))
        frame.write.mode("overwrite").parquet(str(self.scratch / name))
        return self._parts(name)

    def _parts(self, name: str) -> list[Part]:
        return [part_of(file) for file in sorted((self.scratch / name).glob("part-*.parquet"))]

    def _table(self, frame: DataFrame) -> ibis.Table:
        name = ibis.util.gen_name("recsys")
        frame.createOrReplaceTempView(name)
        return self.con.table(name)


def _values(rows: Sequence[tuple[str, int]]) -> str:
    """Return SQL of a table of URIs and starts."""
    text = [f"({sge.Literal.string(uri).sql('spark')}, {start}L)" for uri, start in rows]
    return f"SELECT * FROM VALUES {', '.join(text)} AS t(recsys_uri, recsys_start)"


def _literal(path: Path) -> str:
    """Return a path as Spark reads it, where some characters stand for others.

    >>> _literal(Path("/logs/day[1]"))
    '/logs/day\\\\[1\\\\]'
    """
    return re.sub(r"([\\\[\]{}*?])", r"\\\1", str(path))


def _kind(parts: Sequence[Part], name: str) -> str:
    """Return the Spark type that a column has through all files; empty: as it is in the file."""
    met = [part.schema.field(name).type for part in parts]
    known = [one for one in met if not types.is_null(one)]
    if not known:
        return "string"
    if kind_of(known[0]) == "moment":
        return "timestamp"
    if kind_of(known[0]) == "text":
        return "string"
    if all(types.is_integer(one) for one in known):
        return "bigint"
    return "double" if kind_of(known[0]) == "number" else ""


def _cast(frame: DataFrame, name: str, kind: str) -> Column:
    from pyspark.sql import functions as F

    column = F.col(f"`{name}`")
    if kind == "timestamp" and dict(frame.dtypes)[name] == "bigint":
        # Spark has no nanoseconds and gives them as whole numbers.
        column = F.timestamp_micros(F.expr(f"`{name}` div 1000"))
    return (column.cast(kind) if kind else column).alias(name)
