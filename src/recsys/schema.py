"""The event, item and user tables: columns, event types, and the error a user can get wrong."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

EVENT_TYPES = ("view", "favourite", "cart", "purchase")
"""Known event types, weakest first; a type's code is its place here plus one (0 is padding)."""

DWELL = "dwell"
"""The one task that is no yes or no: seconds looked at, learned as log1p."""

EVENT_COLUMNS = ("user_id", "item_id", "timestamp")
PAD = 0
"""Index of padding: real items and users count from 1."""


class InputError(ValueError):
    """A user gave something wrong; the message says what was met, expected, and the next step."""


def type_code(name: str) -> int:
    """Return the code of an event type.

    >>> type_code("view"), type_code("purchase")
    (1, 4)
    """
    if name not in EVENT_TYPES:
        raise InputError(
            f"unknown event type {name!r}; expected one of {', '.join(EVENT_TYPES)}"
            + suggestion(name, EVENT_TYPES)
        )
    return EVENT_TYPES.index(name) + 1


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known name, or nothing.

    >>> suggestion("vew", EVENT_TYPES)
    "; did you mean 'view'?"
    >>> suggestion("zzz", EVENT_TYPES)
    ''
    """
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
