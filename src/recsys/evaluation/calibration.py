"""Calibration: of items given a probability of 0.3, three in ten should be clicked.

Every method fits a scale and shift of logits, or a rising line of probabilities: what
`recsys.models.calibration` holds in a graph. Fit on validation rows only, report on test rows.
Shapes: R rows, T tasks, K knots, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.models.calibration import Calibration as Graph
from recsys.schema import InputError, suggestion
from recsys.task_metrics import REGRESSION

Floats = NDArray[np.floating]
MOST_KNOTS = 32
LEAST_SCALE = 1e-3
"""A ranker that orders worse than chance is flattened, never turned around."""
WEIGHT = 1.0
"""What leaving the logits as they are weighs, in rows: finite where one score parts the classes."""
NEAREST = 1e-12
"""A line's probabilities are kept this far from 0 and 1 where a logit is asked for."""


@dataclass(frozen=True)
class Calibration:
    """A rising map of one task's logits: scale and shift, then, where there are knots, a line.

    The line maps probabilities, straight from each of `knots` to the next, to `values`.

    >>> Calibration("platt", scale=2.0, shift=-1.0)(np.array([-1.0, 0.5, 2.0]))
    array([-3.,  0.,  3.])
    >>> Calibration("isotonic", knots=(0.0, 1.0), values=(0.0, 0.5)).probability(np.zeros(1))
    array([0.25])
    """

    method: str = "none"
    scale: float = 1.0
    shift: float = 0.0
    knots: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.knots) != len(self.values) or (np.diff(self.knots) <= 0).any():
            raise InputError(
                f"calibration {self.method!r}: {len(self.knots)} knots and {len(self.values)} "
                "values, expected as many rising ones; calibrate again"
            )

    def __call__(self, logit_R: Floats) -> Floats:
        """Return calibrated logits, of the same shape."""
        if not self.knots:
            return logit_R * self.scale + self.shift
        kept_R = np.clip(self.probability(logit_R), NEAREST, 1 - NEAREST)
        return np.log(kept_R) - np.log1p(-kept_R)

    def probability(self, logit_R: Floats) -> Floats:
        """Return calibrated probabilities, of the same shape."""
        probability_R = sigmoid(logit_R * self.scale + self.shift)
        return np.interp(probability_R, self.knots, self.values) if self.knots else probability_R

    def as_json(self) -> dict[str, Any]:
        """Return plain values, which `of_json` brings back."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Calibration:
        """Return what `as_json` gave.

        >>> Calibration.of_json(Calibration().as_json()) == Calibration()
        True
        """
        lines = {name: tuple(values[name]) for name in ("knots", "values")}
        return cls(**{**values, **lines})


def sigmoid(logit_R: Floats) -> Floats:
    """Return the probability of each logit, without overflow.

    >>> sigmoid(np.array([-1000.0, 0.0]))
    array([0. , 0.5])
    """
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logit_R, np.float64)))


def _none(logit_R: Floats, label_R: Floats) -> Calibration:
    return Calibration()


def fit_temperature(logit_R: Floats, label_R: Floats) -> Calibration:
    """Return the best scale of the logits alone: Guo et al. 2017, section 4.2.

    >>> logit, label = np.array([4.0, 4.0, 4.0, 4.0]), np.array([1, 1, 1, 0])
    >>> fit = fit_temperature(np.tile(logit, 500), np.tile(label, 500))
    >>> sigmoid(fit(np.array([4.0]))).round(2)
    array([0.75])
    """
    scale = _newton(np.asarray(logit_R, np.float64)[:, None], label_R, np.ones(1))[0]
    return Calibration("temperature", max(float(scale), LEAST_SCALE))


def fit_platt(logit_R: Floats, label_R: Floats) -> Calibration:
    """Return the best scale and shift of the logits: Platt 1999, by Newton's method.

    >>> fit = fit_platt(np.tile([-1.0, 1.0], 2000), np.tile([0, 1, 0, 0, 0, 1, 1, 0], 500))
    >>> sigmoid(fit(np.array([-1.0, 1.0]))).round(2)
    array([0.25, 0.5 ])
    """
    logit_R = np.asarray(logit_R, np.float64)
    columns_RP = np.stack([logit_R, np.ones_like(logit_R)], axis=1)
    scale, shift = _newton(columns_RP, label_R, np.array([1.0, 0.0]))
    if scale < LEAST_SCALE:
        scale = LEAST_SCALE
        shift = _newton(columns_RP[:, 1:], label_R, np.zeros(1), scale * logit_R)[0]
    return Calibration("platt", float(scale), float(shift))


def _newton(
    columns_RP: Floats,
    label_R: Floats,
    start_P: Floats,
    offset_R: Floats | float = 0.0,
) -> Floats:
    """Return the weights of a logistic regression, drawn to `start_P` by as much as a row."""

    def loss(weight_P: Floats) -> float:
        logit_R = columns_RP @ weight_P + offset_R
        fit = np.logaddexp(0, logit_R).sum() - label_R @ logit_R
        return float(fit + WEIGHT / 2 * ((weight_P - start_P) ** 2).sum())

    weight_P, before = start_P, loss(start_P)
    for _ in range(100):
        step_P = _step(columns_RP, label_R, weight_P, start_P, offset_R)
        # Newton's step may leap over the minimum: the loss must fall, or half of it is tried.
        while (after := loss(weight_P - step_P)) > before and np.abs(step_P).max() > 1e-10:
            step_P = step_P / 2
        weight_P, gain, before = weight_P - step_P, before - after, after
        if gain <= 1e-12 * max(1.0, abs(after)):
            break
    return weight_P


def _step(
    columns_RP: Floats,
    label_R: Floats,
    weight_P: Floats,
    start_P: Floats,
    offset_R: Floats | float,
) -> Floats:
    probability_R = sigmoid(columns_RP @ weight_P + offset_R)
    gradient_P = columns_RP.T @ (probability_R - label_R) + WEIGHT * (weight_P - start_P)
    curve_R = probability_R * (1 - probability_R)
    hessian_PP = (columns_RP.T * curve_R) @ columns_RP + WEIGHT * np.eye(len(weight_P))
    return np.linalg.solve(hessian_PP, gradient_P)


def fit_isotonic(logit_R: Floats, label_R: Floats, most: int = MOST_KNOTS) -> Calibration:
    """Return the best rising line of probabilities, through at most `most` knots.

    Pools adjacent violators (Ayer et al. 1955; Zadrozny and Elkan 2002), then joins neighbouring
    pools to cells that tell equally much. Straight lines from 0 through the cells' means to 1 keep
    the order of the items, which steps would lose.

    >>> logit, label = np.repeat([-1.0, 1.0, 3.0], 4), [0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0]
    >>> fit_isotonic(logit, np.array(label)).probability(np.array([-1.0, 1.0, 3.0])).round(2)
    array([0.25, 0.5 , 0.75])
    """
    at_K, rate_K = _joined(*_pools(sigmoid(logit_R), label_R), most - 2)
    # A certain prediction is an end of the line already.
    inner_K = (at_K > 0) & (at_K < 1)
    knots, values = (
        (0.0, *(float(value) for value in inner[inner_K]), 1.0) for inner in (at_K, rate_K)
    )
    return Calibration("isotonic", knots=knots, values=values)


def _pools(probability_R: Floats, label_R: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the mean probability, rate and rows of each pool of adjacent violators, ascending."""
    from scipy.optimize import isotonic_regression

    distinct, group_R, rows = np.unique(probability_R, return_inverse=True, return_counts=True)
    fitted = isotonic_regression(np.bincount(group_R, label_R) / rows, weights=rows)
    first = fitted.blocks[:-1]
    rows_K = np.add.reduceat(rows, first).astype(np.float64)
    # A pool of one class would be certain: no rate is told better than all rows allow.
    least = 0.5 / len(probability_R)
    rate_K = np.clip(fitted.x[first], least, 1 - least)
    return np.add.reduceat(distinct * rows, first) / rows_K, rate_K, rows_K


