"""Columns of the second stage as they are declared: what each can be, and the checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from recsys.schema import EVENT_TYPES, InputError, suggestion

KINDS = {
    "item": ("categorical", "multi", "text", "numeric", "vector"),
    "user": ("categorical", "multi", "text", "numeric"),
    "request": ("categorical", "multi", "text", "numeric", "hour", "weekday"),
    "shown": ("position",),
    "path": ("count", "since", "ratio", "transition"),
    "log": ("rate",),
}
"""What a column can be, by what it is of."""
CODED = ("categorical", "multi", "text")
OPTIONS = {
    "categorical": ("column", "default", "vocabulary", "least", "hash"),
    "multi": ("column", "most", "vocabulary", "least", "hash"),
    "text": ("column", "most", "vocabulary", "least", "hash"),
    "numeric": ("column", "scale", "default"),
    "vector": ("column",),
    "count": ("by", "event"),
    "since": ("by", "event"),
    "ratio": ("by", "event"),
    "rate": ("by", "task", "prior"),
    "transition": ("by", "prior"),
}
"""What can be set for each kind, beside `of` and `kind`; the others have no options."""
NEEDED = {"count": ("by",), "since": ("by",), "ratio": ("by",), "rate": ("by", "task")}
READ_BY = {
    "count": CODED,
    "since": CODED,
    "ratio": ("numeric",),
    "rate": ("categorical",),
    "transition": ("categorical",),
}
"""Kinds of item column that `by` may name."""
BY_OTHERS = ("ratio", "transition")
"""Kinds that say nothing by the item itself."""
CHOICES = {"scale": ("quantile", "log", "standard", "none"), "event": EVENT_TYPES}
INDICES = {"item": "item_id", "user": "user_id"}
"""Columns that hold the row's own index, whatever the table says."""


@dataclass(frozen=True)
class Column:
    """One declared column: a line of `configs/features/*.yaml`.

    of, kind: see `KINDS`; column: the table's, where its name is another; scale, default: of a
    numeric one; vocabulary, least: keep so many values, and those met so often (of
    `item_id`: by the training part, in an event or shown); hash: so many
    codes instead of a vocabulary; most: places of a multi-valued or text one, for its first
    distinct values; by: which item column a statistic compares (a transition without one: any
    items); event: which events of the path it
    reads, by default all; task: which label a rate counts; prior: how many events the prior of a
    rate or a transition weighs.
    """

    name: str
    of: str
    kind: str
    column: str | None = None
    by: str | None = None
    event: str | None = None
    task: str | None = None
    scale: str = "quantile"
    most: int = 5
    hash: int | None = None
    vocabulary: int | None = None
    least: int = 1
    prior: float = 20.0
    default: float | str | None = None

    @property
    def source(self) -> str:
        """Name in the table or in the request's context."""
        return self.column or self.name

    @property
    def is_index(self) -> bool:
        """Whether it is the row's own index."""
        return INDICES.get(self.of) == self.name

    @property
    def width(self) -> int:
        """Places it takes in an array of codes."""
        return self.most if self.kind in ("multi", "text") else 1

    def as_json(self) -> dict[str, Any]:
        """Return what was declared and is not so by default, without the name."""
        usual = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if v != usual[k] and k != "name"}


def declare(columns: Mapping[str, Mapping[str, Any] | None]) -> tuple[Column, ...]:
    """Return the declared columns in their order; one that is null is left out.

    Raises InputError for an unknown word, or an option that has no effect on its column.

    >>> price = {"of": "item", "kind": "numeric", "scale": "log"}
    >>> [(column.name, column.scale) for column in declare({"price": price, "brand": None})]
    [('price', 'log')]
    """
    declared = tuple(_column(name, given) for name, given in columns.items() if given is not None)
    for column in declared:
        _check_by(column, declared)
    return declared


def _column(name: str, given: Any) -> Column:
    if not isinstance(given, Mapping):
        raise InputError(
            f"features.{name} is {given!r}; expected what it is of and its kind, as in "
            f"{name}: {{of: item, kind: categorical}}"
        )
    options = {str(key): value for key, value in given.items() if value is not None}
    of = _one_of(f"features.{name}.of", options.pop("of", None), KINDS)
    kind = _one_of(f"features.{name}.kind", options.pop("kind", None), KINDS[of])
    column = Column(name, of, kind)
    if column.is_index and kind != "categorical":
        raise InputError(f"features.{name}.kind is {kind!r}; an index is categorical")
    for option, value in options.items():
        _check_option(column, option, value)
    for option in NEEDED.get(kind, ()):
        if option not in options:
            raise InputError(f"features.{name}.{option} is missing; a {kind} needs it")
    return Column(name, of, kind, **_together(name, options))


def _one_of(place: str, value: Any, possible: Iterable[str]) -> str:
    if value not in tuple(possible):
        met = "missing" if value is None else repr(value)
        raise InputError(
            f"{place} is {met}; expected one of {', '.join(possible)}"
            + suggestion(str(value), possible)
        )
    return str(value)


def _check_option(column: Column, option: str, value: Any) -> None:
    place, known = f"features.{column.name}.{option}", OPTIONS.get(column.kind, ())
    if column.is_index and (column.of, option) != ("item", "least"):
        raise InputError(f"{place} has no effect: each {column.of} has a code of its own")
    if option not in known:
        exists = any(option in options for options in OPTIONS.values())
        met = "has no effect" if exists else "is no option"
        raise InputError(
            f"{place} {met} on kind {column.kind}, which has {', '.join(known) or 'no options'}"
            + suggestion(option, known)
        )
    expected = _expected(column.kind, option, value)
    if expected:
        raise InputError(f"{place} is {value!r}; expected {expected}")


def _expected(kind: str, option: str, value: Any) -> str:
    """Return what an option should have been, or nothing where it is right."""
    if option in CHOICES:
        wrong = f"one of {', '.join(CHOICES[option])}{suggestion(str(value), CHOICES[option])}"
        return "" if value in CHOICES[option] else wrong
    if option in ("most", "hash", "vocabulary", "least"):
        return "" if type(value) is int and value >= 1 else "a whole number, 1 or more"
    if option == "prior" or (option, kind) == ("default", "numeric"):
        right = type(value) in (int, float) and math.isfinite(value)
        right = right and (option == "default" or value > 0)
        return "" if right else "a finite number" + (" above 0" if option == "prior" else "")
    return "" if isinstance(value, str) and value else "text"


def _together(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, none of which makes another one void."""
    void = [option for option in ("vocabulary", "least") if option in options]
    if "hash" in options and void:
        raise InputError(
            f"features.{name}.{void[0]} has no effect beside hash, which keeps no vocabulary; "
            "leave one of them out"
        )
    return options


def _check_by(column: Column, declared: Sequence[Column]) -> None:
    if column.by is None or (column.by == "item_id" and column.kind not in BY_OTHERS):
        return
    kinds = READ_BY[column.kind]
    known = [c.name for c in declared if c.of == "item" and c.kind in kinds and not c.is_index]
    if column.by not in known:
        known += [] if column.kind in BY_OTHERS else ["item_id"]
        raise InputError(
            f"features.{column.name}.by is {column.by!r}; expected a declared item column that is "
            f"{' or '.join(kinds)}: {', '.join(known) or 'there is none'}"
            f"{suggestion(column.by, known) or '.'} Declare it: "
            f"{column.by}: {{of: item, kind: {kinds[0]}}}"
        )
