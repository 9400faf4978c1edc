"""Impressions within `prepare`: what was shown, to whom and when, and what came of it.

Checked column by column, joined with the vocabularies and sorted by DuckDB, which spills past its
limit; a row is an item shown, and rows with one `request_id` are one request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.features import _kind, typed
from recsys.data.sources.canonical import Log, first
from recsys.schema import DWELL, EVENT_TYPES, InputError, suggestion

if TYPE_CHECKING:
    import ibis.expr.types as ir

LABELS = (*EVENT_TYPES, "like", "click", DWELL)
"""Columns that are labels without being declared."""
KEYS = ("user_id", "item_id", "timestamp", "request_id", "position", "propensity", "part", "row")
PARTS = ("train", "validation", "test")
WRITTEN = {
    "user": pa.int32(),
    "item": pa.int32(),
    "timestamp": pa.int64(),
    "request": pa.int64(),
    "position": pa.int32(),
    "propensity": pa.float32(),
    "part": pa.int8(),
}
"""The columns that `impressions.parquet` begins with; labels and context follow."""
TAKEN = (*WRITTEN, "first", "rank", "index", "count", "train_count")
"""Names that no column of the context can have."""


class Shown(NamedTuple):
    """Checked impressions: KEYS, then labels as float32, then context, each of its kind's type."""

    table: ibis.Table
    labels: tuple[str, ...]
    kinds: dict[str, str]
    has_requests: bool
    has_parts: bool


def checked(
    table: ibis.Table,
    labels: Sequence[str],
    declared: Mapping[str, str],
    keep: Callable[[str, ibis.Table], ibis.Table],
) -> Shown:
    """Check a source's impressions, row by row; raise InputError naming the first bad one.

    labels: `Tables.labels`. declared: context column → kind, where the guess from its type is
    wrong. keep: computes a table once.
    """
    if "row" not in table.columns:
        table = keep("numbered_impressions", table.mutate(row=ibis.row_number()))
    if not first(table.select("row")):
        raise InputError("impressions: none in it, only a header or nothing; leave the file out")
    chosen = _label_names(table, labels)
    kinds = _context_kinds(table, chosen, declared)
    known = _Impressions(table, "impressions").known(chosen, kinds)
    has = ("request_id" in table.columns, "part" in table.columns)
    return Shown(keep("impressions", known), chosen, kinds, *has)


def _label_names(table: ibis.Table, declared: Sequence[str]) -> tuple[str, ...]:
    found = [name for name in table.columns if name not in KEYS]
    for name in declared:
        if name not in found:
            raise InputError(
                f"impressions: no label column {name!r}; found {', '.join(found)}"
                + suggestion(name, found)
            )
    chosen = tuple(declared) or tuple(name for name in LABELS if name in found)
    if not chosen:
        raise InputError(
            f"impressions: no label column, so nothing to learn; found {', '.join(found)}, "
            f"expected one of {', '.join(LABELS)}. Name yours with data.source.labels=[COLUMN]"
        )
    return chosen


def _context_kinds(
    table: ibis.Table, labels: tuple[str, ...], declared: Mapping[str, str]
) -> dict[str, str]:
    """Return column → kind of every column that is neither a key nor a label."""
    schema = {name: dtype for name, dtype in table.schema().items() if name not in (*KEYS, *labels)}
    for name in declared:
        if name not in schema:
            raise InputError(
                f"data.request_features.{name}: no such column of the impressions; found "
                f"{', '.join(schema) or 'none'}{suggestion(name, schema)}"
            )
    if reserved := [name for name in schema if name in TAKEN]:
        raise InputError(
            f"impressions: column {reserved[0]!r} is a name of recsys's own; rename it"
        )
    return {name: _kind(name, dtype, declared.get(name)) for name, dtype in schema.items()}