def _joined(at_K: Floats, rate_K: Floats, rows_K: Floats, most: int) -> tuple[Floats, Floats]:
    """Return at most `most` cells of neighbouring pools: their mean predictions and rates.

    Cells have equal variance rather than equal rows: where clicks are rare, knots go to them.
    """
    told_K = rows_K * rate_K * (1 - rate_K)
    cell_K = ((np.cumsum(told_K) - told_K / 2) / told_K.sum() * most).astype(np.int64)
    cell_K = np.unique(cell_K, return_inverse=True)[1]
    rows = np.bincount(cell_K, rows_K)
    return np.bincount(cell_K, at_K * rows_K) / rows, np.bincount(cell_K, rate_K * rows_K) / rows


METHODS: dict[str, Callable[[Floats, Floats], Calibration]] = {
    "none": _none,
    "temperature": fit_temperature,
    "platt": fit_platt,
    "isotonic": fit_isotonic,
}


def calibrate(
    logit_RT: Floats,
    label_RT: Floats,
    tasks: Sequence[str],
    method: str | Mapping[str, str] = "platt",
) -> dict[str, Calibration]:
    """Return each task's calibration, given validation rows; `method` is one name, or one a task.

    NaN labels are left out. A task of seconds, and one whose rows are of one class, stays as it is:
    its method is `none`. Raises InputError for a method or a task that is not known.

    >>> logit, label = np.zeros((4, 1)), np.array([[0], [0], [0], [1]])
    >>> calibrate(logit, label, ["view"], {"view": "isotonic"})["view"].method
    'isotonic'
    """
    methods = dict.fromkeys(tasks, method) if isinstance(method, str) else dict(method)
    _check(methods, tasks)
    return {
        task: _of_task(task, logit_R, label_R, methods.get(task, "none"))
        for task, logit_R, label_R in zip(tasks, logit_RT.T, label_RT.T, strict=True)
    }


