"""Does one ranker order the same rows better than another? A bootstrap over users tells.

Rows of one user come and go together, as they are alike (Field and Welsh 2007).
Shapes: R rows, U users, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from recsys.evaluation.significance import BLOCK, Interval, two_sided
from recsys.schema import InputError
from recsys.task_metrics import Floats, Ints, auc, resampled_aucs, user_aucs

Resampled = Callable[[NDArray[np.int64]], NDArray[np.float64]]


def auc_difference(
    left_R: Floats,
    right_R: Floats,
    label_R: Floats,
    users_R: Ints,
    *,
    grouped: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return the AUC of `right_R` less that of `left_R` on the same rows, with its 95 % interval.

    `grouped` compares the grouped AUC. Rows of label NaN are left out; a row of nobody known (-1)
    is a user of its own. Raises InputError where no user, or no row, has the other class.

    >>> label, users = np.tile([0.0, 1.0], 50), np.repeat(np.arange(50), 2)
    >>> auc_difference(1 - label, label, label, users, grouped=True)
    Interval(mean=1.0, low=1.0, high=1.0, p_value=0.001998001998001998)
    """
    known_R = ~np.isnan(label_R)
    label_R, users_R = np.asarray(label_R)[known_R], np.asarray(users_R)[known_R]
    count, group_R = _groups(users_R)
    scores = np.asarray(left_R)[known_R], np.asarray(right_R)[known_R]
    mean, resampled = (_grouped if grouped else _pooled)(*scores, label_R, group_R, count)
    if np.isnan(mean):
        raise InputError(
            f"{len(label_R)} labelled rows hold one class only, expected both"
            f"{' for some user' if grouped else ''}; compare on more rows"
        )
    found_S = np.concatenate([resampled(drawn_SU) for drawn_SU in _draws(count, resamples, seed)])
    found_S = found_S[~np.isnan(found_S)]
    low, high = np.quantile(found_S, [0.025, 0.975])
    return Interval(float(mean), float(low), float(high), two_sided(found_S))


def _pooled(
    left_R: Floats, right_R: Floats, label_R: Floats, group_R: Ints, count: int
) -> tuple[float, Resampled]:
    """Return the difference over all rows, and a function of how often each user is drawn."""

    def resampled(times_SU: NDArray[np.int64]) -> NDArray[np.float64]:
        right_S = resampled_aucs(right_R, label_R, group_R, times_SU)
        return right_S - resampled_aucs(left_R, label_R, group_R, times_SU)

    return auc(right_R, label_R) - auc(left_R, label_R), resampled


def _grouped(
    left_R: Floats, right_R: Floats, label_R: Floats, group_R: Ints, count: int
) -> tuple[float, Resampled]:
    """Return the difference within users, and a function of how often each user is drawn."""
    left, right = (user_aucs(score_R, label_R, group_R) for score_R in (left_R, right_R))
    both_U = ~np.isnan(left.auc)
    rows_U = np.where(both_U, left.rows, 0)
    gain_U = np.where(both_U, (right.auc - left.auc) * left.rows, 0.0)

    def resampled(times_SU: NDArray[np.int64]) -> NDArray[np.float64]:
        rows_S = times_SU @ rows_U
        return np.where(rows_S > 0, times_SU @ gain_U / np.maximum(rows_S, 1), np.nan)

    return float(resampled(np.ones((1, count), np.int64))[0]), resampled


def _groups(users_R: Ints) -> tuple[int, NDArray[np.int64]]:
    """Return the number of users and each row's, from 0, every unknown row for itself."""
    unknown_R = users_R < 0
    apart_R = np.where(unknown_R, -1 - np.cumsum(unknown_R), users_R)
    distinct_U, group_R = np.unique(apart_R, return_inverse=True)
    return len(distinct_U), group_R


def _draws(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield how often each of `count` users is drawn, a block of resamples at a time: [S, U]."""
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // max(count, 1))
    for start in range(0, resamples, rows):
        drawn_SU = rng.integers(count, size=(min(rows, resamples - start), count))
        yield np.stack([np.bincount(drawn_U, minlength=count) for drawn_U in drawn_SU])
