"""Check a raw log column by column and turn it into the event table, naming the first bad row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import ibis

from recsys.data.sources.files import reading
from recsys.schema import EVENT_TYPES, InputError, suggestion, type_code

if TYPE_CHECKING:
    import ibis.expr.types as ir

EARLIEST = 315_532_800
LATEST = 4_102_444_800
"""1980 and 2100 in seconds: a time outside them is nonsense, and units cannot be confused."""
PER_SECOND = {
    "seconds": 1,
    "milliseconds": 1_000,
    "microseconds": 1_000_000,
    "nanoseconds": 1_000_000_000,
}
LARGEST = 3.4e38
"""About the largest float32; infinity is beyond it."""
TIME_HELP = (
    "expected seconds, milliseconds or microseconds since 1970, or ISO 8601 text such as "
    "2024-05-31T18:00:00Z, between 1980 and 2100"
)


@ibis.udf.scalar.builtin
def epoch_ms(moment: datetime) -> int:  # type: ignore[empty-body]
    """Milliseconds since 1970 of a timestamp (DuckDB's own function)."""


@ibis.udf.scalar.builtin
def unix_millis(moment: datetime) -> int:  # type: ignore[empty-body]
    """Milliseconds since 1970 of a timestamp (Spark's own function)."""


MILLISECONDS_OF = {"duckdb": epoch_ms, "pyspark": unix_millis}


class Checked(NamedTuple):
    """A value of our table, and where the column that it comes from is wrong."""

    value: ir.Value
    column: str
    wrong: ir.BooleanValue
    expected: str
    more: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Log:
    """A raw log: columns named as ours, in whatever types they came, and `row` counted from 0.

    place: what to call the file in messages. names: our name → the file's own name, for messages.
    rows_a_line: `row // rows_a_line` is the line, where one line holds several events.
    """

    table: ir.Table
    place: str
    names: Mapping[str, str] = field(default_factory=dict)
    event_types: Mapping[str, str] = field(default_factory=dict)
    rows_a_line: int = 1

    def events(self) -> ir.Table:
        """Return the checked event table: ids text, time in milliseconds, known event types.

        Raises InputError naming the first bad row and what was expected there.
        """
        with reading(self.place):
            found = {
                "user_id": self._ids("user_id"),
                "item_id": self._ids("item_id"),
                "timestamp": self._times(),
                "event_type": self._types(),
                "value": self._values(),
            }
            self.check([one for one in found.values() if isinstance(one, Checked)])
            values = {k: v.value if isinstance(v, Checked) else v for k, v in found.items()}
            return self.table.select(**values, row=self.table.row)

    def check(self, all_: Sequence[Checked]) -> None:
        """Raise InputError naming the first bad row of a column; the log is read once for all."""
        wrong = {one.column: one.wrong.any() for one in all_}
        met = first(self.table.aggregate(rows=self.table.count(), **wrong))
        if not met or not met["rows"]:
            raise InputError(f"{self.place}: no events in it, only a header or nothing")
        for one in all_:
            if met[one.column]:
                self._refuse(one.column, one.wrong, one.expected, one.more)

    def times(self) -> ir.Value:
        """Return times in milliseconds, or places where there are none; raise InputError."""
        found = self._times()
        if not isinstance(found, Checked):
            return found
        self.check([found])
        return found.value

    def _ids(self, column: str) -> Checked:
        ids = self.table[column]
        if not (ids.type().is_string() or ids.type().is_integer()):
            raise InputError(
                f"{self.place}: column {self._name(column)!r} is {ids.type()}; ids are text or "
                "whole numbers. Cast it in the file"
            )
        text = ids.cast("string")
        empty = text.isnull() if ids.type().is_integer() else text.isnull() | (text == "")
        return Checked(
            text, column, empty, "every event needs one; give it one or leave the row out"
        )

    def _times(self) -> Checked | ir.Value:
        if "timestamp" not in self.table.columns:
            return self.table.row
        times = _milliseconds(self.table, self.table.timestamp)
        if times is None:
            raise InputError(
                f"{self.place}: column {self._name('timestamp')!r} is "
                f"{self.table.timestamp.type()}; {TIME_HELP}"
            )
        return Checked(times, "timestamp", times.isnull(), TIME_HELP)

    def _types(self) -> Checked | ir.Value:
        if "event_type" not in self.table.columns:
            return ibis.literal(EVENT_TYPES[0])
        for ours in self.event_types.values():
            type_code(ours)
        known = {name: name for name in EVENT_TYPES} | {
            str(theirs): ours for theirs, ours in self.event_types.items()
        }
        theirs = self.table.event_type.cast("string")
        return Checked(
            theirs.cases(*known.items(), else_=ibis.null("string")),
            "event_type",
            theirs.isnull() | ~theirs.isin(list(known)),
            f"known are {', '.join(known)}",
            lambda met: (
                f"{suggestion(str(met), known)}. "
                f"Map it with +data.source.event_types.{met}={EVENT_TYPES[0]}"
            ),
        )

    def _values(self) -> Checked | ir.Value:
        if "value" not in self.table.columns:
            return ibis.null("float32")
        met = self.table.value
        number = met.try_cast("float64") if met.type().is_string() else met.cast("float64")
        wrong = number.isnull() | number.isnan() | ~number.between(-LARGEST, LARGEST)
        return Checked(
            number.cast("float32"),
            "value",
            met.notnull() & wrong,
            "expected a finite number, or nothing",
        )

    def _refuse(
        self,
        column: str,
        wrong: ir.BooleanValue,
        expected: str,
        more: Callable[[Any], str] | None = None,
    ) -> None:
        bad = self.table.filter(wrong).select("row", met=self.table[column])
        found = first(bad.order_by("row").limit(1))
        if found:
            line = found["row"] // self.rows_a_line + 1
            met = "empty" if found["met"] in (None, "") else repr(found["met"])
            hint = more(found["met"]) if more and met != "empty" else ""
            raise InputError(
                f"{self.place}: row {line}: {self._name(column)} is {met}; {expected}{hint}"
            )

    def _name(self, column: str) -> str:
        return self.names.get(column, column)


def first(table: ir.Table) -> dict[str, Any] | None:
    """Return the first row of a table, or nothing."""
    rows = table.limit(1).to_pyarrow().to_pylist()
    return rows[0] if rows else None


def number(value: ir.Scalar) -> int:
    """Return a whole number, 0 where there is none."""
    return int(value.to_pyarrow().as_py() or 0)


def _milliseconds(table: ir.Table, times: ir.Value) -> ir.Value | None:
    """Return `times` in milliseconds, null where they are nonsense; None for a hopeless type."""
    kind = times.type()
    if kind.is_timestamp() or kind.is_date():
        return _of_moment(times)
    if kind.is_integer():
        return _of_number(table, times.cast("int64"))
    if kind.is_floating() or kind.is_decimal():
        return _of_number(table, times.cast("float64"))
    if not kind.is_string():
        return None
    number, moment = times.try_cast("float64"), times.try_cast("timestamp('UTC')")
    forms = first(table.aggregate(numbers=number.count(), moments=moment.count()))
    assert forms is not None
    return _of_moment(moment) if forms["moments"] > forms["numbers"] else _of_number(table, number)


def _of_moment(moments: ir.Value) -> ir.Value:
    milliseconds = MILLISECONDS_OF[moments.get_backend().name]
    return _sensible(milliseconds(moments.cast("timestamp(6)")), PER_SECOND["milliseconds"])


def _of_number(table: ir.Table, numbers: ir.Value) -> ir.Value:
    """Scale numbers by the unit that most rows are in; another unit's are out of its range."""
    counts = first(
        table.aggregate(
            **{unit: _is_sensible(numbers, scale).sum() for unit, scale in PER_SECOND.items()}
        )
    )
    assert counts is not None
    scale = PER_SECOND[max(PER_SECOND, key=lambda unit: counts[unit] or 0)]
    # Nonsense becomes null before the cast: DuckDB refuses to cast NaN without saying which row.
    sensible = _sensible(numbers, scale)
    if scale > 1_000:
        return (sensible / (scale // 1_000)).floor().cast("int64")
    return (sensible * (1_000 // scale)).round().cast("int64")


def _sensible(numbers: ir.Value, scale: int) -> ir.Value:
    return ibis.ifelse(_is_sensible(numbers, scale), numbers, ibis.null(numbers.type()))


def _is_sensible(numbers: ir.Value, scale: int) -> ir.BooleanValue:
    inside = numbers.between(EARLIEST * scale, LATEST * scale)
    # DuckDB 2.0 finds NaN between any two numbers.
    return inside & ~numbers.isnan() if numbers.type().is_floating() else inside
