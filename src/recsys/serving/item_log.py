"""Which items were added or removed since a bundle was made: the newest change of each item.

Changes are numbered in their order, so that whoever knows those up to a number asks for the rest.
Both stores of users' paths keep them, and all workers and replicas that share one see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec


class ItemChange(msgspec.Struct, frozen=True, array_like=True):
    """An item added or removed; of several of one item only the newest counts.

    vector: float32 bytes, of the encoder that `space` names; like: items whose mean stands in for a
    vector, whatever the encoder; moment: milliseconds since 1970. `number` is the store's.
    """

    item_id: str
    removed: bool
    moment: int
    vector: bytes | None = None
    space: str = ""
    like: list[str] = []
    features: dict[str, Any] = {}
    by: str = ""
    number: int = 0


class Changes(NamedTuple):
    """Changes in their order, and the number of the newest that the store ever took."""

    newest: int
    changes: list[ItemChange]


class ItemLog(Protocol):
    """A store of item changes; any thread may call it.

    Every method raises StateUnavailable where the store does not answer.
    """

    every: float
    """Seconds between two looks for changes; 0: a look costs microseconds."""

    def put(self, changes: Sequence[ItemChange]) -> int:
        """Take changes, all or none; durable when this returns the number of the last."""

    def since(self, number: int) -> Changes:
        """Return the changes after `number`; a `newest` below it means that the store began anew.

        Of an item that changed twice since only the newest is there.
        """

    def forget(self, changes: Sequence[ItemChange]) -> int:
        """Drop changes that nothing came after for their item; return how many."""


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(ItemChange).decode
