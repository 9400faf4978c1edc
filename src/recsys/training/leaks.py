"""Refuse a feature that knows the answer: a column written after the event, not before it.

Shapes: R rows (shown items), T tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.data.dataset import Dataset
from recsys.data.examples import Examples
from recsys.features import Column
from recsys.features.learnt import as_numbers, as_texts, read_column
from recsys.schema import InputError
from recsys.task_metrics import REGRESSION, auc

LEAST = 10
"""Rows of each class without which an AUC says nothing: ten of each are parted by chance once in
92,378 columns."""
ROWS = 1_000_000
"""Training rows looked at, the newest: enough to tell, whatever the size of the log."""


def refuse_leaks(
    columns: Mapping[str, NDArray],
    labels: NDArray[np.float32],
    tasks: Sequence[str],
    limit: float = 0.995,
    allow: Sequence[str] = (),
) -> None:
    """Raise InputError where one column alone orders the training rows as the labels do.

    columns: name → [R], rows sorted by time; floats are numbers (NaN missing, which may itself
    tell), anything else is a category. labels: float32 [R, T]. A category scores the later half of
    the rows by its mean label in the earlier half, so that no id, however rare, knows itself.
    """
    for name, values in columns.items():
        if name in allow:
            continue
        for task, label in zip(tasks, labels.T, strict=True):
            if task not in REGRESSION and (found := telling(values, label)) >= limit:
                raise InputError(_refusal(name, task, found, limit))


def _refusal(name: str, task: str, found: float, limit: float) -> str:
    return (
        f"features: column {name!r} alone tells {task!r} with an AUC of {found:.4f} on training "
        f"rows (limit {limit}), so it was most likely written after the answer. Leave it out of "
        f"features, or type features_allow=[{name}] if it is known when recommendations are asked"
    )


def telling(values_R: NDArray, label_R: NDArray[np.float32]) -> float:
    """Return the AUC of a column by itself, whichever way it points; 0.5 where too few rows say.

    >>> telling(np.repeat([0.0, 1.0], 10), np.repeat([0, 1], 10).astype(np.float32))
    1.0
    """
    known_R = ~np.isnan(label_R)
    values_R, positive_R = values_R[known_R], label_R[known_R] > 0.5
    if not np.issubdtype(values_R.dtype, np.floating):
        values_R, positive_R = _as_means(values_R, positive_R)
    if min(positive_R.sum(), (~positive_R).sum()) < LEAST:
        return 0.5
    scores_R = np.nan_to_num(values_R, nan=-np.inf, neginf=-np.inf)
    found = auc(scores_R, positive_R.astype(np.float32))
    return max(found, 1 - found)


def _as_means(
    values_R: NDArray, positive_R: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the later half: each value's share of positives in the earlier half, and labels."""
    half = len(values_R) // 2
    known, code = np.unique(values_R, return_inverse=True)
    rows = np.bincount(code[:half], minlength=len(known))
    positives = np.bincount(code[:half], positive_R[:half], len(known))
    mean = positive_R[:half].mean() if half else 0.0
    share = np.where(rows > 0, positives / np.maximum(rows, 1), mean)
    return share[code[half:]], positive_R[half:]


def single_columns(
    dataset: Dataset, examples: Examples, columns: Iterable[Column]
) -> dict[str, NDArray]:
    """Return what declared columns say of `training_rows`, for `refuse_leaks`: name → [R].

    Those of items, users and requests that are categorical or numeric; the others have no single
    value to order rows by.
    """
    rows = training_rows(examples)
    request_R = examples.request_of_row()[rows]
    tables = {"item": dataset.items, "user": dataset.users, "request": examples.context}
    at = {"item": examples.items[rows] - 1, "user": examples.users[request_R], "request": request_R}
    return {
        column.name: _gathered(column, tables[column.of], at[column.of])
        for column in columns
        if column.of in tables and column.kind in ("categorical", "numeric")
    }


def training_rows(examples: Examples) -> slice:
    """Return the newest of the training rows, at most ROWS."""
    rows = examples.rows("train")
    return slice(max(rows.start, rows.stop - ROWS), rows.stop)


def _gathered(
    column: Column, table: pa.Table | Mapping[str, pa.Array], at_R: NDArray[np.int64]
) -> NDArray:
    """Return the values in rows `at_R`, missing where that is -1."""
    if column.is_index:
        return at_R
    array = read_column(column, table, f"{column.of}s")
    if column.kind == "numeric":
        return np.append(as_numbers(column, array), np.nan)[at_R]
    codes = as_texts(column, array).dictionary_encode().indices.fill_null(-1)
    return np.append(codes.to_numpy(zero_copy_only=False).astype(np.int64), -1)[at_R]
