"""Is one scorer better than another, or did it meet luckier users? A paired bootstrap tells.

Shapes: U users, R resamples, V distinct differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from recsys.artifacts import read_manifest
from recsys.evaluation.protocol import Evaluation
from recsys.metrics import metric
from recsys.schema import InputError

if TYPE_CHECKING:
    from rich.table import Table

RANKS = "ranks-test.parquet"
COMPARED = ("ndcg@10", "recall@10", "mrr@10", "ndcg@20", "recall@20")
BLOCK = 2**22
"""Users drawn at once, to bound memory."""


class Interval(NamedTuple):
    """A mean with its 95 % interval, and the two-sided p-value of it being 0."""

    mean: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Compared:
    """One metric of two scorers, and right less left with its uncertainty."""

    metric: str
    left: float
    right: float
    difference: Interval


@dataclass(frozen=True)
class Comparison:
    """Two scorers on the same users, metric by metric."""

    left: str
    right: str
    protocol: dict[str, Any]
    users: int
    resamples: int
    rows: tuple[Compared, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        facts = asdict(self)
        rows = {r.metric: asdict(r) | {"difference": r.difference._asdict()} for r in self.rows}
        return facts | {"rows": rows}

    def table(self) -> Table:
        """Return a rich table: a row a metric, with the verdict in words."""
        from rich import box
        from rich.table import Table

        title = f"A: {self.left}\nB: {self.right}"
        table = Table(title=title, caption=self._caption(), box=box.SIMPLE_HEAD)
        table.add_column("metric", no_wrap=True)
        for column in ("A", "B", "B - A", "95 % interval", "p", ""):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row))
        return table

    def _caption(self) -> str:
        removed = self.protocol.get("exclude_seen")
        seen = "shown items" if removed is None else f"seen items {_kept(removed)}"
        return (
            f"{self.protocol['dataset']}, {self.protocol['part']}, {seen}; paired "
            f"bootstrap over {self.users:,} users, {self.resamples:,} resamples"
        )


def _kept(removed: bool) -> str:
    return "removed" if removed else "kept"


def _cells(row: Compared) -> tuple[str, ...]:
    mean, low, high, p = row.difference
    verdict = "better" if low > 0 else "worse" if high < 0 else "unclear"
    values = f"{row.left:.4f}", f"{row.right:.4f}", f"{mean:+.4f}"
    return (row.metric, *values, f"{low:+.4f} to {high:+.4f}", f"{p:.4f}", verdict)


def bootstrap(
    differences_U: NDArray[np.float64], resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of paired differences, its percentile interval and p-value.

    Users are drawn with replacement (Efron and Tibshirani 1993, chapters 13 and 16).

    >>> bootstrap(np.array([0.0, 0.5, 1.0, 0.5] * 25)).mean
    0.5
    """
    rng = np.random.default_rng(seed)
    distinct = len(np.unique(differences_U))
    draw = _by_value if distinct * 10 < len(differences_U) else _by_user
    rows = max(1, BLOCK // len(differences_U))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means_R = np.concatenate([draw(rng, differences_U, size) for size in sizes])
    low, high = np.quantile(means_R, [0.025, 0.975])
    return Interval(float(differences_U.mean()), float(low), float(high), two_sided(means_R))


def _by_user(rng: np.random.Generator, values_U: NDArray, resamples: int) -> NDArray:
    drawn_RU = rng.integers(len(values_U), size=(resamples, len(values_U)), dtype=np.int32)
    return values_U[drawn_RU].mean(axis=1)


def _by_value(rng: np.random.Generator, values_U: NDArray, resamples: int) -> NDArray:
    """As `_by_user`, faster: how often each distinct value is drawn is one multinomial draw.

    The difference of two ranks' metrics takes few values, as both are 0 past k.
    """
    values_V, counts_V = np.unique(values_U, return_counts=True)
    drawn_RV = rng.multinomial(len(values_U), counts_V / len(values_U), size=resamples)
    return drawn_RV @ values_V / len(values_U)


def two_sided(means_R: NDArray[np.float64]) -> float:
    """Return the p-value of the mean being 0, given its resamples."""
    # One more on either side: no finite number of resamples can show a p of 0.
    tail = min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(means_R) + 1))


def compare_evaluations(
    left: Evaluation,
    right: Evaluation,
    *,
    metrics: Sequence[str] = COMPARED,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Return how much better `right` is than `left`, metric by metric, over the same users.

    Raises InputError naming what differs where dataset, part or seen items are not the same.
    """
    _check(left, right, resamples)
    names = _names(left.scorer, right.scorer)
    ranks = [_ranks(evaluation) for evaluation in (left, right)]
    rows = []
    for name in metrics:
        left_U, right_U = (metric(name, ranks_U).numpy() for ranks_U in ranks)
        difference = bootstrap(right_U - left_U, resamples, seed)
        rows.append(Compared(name, float(left_U.mean()), float(right_U.mean()), difference))
    return Comparison(*names, left.protocol, left.users, resamples, tuple(rows))


def _ranks(evaluation: Evaluation) -> torch.Tensor:
    return torch.tensor(_table(evaluation)["rank"].to_numpy())


def _names(left: str, right: str) -> tuple[str, str]:
    return (left, right) if left != right else (f"{left} (left)", f"{right} (right)")


def _check(left: Evaluation, right: Evaluation, resamples: int) -> None:
    if resamples < 1:
        raise InputError(f"resamples={resamples}: expected at least 1, as in 10000")
    ours, theirs = left.protocol, right.protocol
    differing = [f"{k} {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k]]
    if differing:
        raise InputError(
            f"cannot compare {left.scorer} with {right.scorer}: they differ in "
            f"{'; '.join(differing)}; evaluate both in the same way on the same dataset"
        )
    users = (_table(evaluation)["user"] for evaluation in (left, right))
    assert pa.ChunkedArray.equals(*users), "one dataset and part have one set of users"


def _table(evaluation: Evaluation) -> pa.Table:
    assert evaluation.per_user is not None, "evaluate with details=True to compare"
    return evaluation.per_user


def compare(
    left: Path,
    right: Path,
    *,
    metrics: Sequence[str] = COMPARED,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare the test ranks of two run directories, as `compare_evaluations` does.

    Raises InputError where one is not a run, holds no ranks, or they are not comparable.
    """
    evaluations = (_of_run(path) for path in (left, right))
    return compare_evaluations(*evaluations, metrics=metrics, resamples=resamples, seed=seed)


def _of_run(path: Path) -> Evaluation:
    name = read_manifest(path, "run")["name"]
    if not (path / RANKS).is_file():
        raise InputError(f"run {name}: no {RANKS} in {path}; make it with `recsys evaluate {name}`")
    return replace(Evaluation.load(path / RANKS), scorer=str(name))
