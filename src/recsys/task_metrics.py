"""Metrics of a ranker's tasks as functions of numpy arrays: is a shown item viewed, bought, read?

Shapes: R rows (shown items), T tasks, U users, G groups, K bins, S resamples.
A label is 1, 0, or NaN where nobody knows; such a row is left out of its task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.schema import DWELL, InputError

REGRESSION = (DWELL,)
"""Tasks whose label is a number of seconds; every other task is binary."""
BINS = 15
LEAST = 1e-7
"""Probabilities are kept this far from 0 and 1 in a logarithm: what float32 can tell from them."""

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


class Bins(NamedTuple):
    """Rows grouped by their prediction: float64 [K] means, int64 [K] counts; none is empty."""

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    rows: NDArray[np.int64]


class Aucs(NamedTuple):
    """The area under each group's curve, NaN where it has one class only, and its rows: [G]."""

    auc: NDArray[np.float64]
    rows: NDArray[np.int64]


def auc(score_R: Floats, label_R: Floats) -> float:
    """Return the chance that a positive row scores above a negative one, a tie counting half.

    The exact rank statistic (Mann and Whitney 1947); NaN where one class is missing.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
    0.875
    """
    return float(aucs(score_R, label_R, np.zeros(len(score_R), np.int64), 1).auc[0])


def aucs(score_R: Floats, label_R: Floats, group_R: Ints, num_groups: int) -> Aucs:
    """Return the AUC within each group 0 to G - 1.

    >>> aucs(np.array([0.1, 0.4, 0.5]), np.array([0, 1, 1]), np.array([0, 0, 1]), 2).auc
    array([ 1., nan])
    """
    order_R = np.lexsort((score_R, group_R))
    score_R, group_R, positive_R = score_R[order_R], group_R[order_R], label_R[order_R] > 0.5
    rows_G = np.bincount(group_R, minlength=num_groups)
    start_G = np.cumsum(rows_G) - rows_G
    place_R = _mean_places(_starts(score_R, group_R)) - start_G[group_R]
    positives_G = np.bincount(group_R, positive_R, num_groups)
    # Places among all rows, less those that positives take among themselves: negatives below.
    places_G = np.bincount(group_R, place_R * positive_R, num_groups)
    below_G = places_G - positives_G * (positives_G - 1) / 2
    pairs_G = positives_G * (rows_G - positives_G)
    return Aucs(np.where(pairs_G > 0, below_G / np.maximum(pairs_G, 1), np.nan), rows_G)


def _starts(*sorted_R: NDArray) -> NDArray[np.bool_]:
    """Return where a run of equal values begins, given sorted columns: bool [R]."""
    begins_R = np.ones(len(sorted_R[0]), np.bool_)
    begins_R[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in sorted_R])
    return begins_R


