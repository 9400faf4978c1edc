"""Statistics of the log, each as of a moment: how often what was shown did what a task asks.

Shapes: R shown rows, N items, G codes (values of one categorical column of items).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recsys.data.examples import Examples
from recsys.schema import InputError

DAY = 86_400_000
Numbers = NDArray[np.floating] | NDArray[np.integer]
Ints = NDArray[np.int64]


def rates_as_of(
    examples: Examples,
    by_codes: NDArray[np.integer],
    task: str,
    prior: float = 20.0,
    every_ms: int = DAY,
) -> NDArray[np.float32]:
    """Return each row's smoothed rate of its item's code, of earlier periods alone: float32 [R].

    A row reads rows before the start of its own period (`every_ms` long, counted from 1970), so
    neither its own label nor any at the same time. The rate is (positives + prior * mean) /
    (shown + prior), where `mean` is that of all rows before; NaN where there are none. Rows whose
    label is not known do not count.

    by_codes: code of each item [N + 1]. prior: how many rows the mean weighs as.
    """
    _check(prior, every_ms)
    period_R = (examples.times // every_ms)[examples.request_of_row()]
    code_R = np.asarray(by_codes, np.int64)[examples.items]
    label_R = examples.label(task)
    everything = _before_own_period(np.zeros(len(code_R), np.int64), period_R, label_R)
    return _smoothed(*_before_own_period(code_R, period_R, label_R), *everything, prior)


def snapshot(
    examples: Examples,
    by_codes: NDArray[np.integer],
    task: str,
    prior: float = 20.0,
    before: int | None = None,
) -> NDArray[np.float32]:
    """Return each item's rate from all rows before a moment, or from all: float32 [N + 1].

    At the start of a period it is what `rates_as_of` gives to the rows of that period.
    """
    _check(prior)
    codes = np.asarray(by_codes, np.int64)
    code_R, label_R = codes[examples.items], examples.label(task)
    known = ~np.isnan(label_R)
    if before is not None:
        known &= (examples.times < before)[examples.request_of_row()]
    size = int(codes.max()) + 1
    positives_G = np.bincount(code_R[known], label_R[known], size)
    shown_G = np.bincount(code_R[known], minlength=size)
    totals = np.array([positives_G.sum()]), np.array([shown_G.sum()])
    return _smoothed(positives_G, shown_G, *totals, prior)[codes]


def _check(prior: float, every_ms: int = DAY) -> None:
    if not (np.isfinite(prior) and prior >= 0):
        raise InputError(f"features: prior={prior}: expected 0 or more, e.g. 20")
    if every_ms < 1:
        raise InputError(f"features: a period of {every_ms} ms; expected 1 or more")


def _before_own_period(
    code_R: Ints, period_R: Ints, label_R: NDArray[np.float32]
) -> tuple[Numbers, Numbers]:
    """Return positives and known rows of the same code in earlier periods: [R] each."""
    # A stable sort keeps the order of time that rows mostly come in.
    in_time = (np.diff(period_R) >= 0).all()
    order_R = np.argsort(code_R, kind="stable") if in_time else np.lexsort((period_R, code_R))
    known_R = ~np.isnan(label_R[order_R])
    code_R, period_R = code_R[order_R], period_R[order_R]
    new_code_R = np.diff(code_R, prepend=-1) != 0
    new_R = new_code_R | (np.diff(period_R, prepend=0) != 0)
    start_R, code_start_R = _run_starts(new_R), _run_starts(new_code_R)
    result = []
    for values_R in (np.where(known_R, label_R[order_R], 0).astype(np.float64), known_R):
        before_R = np.concatenate([[0], np.cumsum(values_R)])
        unsorted_R = np.empty(len(order_R), before_R.dtype)
        unsorted_R[order_R] = before_R[start_R] - before_R[code_start_R]
        result.append(unsorted_R)
    return result[0], result[1]


def _run_starts(begins_R: NDArray[np.bool_]) -> Ints:
    """Return where the run that each row is in begins: int64 [R]."""
    return np.maximum.accumulate(np.where(begins_R, np.arange(len(begins_R)), 0))


def _smoothed(
    positives: Numbers, shown: Numbers, all_positives: Numbers, all_shown: Numbers, prior: float
) -> NDArray[np.float32]:
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = all_positives / all_shown
        return ((positives + prior * mean) / (shown + prior)).astype(np.float32)
