"""Permutation importance: how much worse are the answers when one column says nothing?

Breiman 2001, "Random Forests", section 10; shuffling keeps a column's values and breaks what they
have to do with the row. Columns that say the same share their importance, so each looks small.
Shapes: B requests, C candidates, T tasks, N repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.schema import InputError, suggestion
from recsys.task_metrics import REGRESSION, Floats, auc, mean_absolute_error

Arrays = Mapping[str, NDArray]
Predict = Callable[[Arrays], Floats]


@dataclass(frozen=True)
class Place:
    """Where a column stands: `width` places of an array's last axis from `first`, or all of it.

    `shown` says that the array has a row a candidate [B, C, ...], not a row a request [B, ...].
    """

    array: str
    first: int = 0
    width: int | None = None
    shown: bool = False


class Drop(NamedTuple):
    """The mean fall of the metric over the repeats, and its standard deviation."""

    mean: float
    sd: float


def importance(
    predict: Predict,
    arrays: Arrays,
    label_BCT: Floats,
    tasks: Sequence[str],
    columns: Mapping[str, Sequence[Place]],
    *,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, dict[str, Drop]]:
    """Return each task's fall of AUC when a column is shuffled, the greatest first.

    `predict` takes arrays like `arrays` and returns probabilities [B, C, T]; a shown item whose
    labels are all NaN is padding. All places of a column are shuffled alike: one of requests by
    whole requests, one of candidates among all shown items. For a task of seconds it is the rise
    of the mean absolute error. Raises InputError for a place that is not there.

    >>> arrays = {"cross_numbers": np.random.default_rng(0).normal(size=(200, 1, 2))}
    >>> label = (arrays["cross_numbers"][..., :1] > 0).astype(float)
    >>> two = {name: [Place("cross_numbers", i, 1, True)] for i, name in enumerate("ab")}
    >>> found = importance(lambda x: x["cross_numbers"][..., :1], arrays, label, ["view"], two)
    >>> {name: round(drop.mean, 1) for name, drop in found["view"].items()}
    {'a': 0.5, 'b': 0.0}
    """
    _check(arrays, columns, repeats)
    shown_BC: NDArray[np.bool_] = np.asarray(~np.isnan(label_BCT).all(-1))
    rng = np.random.default_rng(seed)
    whole_T = _scores(predict(arrays), label_BCT, tasks)

    def drops(places: Sequence[Place]) -> Floats:
        shuffled = (_shuffled(rng, arrays, places, shown_BC) for _ in range(repeats))
        return np.stack([whole_T - _scores(predict(one), label_BCT, tasks) for one in shuffled])

    drops_of = {name: drops(places) for name, places in columns.items()}
    return {
        task: _sorted({c: d[:, t] for c, d in drops_of.items()}) for t, task in enumerate(tasks)
    }


def _sorted(drops: Mapping[str, Floats]) -> dict[str, Drop]:
    found = {name: Drop(float(d_N.mean()), float(d_N.std())) for name, d_N in drops.items()}
    return dict(sorted(found.items(), key=lambda pair: -np.nan_to_num(pair[1].mean)))


def _scores(predicted_BCT: Floats, label_BCT: Floats, tasks: Sequence[str]) -> Floats:
    """Return each task's figure, the greater the better: [T]."""
    return np.array(
        [_score(predicted_BCT[..., t], label_BCT[..., t], task) for t, task in enumerate(tasks)]
    )


def _score(predicted_BC: Floats, label_BC: Floats, task: str) -> float:
    known_BC = ~np.isnan(label_BC)
    predicted_R, label_R = predicted_BC[known_BC], label_BC[known_BC]
    return (
        -mean_absolute_error(predicted_R, label_R)
        if task in REGRESSION
        else auc(predicted_R, label_R)
    )


def _shuffled(
    rng: np.random.Generator, arrays: Arrays, places: Sequence[Place], shown_BC: NDArray[np.bool_]
) -> dict[str, NDArray]:
    """Return the arrays with one column's values dealt out anew."""
    found = dict(arrays)
    request_B = rng.permutation(len(shown_BC))
    shown_R = np.flatnonzero(shown_BC)
    dealt_R = rng.permutation(shown_R)
    for place in places:
        array = found[place.array] = found[place.array].copy()
        rows = array.reshape(shown_BC.size, *array.shape[2:]) if place.shown else array
        to, of = (shown_R, dealt_R) if place.shown else (slice(None), request_B)
        last = slice(place.first, None if place.width is None else place.first + place.width)
        values = rows[of]
        if rows.ndim > 1:
            rows[to, ..., last] = values[..., last]
        else:
            rows[to] = values
    return found


def _check(arrays: Arrays, columns: Mapping[str, Sequence[Place]], repeats: int) -> None:
    if repeats < 1:
        raise InputError(f"repeats={repeats}: expected at least 1, as in 5")
    for name, places in columns.items():
        for place in places:
            if place.array not in arrays:
                raise InputError(
                    f"column {name!r} is said to stand in {place.array!r}; the arrays are "
                    f"{', '.join(arrays)}" + suggestion(place.array, arrays)
                )
            _check_width(name, place, arrays[place.array])


def _check_width(name: str, place: Place, array: NDArray) -> None:
    end = place.first + (place.width or 1)
    if array.ndim > 1 and end > array.shape[-1]:
        raise InputError(
            f"column {name!r} is said to end at place {end} of {place.array!r}, which has "
            f"{array.shape[-1]}; expected the layout that the arrays were encoded with"
        )
