"""Keeps a process's views of its bundles at what the item log says.

Nothing runs by itself: whoever is about to answer asks for a view, and the log is looked at first,
which costs microseconds where it is on this machine. So an item that was removed is in no answer
that is begun after that, whichever worker gives it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import takewhile
from weakref import WeakKeyDictionary

import structlog

from recsys.serving.delta import Delta, View
from recsys.serving.engine import Engine
from recsys.serving.item_log import ItemChange, ItemLog
from recsys.serving.state import StateUnavailable

log = structlog.get_logger("recsys.serving")


class ItemFeed:
    """The changes of a log, and what they make of each engine; any thread may call it."""

    def __init__(self, items: ItemLog | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.log, self.clock = items, clock
        self.newest, self.looked = 0, float("-inf")
        # The newest change of each item, in their order.
        self.changes: dict[str, ItemChange] = {}
        self.deltas: WeakKeyDictionary[Engine, tuple[int, Delta]] = WeakKeyDictionary()
        self.lock = threading.Lock()

    def view(self, engine: Engine, at_once: bool = False) -> View:
        """Return the items that `engine` is to answer with now.

        Where the log does not answer, these are the last known. at_once: look again, however
        lately that was done.
        """
        if self.log is None:
            return engine.base
        try:
            self._look(self.log, at_once)
        except StateUnavailable as error:
            log.warning("item_log_unavailable", reason=str(error))
        return self.delta(engine).view

    def delta(self, engine: Engine) -> Delta:
        """Return what the changes known so far make of a bundle."""
        found = self.deltas.get(engine)
        if found and found[0] == self.newest:
            return found[1]
        with self.lock:
            number, delta = self.deltas.get(engine) or (0, engine.unchanged)
            later = [*takewhile(lambda one: one.number > number, reversed(self.changes.values()))]
            delta = delta.changed(later[::-1]) if later else delta
            self.deltas[engine] = self.newest, delta
        return delta

    def _look(self, items: ItemLog, at_once: bool) -> None:
        if not at_once and self.clock() - self.looked < items.every:
            return
        known = self.newest
        newest, changes = items.since(known)
        self.looked = self.clock()
        if newest == known:
            return
        with self.lock:
            if newest < known:  # the store came back empty, or older
                self.changes.clear()
                self.deltas.clear()
                self.newest, changes = 0, items.since(0).changes
            for change in changes:
                if change.number > self.newest:
                    self.changes.pop(change.item_id, None)
                    self.changes[change.item_id] = change
            self.newest = max([newest, *(change.number for change in changes)])
