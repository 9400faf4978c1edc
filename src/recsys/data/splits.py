"""Split rules: read from the config, made exact over a dataset's times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.data.dataset import leave_one_out
from recsys.schema import InputError, suggestion

CHUNK = 4_000_000
"""Events looked at together, so that memory does not grow with the log."""
DAY = 86_400_000
"""Milliseconds."""
FOREVER = -(2**63)
"""A moment before all events."""


@dataclass(frozen=True)
class LeaveOneOut:
    """Each user's last event tests, the one before it validates."""

    rule: str = "leave_one_out"

    def place(self, times: NDArray[np.int64], offsets: NDArray[np.int64]) -> dict[str, Any]:
        """Return what the manifest says of this split, or raise InputError where nothing tests."""
        longest = int(np.diff(offsets).max())
        if longest < 3:
            raise InputError(
                f"nothing to test on: the longest trajectory has {longest} events, and "
                "leave-one-out needs a user with 3. Give a longer log or lower data.min_item_events"
            )
        return asdict(self)

    def trains(
        self, items: NDArray[np.int32], times: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return how many training events each item code has: int64 [codes]."""
        size = int(items.max()) + 1
        split = leave_one_out(np.diff(offsets))
        counts = count_items(items, size)
        for places in (split.validation, split.test):
            held = (offsets[:-1] + places)[places >= 0]
            counts -= np.bincount(items[held], minlength=size)
        return counts


@dataclass(frozen=True)
class Temporal:
    """One moment for all users: the newest `test_share` of events tests, those before validate.

    With `validation_days` and `test_days`, periods counted back from the newest event instead.
    """

    validation_share: float = 0.1
    test_share: float = 0.1
    validation_days: float | None = None
    test_days: float | None = None
    rule: str = "temporal"

    def __post_init__(self) -> None:
        days = [self.validation_days, self.test_days]
        if any(one is not None for one in days) and not all(one and one > 0 for one in days):
            raise InputError(
                f"split: validation_days={self.validation_days}, test_days={self.test_days}; "
                "expected days above 0 for both, or null for both"
            )
        for name in ("validation_share", "test_share"):
            if not 0 < float(getattr(self, name)) < 1:
                raise InputError(f"split.{name}={getattr(self, name)}: expected between 0 and 1")
        if self.validation_share + self.test_share >= 1:
            raise InputError(
                f"split: validation_share={self.validation_share} and test_share="
                f"{self.test_share} leave nothing to train on; make their sum less than 1"
            )

    def place(self, times: NDArray[np.int64], offsets: NDArray[np.int64]) -> dict[str, Any]:
        """Return the rule with its two moments in milliseconds."""
        validation_from, test_from = self._moments(times)
        if not int(times.min()) < validation_from < test_from:
            said = ", ".join(f"{name}={value}" for name, value in self._chosen().items())
            raise InputError(
                f"split=temporal cannot cut {len(times)} events by {said}: too many share one "
                "moment, or none is left to train on. Choose others, give a longer log, or type "
                "split=leave_one_out"
            )
        moments = {"validation_from": validation_from, "test_from": test_from}
        return self._chosen() | {"rule": self.rule} | moments

    def _moments(self, times: NDArray[np.int64]) -> tuple[int, int]:
        if self.validation_days is None or self.test_days is None:
            shares = (1 - self.validation_share - self.test_share, 1 - self.test_share)
            first, second = (moment_at(times, int(len(times) * share)) for share in shares)
            return first, second
        end = int(times.max()) + 1
        test_from = end - round(self.test_days * DAY)
        return test_from - round(self.validation_days * DAY), test_from

    def _chosen(self) -> dict[str, float | None]:
        """Return the settings that count: days where they are given, else shares."""
        unit = "share" if self.test_days is None else "days"
        names = f"validation_{unit}", f"test_{unit}"
        return {name: getattr(self, name) for name in names}

    def trains(
        self, items: NDArray[np.int32], times: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return how many training events each item code has: int64 [codes]."""
        moment = self.place(times, offsets)["validation_from"]
        return count_items(items, int(items.max()) + 1, times, moment)


SplitRule = LeaveOneOut | Temporal
RULES: dict[str, type[LeaveOneOut] | type[Temporal]] = {
    "leave_one_out": LeaveOneOut,
    "temporal": Temporal,
}


def split_rule(settings: Mapping[str, Any]) -> SplitRule:
    """Return the rule that a split config names.

    >>> split_rule({"rule": "leave_one_out"})
    LeaveOneOut(rule='leave_one_out')
    """
    rule = str(settings.get("rule"))
    if rule not in RULES:
        raise InputError(
            f"split.rule={rule}: expected one of {', '.join(RULES)}{suggestion(rule, RULES)}"
        )
    known = RULES[rule].__dataclass_fields__
    for name in settings:
        if name not in known:
            raise InputError(
                f"split.{name}: {rule} has no such setting; it has {', '.join(known)}"
                + suggestion(str(name), known)
            )
    return RULES[rule](**{name: settings[name] for name in settings})


def rule_of(placed: Mapping[str, Any]) -> SplitRule:
    """Return the rule of a manifest, without the moments that it had there.

    >>> placed = {"rule": "temporal", "validation_days": 1, "test_days": 2, "test_from": 5}
    >>> rule_of(placed).test_days
    2
    """
    return split_rule({k: v for k, v in placed.items() if not k.endswith("_from")})


def moment_at(times: NDArray[np.int64], place: int) -> int:
    """Return the time at `place` of the sorted `times`, reading them in chunks, never sorting.

    >>> moment_at(np.array([30, 10, 20, 10]), 2)
    20
    """
    low, high = int(times.min()), int(times.max())
    while low < high:
        middle = (low + high + 1) // 2
        if sum(int((part < middle).sum()) for part in chunks(times)) <= place:
            low = middle
        else:
            high = middle - 1
    return low


def count_items(
    items: NDArray[np.int32],
    size: int,
    times: NDArray[np.int64] | None = None,
    before: int = 0,
) -> NDArray[np.int64]:
    """Count events of each item, with `times` only those before a moment: int64 [size]."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(items), CHUNK):
        part = np.asarray(items[start : start + CHUNK])
        if times is not None:
            part = part[times[start : start + CHUNK] < before]
        counts += np.bincount(part, minlength=size)
    return counts


def chunks(values: NDArray) -> list[NDArray]:
    """Return views that cover `values`, each at most CHUNK long."""
    return [values[start : start + CHUNK] for start in range(0, len(values), CHUNK)]
