"""What came next in the log: how probable a candidate is after what the path did last.

Shapes: B requests, C candidates, N items, E events, P pairs, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from recsys.schema import EVENT_TYPES

Ints = NDArray[np.int64]
TYPES = len(EVENT_TYPES) + 1
DAYS = 1 << 13
"""Days that a log may span, twenty-two years; what is older counts as of its first day."""
PARTS = ("pairs", "counts", "starts", "keys", "before", "firsts", "shares")


LEAST = 1e-6
"""Shares under this count as this, since their logarithm is read."""


class Transition(NamedTuple):
    """A declared statistic: what came next among items of one value of field `by`, or any."""

    name: str
    by: str | None
    prior: float


class Transitions(Protocol):
    """Says how probable items are after events."""

    def chances(self, after_BC: Ints, candidates_BC: Ints, now_B: Ints) -> NDArray[np.float64]:
        """Return how often `candidates` came next after `after_code`s: shares, smoothed.

        Of what came next since the candidate was first met, so that new items are not thought rare.
        """
        ...


def after_code(items: NDArray[np.integer], types: NDArray[np.integer]) -> Ints:
    """Return one number for an event's item and type: what comes next depends on both.

    >>> after_code(np.array([0, 7]), np.array([0, 1])).tolist()
    [0, 36]
    """
    return np.asarray(items, np.int64) * TYPES + types


def smoothed(
    count: NDArray[Any], total: NDArray[Any], share: NDArray[Any], prior: float
) -> NDArray[np.float64]:
    """Return (count + prior * share) / (total + prior).

    >>> smoothed(np.array([3]), np.array([4]), np.array([0.1]), prior=10)
    array([0.28571429])
    """
    chance: NDArray[np.float64] = (count + prior * share) / (total + prior)
    return chance


def log_share(share: NDArray[Any]) -> NDArray[Any]:
    """Return the logarithm of shares; NaN stays."""
    logarithm: NDArray[Any] = np.log(np.maximum(share, LEAST))
    return logarithm


@dataclass(frozen=True)
class DailyCounts:
    """How often each of some keys was met by day.

    keys: int64 [K], key × `DAYS` + day, rising; before: int64 [K + 1], how many in all before each.
    """

    keys: Ints
    before: Ints

    @classmethod
    def of(cls, key_E: Ints, day_E: Ints) -> DailyCounts:
        """Count events [E], each with a key and a day from 0.

        >>> counts = DailyCounts.of(np.array([5, 5, 7, 5]), np.array([0, 2, 2, 2]))
        >>> counts.between(np.array([5, 5, 7]), 1, np.array([2, 3, 9])).tolist()
        [0, 2, 1]
        """
        keys, counts = np.unique(key_E * DAYS + day_E, return_counts=True)
        return cls(keys, np.concatenate([[0], np.cumsum(counts)]))

    def between(self, key: Ints, first: Ints | int, last: Ints | int) -> Ints:
        """Return how often each key was met from the day `first` on and before `last`."""
        ends = (self.keys.searchsorted(key * DAYS + day) for day in (first, last))
        start, end = (self.before[at] for at in ends)
        return np.maximum(end - start, 0)


@dataclass(frozen=True)
class Followed:
    """How often what came next after what, as of one moment: what a bundle keeps.

    pairs: int64 [P + 1], `after_code` × (N + 1) + next item, rising, the last is no pair; counts
    int64 [P + 1]; starts: int64 [(N + 1) × `TYPES` + 1], how often anything came after all codes
    under each; keys, before: the same by day, see `DailyCounts`; firsts int64 [N + 1]: the day on
    which each item was first met; shares float32 [N + 1]: of all that came next since among items
    with the same value.
    """

    pairs: Ints
    counts: Ints
    starts: Ints
    keys: Ints
    before: Ints
    firsts: Ints
    shares: NDArray[np.float32]
    prior: float

    def chances(self, after_BC: Ints, candidates_BC: Ints, now_B: Ints) -> NDArray[np.float64]:
        """Return the candidates' chances [B, C], whenever `now` is."""
        wanted = after_BC * len(self.shares) + candidates_BC
        at = self.pairs.searchsorted(wanted)
        count = np.where(self.pairs[at] == wanted, self.counts[at], 0)
        total = self.starts[after_BC + 1] - self._before_met(after_BC, self.firsts[candidates_BC])
        return smoothed(count, total, self.shares[candidates_BC], self.prior)

    def _before_met(self, after_BC: Ints, first_BC: Ints) -> Ints:
        """Return how often anything came after all codes under each, and before the first days.

        Most items were met on the log's first day, and need no search.
        """
        before_BC, late_BC = self.starts[after_BC], first_BC > self._start
        at = self.keys.searchsorted(after_BC[late_BC] * DAYS + first_BC[late_BC])
        before_BC[late_BC] = self.before[at]
        return before_BC

    @cached_property
    def _start(self) -> int:
        return int(self.firsts.min())


def kept(transitions: Sequence[Transitions]) -> dict[str, NDArray[Any]]:
    """Return everything that is to be kept of them, by name."""
    return {
        name: getattr(one, part)
        for place, one in enumerate(transitions)
        for name, part in _parts(place)
    }


def followed(
    declared: Sequence[Transition], read: Callable[[str], NDArray[Any]]
) -> tuple[Followed, ...]:
    """Return the transitions that were kept; `read` returns the array of a name."""
    return tuple(
        Followed(**{part: read(name) for name, part in _parts(place)}, prior=one.prior)
        for place, one in enumerate(declared)
    )


def _parts(place: int) -> list[tuple[str, str]]:
    """Return the names under which a declaration's parts are kept, by its place.

    >>> _parts(0)[0]
    ('transition_0_pairs', 'pairs')
    """
    return [(f"transition_{place}_{part}", part) for part in PARTS]
