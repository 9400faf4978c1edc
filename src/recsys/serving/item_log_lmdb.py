"""Item changes in the LMDB directory of the users' paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lmdb
from msgspec.structs import replace

from recsys.serving.item_log import Changes, ItemChange, decode, encode
from recsys.serving.state import user_hash

COUNTER = b"items"
Transaction = Callable[[], AbstractContextManager[lmdb.Transaction]]


class LmdbItemLog:
    """Changes by number, and each item's number; see `ItemLog` for what each method does."""

    every = 0.0

    def __init__(
        self, reading: Transaction, writing: Transaction, changes: Any, numbers: Any, meta: Any
    ) -> None:
        self._reading, self._writing = reading, writing
        self._changes, self._numbers, self._meta = changes, numbers, meta

    def put(self, changes: Sequence[ItemChange]) -> int:
        """Take changes in one transaction."""
        with self._writing() as txn:
            number = self._newest(txn)
            for change in changes:
                number += 1
                key, place = _key(change.item_id), _bytes(number)
                if old := txn.get(key, db=self._numbers):
                    txn.delete(bytes(old), db=self._changes)
                txn.put(place, encode(replace(change, number=number)), db=self._changes)
                txn.put(key, place, db=self._numbers)
            txn.put(COUNTER, _bytes(number), db=self._meta)
        return number

    def since(self, number: int) -> Changes:
        """Return the changes after `number`; where there are none, two microseconds."""
        with self._reading() as txn:
            newest = self._newest(txn)
            if newest <= number:
                return Changes(newest, [])
            cursor = txn.cursor(db=self._changes)
            if not cursor.set_range(_bytes(number + 1)):
                return Changes(newest, [])
            return Changes(newest, [decode(value) for _, value in cursor])

    def forget(self, changes: Sequence[ItemChange]) -> int:
        """Drop changes that are still the newest of their item."""
        dropped = 0
        with self._writing() as txn:
            for change in changes:
                key, place = _key(change.item_id), _bytes(change.number)
                if txn.get(key, db=self._numbers) == place:
                    txn.delete(key, db=self._numbers)
                    dropped += txn.delete(place, db=self._changes)
        return dropped

    def _newest(self, txn: lmdb.Transaction) -> int:
        return int.from_bytes(txn.get(COUNTER, b"", db=self._meta), "big")


def _key(item_id: str) -> bytes:
    return user_hash(item_id)  # LMDB's keys are short, ids need not be


def _bytes(number: int) -> bytes:
    return number.to_bytes(8, "big")
