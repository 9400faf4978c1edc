"""Context of a request as it comes over the wire: plain values or lists, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.schema import InputError

EXPECTED = {
    "text": ((str,), "text"),
    "whole": ((int,), "a whole number"),
    "truth": ((bool,), "true or false"),
    "number": ((int, float), "a number"),
}
"""Wire kind → the types that it may come as, and its name."""
LISTS = {
    "text": ((list,), "a list of text"),
    "whole": ((list,), "a list of whole numbers"),
    "truth": ((list,), "a list of truth values"),
}
"""The same of a multi-valued column, by the wire kind of its values."""
CALLED = {str: "text", int: "a number", float: "a number", bool: "a truth value", list: "a list"}


def wire(dtype: pa.DataType) -> str:
    """Return how values of a training column come in a request: a key of `EXPECTED`.

    >>> wire(pa.string()), wire(pa.int8())
    ('text', 'whole')
    """
    if pa.types.is_boolean(dtype):
        return "truth"
    if pa.types.is_integer(dtype):
        return "whole"
    return "number" if pa.types.is_floating(dtype) or pa.types.is_decimal(dtype) else "text"


def context_texts(name: str, values: Sequence[Any], kind: str) -> list[str | None]:
    """Return a categorical column's values as text, written as Arrow writes them.

    >>> context_texts("device", [7], "text")
    Traceback (most recent call last):
    recsys.schema.InputError: context.device: 7 is a number, expected text
    """
    return [None if value is None else _text(name, value, kind) for value in values]


def context_lists(name: str, values: Sequence[Any], kind: str) -> list[list[str]]:
    """Return a multi-valued column's lists, of text and without what is missing.

    >>> context_lists("genres", [["x", None, "y"], None], "text")
    [['x', 'y'], []]
    >>> context_lists("genres", ["x"], "text")
    Traceback (most recent call last):
    recsys.schema.InputError: context.genres: 'x' is text, expected a list of text
    """
    return [[] if value is None else _texts(name, value, kind) for value in values]


def _texts(name: str, value: Any, kind: str) -> list[str]:
    _check(name, value, *LISTS[kind])
    there = [(place, one) for place, one in enumerate(value) if one is not None]
    return [_text(f"{name}[{place}]", one, kind) for place, one in there]


def _text(name: str, value: Any, kind: str) -> str:
    _check(name, value, *EXPECTED[kind])
    if kind == "whole" and not -(2**63) <= value < 2**63:
        raise InputError(f"context.{name}: {_shown(value)} is too large, expected 64 bits")
    return str(value).lower() if kind == "truth" else str(value)


def context_numbers(name: str, values: Sequence[Any], kind: str) -> NDArray[np.float64]:
    """Return a numeric column's values as float64 [B]; None is missing (NaN)."""
    number = "truth" if kind == "truth" else "number"
    return np.array([_number(name, value, number) for value in values], np.float64)


def _number(name: str, value: Any, kind: str) -> float:
    if value is None:
        return math.nan
    _check(name, value, *EXPECTED[kind])
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"context.{name}: {_shown(value)} is not finite, expected a number")
    return number


def _check(name: str, value: Any, types: tuple[type, ...], expected: str) -> None:
    # By type itself: to Python, True is also an int.
    if type(value) not in types:
        met = CALLED.get(type(value), "an object")
        raise InputError(f"context.{name}: {_shown(value)} is {met}, expected {expected}")


def _shown(value: Any) -> str:
    """Return a value as the message shows it: cut, as a request may hold anything."""
    try:
        shown = repr(value)
    except ValueError:
        return "a number of thousands of digits"  # Python refuses to write those out
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