@dataclass(frozen=True)
class _Impressions(Log):
    """Raw impressions, refused or cast column by column."""

    def known(self, labels: Sequence[str], kinds: Mapping[str, str]) -> ir.Table:
        """Return all columns checked, absent keys as nulls."""
        for name, kind in kinds.items():
            self._check_context(name, kind)
        table = self._typed(kinds)
        return table.select(
            **{name: self._id(name) for name in ("user_id", "item_id", "request_id")},
            timestamp=self._moments(),
            position=self._position(),
            propensity=self._propensity(),
            part=self._part(),
            row=self.table.row.cast("int64"),
            **{name: self._label(name) for name in labels},
            **{name: table[name] for name in kinds},
        )

    def _typed(self, kinds: Mapping[str, str]) -> ir.Table:
        """Cast context to the types of its kinds; truth values stay, as requests hold them."""
        truths = [n for n in kinds if kinds[n] == "numeric" and self.table[n].type().is_boolean()]
        return typed(self.table, {n: kind for n, kind in kinds.items() if n not in truths})

    def _id(self, column: str) -> ir.Value:
        if column not in self.table.columns:
            return ibis.null("string")
        ids = self.table[column]
        if not (ids.type().is_string() or ids.type().is_integer() or ids.type().is_null()):
            raise InputError(
                f"{self.place}: column {column!r} is {ids.type()}; ids are text or whole numbers, "
                "null where unknown. Cast it in the file"
            )
        return ids.cast("string").nullif("")

    def _moments(self) -> ir.Value:
        self._refuse("timestamp", self.table.timestamp.isnull(), "every impression needs a time")
        return self.table.timestamp.cast("int64")

    def _position(self) -> ir.Value:
        places = self._number("position")
        wrong = ~places.between(0, 2**31 - 1) | (places != places.floor())
        self._refuse_number("position", places, wrong, "expected a whole number, 0 for the first")
        return places.cast("int32")

    def _propensity(self) -> ir.Value:
        chance = self._number("propensity")
        wrong = ~((chance > 0) & (chance <= 1))
        self._refuse_number(
            "propensity", chance, wrong, "expected a chance above 0 and up to 1, or nothing"
        )
        return chance.cast("float32")

    def _part(self) -> ir.Value:
        if "part" not in self.table.columns:
            return ibis.null("int8")
        part = self.table.part
        wrong = part.isnull() | ~part.isin(PARTS)
        self._refuse("part", wrong, f"expected one of {', '.join(PARTS)} in every row")
        return part.cases(*[(name, code) for code, name in enumerate(PARTS)]).cast("int8")

    def _label(self, name: str) -> ir.Value:
        label = self._number(name)
        if name == DWELL:
            wrong, expected = ~label.between(0, 1e9), "expected seconds, 0 or more"
        else:
            wrong, expected = ~label.isin([0, 1]), "expected 0 or 1"
        self._refuse_number(name, label, wrong, f"{expected}, or nothing where it is not known")
        return label.cast("float32")

    def _check_context(self, name: str, kind: str) -> None:
        if kind == "numeric" and self.table[name].type().is_floating():
            wrong = self.table[name].isnan() | self.table[name].isinf()
            self._refuse(name, wrong, "expected a finite number, or nothing where it is not known")

    def _number(self, name: str) -> ir.Value:
        """Return a column as numbers, null where it has none or says NaN."""
        if name not in self.table.columns:
            return ibis.null("float64")
        met = self.table[name]
        kind = met.type()
        if not (kind.is_numeric() or kind.is_boolean() or kind.is_string() or kind.is_null()):
            raise InputError(f"{self.place}: column {name!r} is {kind}; expected numbers")
        number = met.try_cast("float64") if kind.is_string() else met.cast("float64")
        return ibis.ifelse(number.isnan(), ibis.null("float64"), number)

    def _refuse_number(self, name: str, number: ir.Value, wrong: ir.Value, expected: str) -> None:
        if name not in self.table.columns:
            return
        met = self.table[name]
        if met.type().is_string():
            wrong = wrong | (number.isnull() & met.notnull() & (met.lower() != "nan"))
        self._refuse(name, wrong, expected)