def _of_task(task: str, logit_R: Floats, label_R: Floats, method: str) -> Calibration:
    known_R = ~np.isnan(label_R)
    logit_R, label_R = logit_R[known_R], label_R[known_R]
    if task in REGRESSION or len(np.unique(label_R)) < 2:
        return Calibration()
    if not np.isfinite(logit_R).all():
        raise InputError(
            f"{task}: {int((~np.isfinite(logit_R)).sum())} of {len(logit_R)} logits are not finite "
            "numbers; a model that diverged does this: train it again with a smaller learning rate"
        )
    return METHODS[method](logit_R, label_R)


def _check(methods: Mapping[str, str], tasks: Sequence[str]) -> None:
    for task, method in methods.items():
        if task not in tasks:
            raise InputError(
                f"calibration of unknown task {task!r}; the ranker has {', '.join(tasks)}"
                + suggestion(task, tasks)
            )
        if method not in METHODS:
            raise InputError(
                f"unknown calibration {method!r} of {task}; expected one of {', '.join(METHODS)}"
                + suggestion(method, METHODS)
            )


def calibrated(logit_RT: Floats, calibrations: Mapping[str, Calibration]) -> Floats:
    """Return calibrated logits of all tasks, in the order of `calibrations`: float64 [..., T].

    >>> calibrated(np.zeros((1, 2)), {"view": Calibration(), "cart": Calibration("platt", 1, 2)})
    array([[0., 2.]])
    """
    columns = [fit(logit_RT[..., place]) for place, fit in enumerate(calibrations.values())]
    return np.stack(columns, axis=-1)


def put(calibrations: Mapping[str, Calibration], graph: Graph) -> None:
    """Put every task's calibration into a ranker's graph, which then answers with the same."""
    for task, fit in calibrations.items():
        line = (np.array(fit.knots), np.array(fit.values)) if fit.knots else (None, None)
        graph.set(task, fit.scale, fit.shift, *line)