def _mean_places(begins_R: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mean place, from 0, of the run that each row is in: float64 [R]."""
    first = np.flatnonzero(begins_R)
    length = np.diff(np.append(first, len(begins_R)))
    return np.repeat(first + (length - 1) / 2, length)


def user_aucs(score_R: Floats, label_R: Floats, users_R: Ints) -> Aucs:
    """Return the AUC of each known user, in ascending order of users; -1 is nobody known."""
    known_R = users_R >= 0
    users_U, group_R = np.unique(users_R[known_R], return_inverse=True)
    return aucs(score_R[known_R], label_R[known_R], group_R, len(users_U))


def grouped_auc(score_R: Floats, label_R: Floats, users_R: Ints) -> float:
    """Return the mean AUC within users, weighted by their rows; NaN where none has both classes.

    Users of one class, and rows of unknown users (-1), are left out: Zhou et al. 2018, "Deep
    Interest Network", section 6.2, with rows for impressions.

    >>> users = np.array([0, 0, 1, 1, 1, 2])
    >>> grouped_auc(np.array([0.1, 0.2, 0.9, 0.3, 0.5, 0.7]), np.array([0, 1, 0, 1, 0, 1]), users)
    0.4
    """
    found = user_aucs(score_R, label_R, users_R)
    both_U = ~np.isnan(found.auc)
    rows = found.rows[both_U]
    return float(found.auc[both_U] @ rows / rows.sum()) if len(rows) else float("nan")


def log_loss(probability_R: Floats, label_R: Floats) -> float:
    """Return the mean of -log of the probability given to what happened, in nats; NaN of no rows.

    >>> round(log_loss(np.array([0.5, 0.9]), np.array([0, 1])), 4)
    0.3993
    """
    if not len(label_R):
        return float("nan")
    kept_R = np.clip(np.asarray(probability_R, np.float64), LEAST, 1 - LEAST)
    return float(-np.log(np.where(label_R > 0.5, kept_R, 1 - kept_R)).mean())


def reliability(probability_R: Floats, label_R: Floats, bins: int = BINS) -> Bins:
    """Return rows in bins of equal mass by their probability; tied ones share a bin.

    Sharing makes the answer independent of the order of rows, and leaves fewer bins where many tie.

    >>> reliability(np.array([0.1, 0.3, 0.6, 0.6]), np.array([0, 1, 0, 1]), bins=2)
    Bins(predicted=array([0.2, 0.6]), observed=array([0.5, 0.5]), rows=array([2, 2]))
    """
    order_R = np.argsort(probability_R, kind="stable")
    sorted_R = np.asarray(probability_R, np.float64)[order_R]
    place_R = _mean_places(_starts(sorted_R)) if len(sorted_R) else sorted_R
    bin_R = ((place_R + 0.5) * bins / max(len(sorted_R), 1)).astype(np.int64)
    rows_K = np.bincount(bin_R, minlength=bins)
    met_K = rows_K > 0
    sums = (np.bincount(bin_R, values, bins)[met_K] for values in (sorted_R, label_R[order_R]))
    predicted_K, observed_K = (sum_K / rows_K[met_K] for sum_K in sums)
    return Bins(predicted_K, observed_K, rows_K[met_K])


def ece(probability_R: Floats, label_R: Floats, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean distance of bins from what they promise.

    Guo et al. 2017, equation 3, after Naeini et al. 2015, with bins of equal mass; NaN of no rows.

    >>> round(ece(np.array([0.1, 0.3, 0.6, 0.6]), np.array([0, 1, 0, 1]), bins=2), 4)
    0.2
    """
    if not len(label_R):
        return float("nan")
    found = reliability(probability_R, label_R, bins)
    return float(np.abs(found.predicted - found.observed) @ found.rows / found.rows.sum())


def mean_absolute_error(predicted_R: Floats, label_R: Floats) -> float:
    """Return the mean distance of prediction and label; NaN of no rows.

    >>> mean_absolute_error(np.array([10.0, 20.0]), np.array([12.0, 14.0]))
    4.0
    """
    distance_R = np.abs(np.asarray(predicted_R, np.float64) - label_R)
    return float(distance_R.mean()) if len(distance_R) else float("nan")


def task_metrics(
    probability_RT: Floats, label_RT: Floats, tasks: Sequence[str], users_R: Ints
) -> dict[str, float]:
    """Return `TASK/auc`, `/gauc`, `/log_loss` and `/ece` of binary tasks, `dwell/mae` in seconds.

    NaN labels are left out; a figure that is not defined is NaN. Raises InputError where shapes
    differ, a prediction is NaN or no probability, or a binary label is neither 0 nor 1.

    >>> found = task_metrics(np.array([[0.2], [0.6]]), np.array([[0], [1]]), ["view"], [4, 4])
    >>> sorted(found), found["view/auc"]
    (['view/auc', 'view/ece', 'view/gauc', 'view/log_loss'], 1.0)
    """
    users_R = np.asarray(users_R)
    _check_shapes(probability_RT, label_RT, tasks, users_R)
    found: dict[str, float] = {}
    for task, predicted_R, label_R in zip(tasks, probability_RT.T, label_RT.T, strict=True):
        known_R = ~np.isnan(label_R)
        figures = _figures(task, predicted_R[known_R], label_R[known_R], users_R[known_R])
        found |= {f"{task}/{name}": value for name, value in figures.items()}
    return found


def _figures(task: str, predicted_R: Floats, label_R: Floats, users_R: Ints) -> dict[str, float]:
    _check_values(task, predicted_R, label_R)
    if task in REGRESSION:
        return {"mae": mean_absolute_error(predicted_R, label_R)}
    return {
        "auc": auc(predicted_R, label_R),
        "gauc": grouped_auc(predicted_R, label_R, users_R),
        "log_loss": log_loss(predicted_R, label_R),
        "ece": ece(predicted_R, label_R),
    }


def slice_metrics(
    probability_RT: Floats,
    label_RT: Floats,
    tasks: Sequence[str],
    users_R: Ints,
    slices: Mapping[str, NDArray],
) -> dict[str, dict[str, dict[str, float]]]:
    """Return `task_metrics` of each bucket of each slice, with its `rows`.

    A slice gives each row its bucket: codes or names [R], or truth values, named `no` and `yes`.

    >>> rows = np.array([[0.2], [0.6]]), np.array([[0], [1]]), ["view"], np.array([4, 5])
    >>> found = slice_metrics(*rows, slices={"newcomer": np.array([True, False])})
    >>> {bucket: values["rows"] for bucket, values in found["newcomer"].items()}
    {'no': 1, 'yes': 1}
    """
    users_R = np.asarray(users_R)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, bucket_R in slices.items():
        _check_slice(name, bucket_R, users_R)
        found[name] = {}
        for bucket in np.unique(bucket_R):
            at = bucket_R == bucket
            figures = task_metrics(probability_RT[at], label_RT[at], tasks, users_R[at])
            found[name][_bucket_name(bucket)] = {"rows": int(at.sum()), **figures}
    return found


def _bucket_name(bucket: np.generic) -> str:
    return ("yes" if bucket else "no") if isinstance(bucket, np.bool_) else str(bucket)


def _check_slice(name: str, bucket_R: NDArray, users_R: Ints) -> None:
    if np.shape(bucket_R) != users_R.shape:
        raise InputError(
            f"slice {name!r} has shape {np.shape(bucket_R)}, expected {users_R.shape}: "
            "one bucket for each row"
        )


def _check_shapes(
    probability_RT: Floats, label_RT: Floats, tasks: Sequence[str], users_R: Ints
) -> None:
    expected = (len(users_R), len(tasks))
    for name, values in (("predictions", probability_RT), ("labels", label_RT)):
        if np.shape(values) != expected:
            raise InputError(
                f"{name} have shape {np.shape(values)}, expected {expected}: a row for each of "
                f"users_R, a column for each task of {', '.join(tasks)}"
            )


def _check_values(task: str, predicted_R: Floats, label_R: Floats) -> None:
    invalid = int(np.isnan(predicted_R).sum())
    if invalid:
        raise InputError(
            f"{task}: predictions are NaN in {invalid} of {len(predicted_R)} rows, expected "
            "numbers; a model that diverged does this: train it again with a smaller learning rate"
        )
    if task in REGRESSION or not len(label_R):
        return
    if predicted_R.min() < 0 or predicted_R.max() > 1:
        raise InputError(
            f"{task}: predictions from {predicted_R.min():.4g} to {predicted_R.max():.4g}, "
            "expected probabilities from 0 to 1; apply a sigmoid to logits first"
        )
    _check_labels(task, label_R)


def _check_labels(task: str, label_R: Floats) -> None:
    other_R = label_R[(label_R != 0) & (label_R != 1)]
    if len(other_R):
        raise InputError(
            f"{task}: label {other_R[0]:g} in {len(other_R)} rows, expected 0, 1 or NaN for "
            f"unknown; a task in seconds is named {', '.join(REGRESSION)}"
        )


def resampled_aucs(
    score_R: Floats, label_R: Floats, group_R: Ints, times_SU: Ints
) -> NDArray[np.float64]:
    """Return the AUC over all rows when group u's rows count `times_SU[s, u]` times: [S].

    Rows are sorted once for all resamples. NaN where a resample has one class only.

    >>> score, label, group = np.array([0.1, 0.4, 0.9]), np.array([0, 1, 0]), np.array([0, 0, 1])
    >>> resampled_aucs(score, label, group, times_SU=np.array([[1, 1], [2, 0]]))
    array([0.5, 1. ])
    """
    order_R = np.argsort(score_R, kind="stable")
    group_R, positive_R = group_R[order_R], label_R[order_R] > 0.5
    first = np.flatnonzero(_starts(score_R[order_R])) if len(order_R) else order_R
    return np.array([_weighted_auc(times_U[group_R], positive_R, first) for times_U in times_SU])


def _weighted_auc(weight_R: Ints, positive_R: NDArray[np.bool_], first: Ints) -> float:
    """Return the AUC of sorted rows with whole weights; runs of tied scores begin at `first`."""
    positive = np.add.reduceat(weight_R * positive_R, first, dtype=np.float64)
    negative = np.add.reduceat(weight_R * ~positive_R, first, dtype=np.float64)
    below = np.cumsum(negative) - negative / 2
    pairs = positive.sum() * negative.sum()
    return float(positive @ below / pairs) if pairs else float("nan")