def write_impressions(
    shown: Shown,
    users: ibis.Table,
    items: ibis.Table,
    file: Path,
    keep: Callable[[str, ibis.Table], ibis.Table],
    stream: Callable[[ibis.Table], Iterable[pa.RecordBatch]],
) -> dict[str, Any]:
    """Write `impressions.parquet`, sorted by (timestamp, request, position); return its facts.

    users: `user_id` and `rank` (the row). items: `item_id` and `index`. A request has the time of
    its first row. Raises InputError where rows of one request differ in user or context.
    """
    timed = _with_requests(shown, keep)
    coded = timed.left_join(users, "user_id").left_join(items, "item_id")
    ordered = coded.select(
        "first",
        "timestamp",
        "position",
        "propensity",
        "part",
        *shown.labels,
        *shown.kinds,
        user=coded["rank"].fill_null(-1).cast("int32"),
        item=coded["index"].fill_null(0).cast("int32"),
        row=coded["row"],
    ).order_by("timestamp", "first", "position", "row")
    names = (*WRITTEN, *shown.labels, *shown.kinds)
    rows, requests = _written(_numbered(stream(ordered.drop("row")), names), file)
    facts = {"parts": shown.has_parts, "labels": list(shown.labels), "context": shown.kinds}
    return {"rows": rows, "requests": requests, **facts}


def _with_requests(shown: Shown, keep: Callable[[str, ibis.Table], ibis.Table]) -> ibis.Table:
    """Give each row `first`, the first row of its request, and that request's time."""
    table = shown.table
    if not shown.has_requests:
        return table.mutate(first=table.row)
    requests = keep("requests", _requests(shown))
    _refuse_mixed(requests, shown)
    whole = requests.select("request_id", recsys_time="timestamp", recsys_first="first")
    marked = table.left_join(whole, "request_id")
    return marked.select(
        *[name for name in table.columns if name != "timestamp"],
        timestamp=ibis.coalesce(marked.recsys_time, marked.timestamp),
        first=ibis.coalesce(marked.recsys_first, marked.row),
    )


def _requests(shown: Shown) -> ir.Table:
    """Return time and first row of each request, and for each context column whether it differs."""
    table = shown.table.filter(shown.table.request_id.notnull())

    def differs(name: str) -> ir.Value:
        met = table[name].cast("string") if not table[name].type().is_numeric() else table[name]
        some = (met.count() > 0) & (met.count() < table.count())
        return (met.min() != met.max()).fill_null(False) | some

    mixed = {f"mixed_{n}": differs(n) for n in ("user_id", "part", *shown.kinds)}
    return table.group_by("request_id").aggregate(
        timestamp=table.timestamp.min(), first=table.row.min(), **mixed
    )


def _refuse_mixed(requests: ibis.Table, shown: Shown) -> None:
    for name in ("user_id", "part", *shown.kinds):
        found = first(requests.filter(requests[f"mixed_{name}"]).order_by("first"))
        if found:
            raise InputError(
                f"impressions: rows of request {found['request_id']!r} differ in {name!r}; "
                "expected one value a request. Put what belongs to items into the item table, or "
                "leave the column out"
            )


def _numbered(
    batches: Iterable[pa.RecordBatch], names: Sequence[str]
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Number the requests 0, 1, … through all batches; yield each with the last number so far."""
    last, number = -1, -1
    for batch in batches:
        firsts = batch.column("first").to_numpy()
        starts = np.diff(firsts, prepend=last) != 0
        requests = number + np.cumsum(starts)
        last, number = int(firsts[-1]), int(requests[-1])
        columns = {name: batch.column(name) for name in names if name != "request"}
        columns["request"] = pa.array(requests)
        arrays = [columns[name].cast(WRITTEN.get(name, columns[name].type)) for name in names]
        yield pa.RecordBatch.from_arrays(arrays, list(names)), number


def _written(numbered: Iterable[tuple[pa.RecordBatch, int]], file: Path) -> tuple[int, int]:
    """Write all batches; return how many rows and requests there are."""
    rows, requests, writer = 0, 0, None
    for batch, number in numbered:
        writer = writer or pq.ParquetWriter(file, batch.schema)
        writer.write_batch(batch)
        rows, requests = rows + len(batch), number + 1
    assert writer is not None, f"{file}: checked impressions have rows"
    writer.close()
    return rows, requests
