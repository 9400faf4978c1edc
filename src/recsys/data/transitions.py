"""What came next in a dataset's log, as of any day: for training, and the tables made of it.

Shapes: E events that came after another with the same value, B requests, C candidates, N items.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recsys.data.dataset import Dataset
from recsys.data.rates import DAY
from recsys.features.transitions import (
    DAYS,
    TYPES,
    DailyCounts,
    Followed,
    Ints,
    after_code,
    smoothed,
)

END = np.iinfo(np.int64).max


class TransitionLog:
    """Events that came next after a person's newest one with the same value, by day.

    An event without a value, and a first one, came after nothing. codes: each item's value [N + 1],
    under 2 for none; the same item again counts, as it is what a view often leads to.
    """

    def __init__(self, dataset: Dataset, codes: NDArray[np.integer], prior: float) -> None:
        self.codes, self.prior = np.asarray(codes, np.int64), prior
        items, times = (np.asarray(dataset.events[name]) for name in ("items", "times"))
        before_E, next_E = _consecutive(self.codes[items], dataset.offsets)
        self.times, self.next = times[next_E], items[next_E].astype(np.int64)
        self.after = after_code(items, dataset.events["types"])[before_E]
        self.since = int(times.max(initial=0)) // DAY - DAYS + 2
        self.firsts = np.full(len(self.codes), DAYS - 1)
        np.minimum.at(self.firsts, items, self.day(times))
        pair_E, days = self.after * len(self.codes) + self.next, self.day(self.times)
        keys = (pair_E, self.after, self.next, self.codes[self.next])
        self.pairs, self.totals, self.met, self.of_value = (
            DailyCounts.of(key, days) for key in keys
        )

    def day(self, moments: Ints) -> Ints:
        """Return the day of moments, counted so that the log's last is `DAYS` - 2."""
        return np.clip(moments // DAY - self.since, 0, DAYS - 1)

    def chances(self, after_BC: Ints, candidates_BC: Ints, now_B: Ints) -> NDArray[np.float64]:
        """Return the candidates' chances [B, C] as of the beginning (UTC) of each `now`'s day."""
        day_B1 = self.day(now_B)[:, None]
        count = self.pairs.between(after_BC * len(self.codes) + candidates_BC, 0, day_B1)
        total = self.totals.between(after_BC, self.firsts[candidates_BC], day_B1)
        return smoothed(count, total, self._shares(candidates_BC, day_B1), self.prior)

    def before(self, moment: int | None) -> Followed:
        """Return what is known of events before a moment, up to its day; None: of all."""
        some = slice(None) if moment is None else self.times < moment // DAY * DAY
        pair_E = self.after[some] * len(self.codes) + self.next[some]
        pairs, counts = np.unique(pair_E, return_counts=True)
        totals = DailyCounts.of(self.after[some], self.day(self.times[some]))
        end = DAYS - 1 if moment is None else int(self.day(np.array(moment)))
        return Followed(
            np.append(pairs, END),
            np.append(counts, 0),
            np.bincount(self.after[some] + 1, minlength=len(self.codes) * TYPES + 1).cumsum(),
            *(totals.keys, totals.before, self.firsts),
            self._shares(np.arange(len(self.codes)), end).astype(np.float32),
            self.prior,
        )

    def _shares(self, items: Ints, day: Ints | int) -> NDArray[np.float64]:
        """Return how often items came next, of all with their value since they were first met."""
        met = self.met.between(items, 0, day)
        of_value = self.of_value.between(self.codes[items], self.firsts[items], day)
        return np.divide(met, of_value, out=np.zeros(met.shape), where=of_value > 0)


def _consecutive(code_E: Ints, offsets: Ints) -> tuple[Ints, Ints]:
    """Return events of the same user and value that follow each other, as indices: earlier, later.

    >>> earlier, later = _consecutive(np.array([2, 3, 2, 2]), np.array([0, 3, 4]))
    >>> earlier.tolist(), later.tolist()
    ([0], [2])
    """
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    key = users * (int(code_E.max(initial=0)) + 1) + code_E
    order = np.argsort(key, kind="stable")
    same = (np.diff(key[order]) == 0) & (code_E[order[1:]] >= 2)
    return order[:-1][same], order[1:][same]
