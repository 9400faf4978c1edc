"""What a ranker said of the test part's shown items, kept with its run so that two can be compared.

Shapes: R shown items, T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.artifacts import read_manifest
from recsys.evaluation.protocol import write_parquet
from recsys.evaluation.significance import RANKS, Compared, Comparison
from recsys.evaluation.significance import compare as compare_ranks
from recsys.evaluation.task_significance import auc_difference
from recsys.schema import DWELL, InputError
from recsys.task_metrics import Floats, Ints, auc, grouped_auc

SHOWN = "shown-test.parquet"
RESAMPLES = 1_000
METADATA = b"recsys.shown"
SAID = "{} said"


FIGURES = {"auc": lambda said_R, label_R, users_R: auc(said_R, label_R), "gauc": grouped_auc}


class Judged(NamedTuple):
    """One task's probabilities of the items of known label, the labels, and whose: [R] each."""

    task: str
    said: Floats
    labels: Floats
    users: Ints


@dataclass(frozen=True)
class Said:
    """A ranker's probabilities of the tasks of yes or no, beside what came of what was shown.

    table: `user` (a row, -1 for nobody known), `item`, and for each task its label and `TASK said`,
    float32; facts: `dataset`, `fingerprint` and `part`.
    """

    ranker: str
    facts: dict[str, Any]
    table: pa.Table

    @classmethod
    def of(
        cls,
        facts: dict[str, Any],
        tasks: Sequence[str],
        users_R: Ints,
        items_R: Ints,
        labels_RT: Floats,
        probability_RT: Floats,
    ) -> Said:
        """Take what was said of shown items, without the task of seconds."""
        columns = {"user": pa.array(users_R), "item": pa.array(items_R)}
        for place, task in enumerate(tasks):
            if task != DWELL:
                columns[task] = _floats(labels_RT[:, place])
                columns[SAID.format(task)] = _floats(probability_RT[:, place])
        return cls("", facts, pa.table(columns))

    @classmethod
    def load(cls, run: Path) -> Said:
        """Read what a run keeps; raises InputError where it keeps nothing of the kind."""
        manifest = read_manifest(run, "run")
        name = manifest["name"]
        if "tasks" not in manifest:
            raise InputError(
                f"run {name} is a retriever: it says nothing of what was shown; compare two rankers"
            )
        if not (run / SHOWN).is_file():
            raise InputError(f"run {name}: no {SHOWN}; make it with `recsys evaluate {name}`")
        table = pq.read_table(run / SHOWN)
        return cls(name, json.loads(table.schema.metadata[METADATA]), table)

    def save(self, folder: Path) -> Path:
        """Write it into a run's folder as Parquet; return the file."""
        table = self.table.replace_schema_metadata({METADATA: json.dumps(self.facts)})
        write_parquet(folder / SHOWN, table)
        return folder / SHOWN

    @property
    def tasks(self) -> list[str]:
        """Return the tasks of yes or no."""
        names = self.table.column_names
        return [name for name in names if SAID.format(name) in names]

    def of_task(self, task: str) -> Judged:
        """Return what was said of one task, where its label is known."""
        label_R = self.column(task)
        known_R = ~np.isnan(label_R)
        columns = self.column(SAID.format(task)), label_R, self.column("user")
        return Judged(task, *(column[known_R] for column in columns))

    def column(self, name: str) -> NDArray[Any]:
        """Return one column: [R]."""
        return self.table[name].to_numpy()


def _floats(values_R: Floats) -> pa.Array:
    """Return them with nulls for NaN: two nulls are equal, two NaN are not."""
    return pa.array(values_R.astype(np.float32), from_pandas=True)


def comparisons(left: Path, right: Path) -> list[Comparison]:
    """Compare two runs by their ranks of the catalogue, and rankers of one log by their tasks too.

    Where a ranker was trained without a retriever, tasks are all that there is. Raises InputError
    where the runs have nothing in common to be compared by.
    """
    alone = [not (run / RANKS).is_file() for run in (left, right)]
    rankers = ["tasks" in read_manifest(run, "run") for run in (left, right)]
    if any(ranker and lacks for ranker, lacks in zip(rankers, alone, strict=True)):
        return [compare_shown(left, right)]
    found = [compare_ranks(left, right)]
    kept = all((run / SHOWN).is_file() for run in (left, right))
    both = kept and _alike(*(Said.load(run) for run in (left, right)))
    return [*found, compare_shown(left, right)] if both else found


def compare_shown(left: Path, right: Path, resamples: int = RESAMPLES) -> Comparison:
    """Return how much better `right` orders the same shown items, task by task, than `left`.

    Raises InputError where what was shown to whom, or what came of it, is not the same.
    """
    one, other = Said.load(left), Said.load(right)
    pairs = [(one.of_task(task), other.of_task(task)) for task in _common(one, other)]
    rows = [_compared(*pair, figure, resamples) for pair in pairs for figure in FIGURES]
    users = len(np.unique(one.column("user")))
    there = tuple(row for row in rows if row is not None)
    return Comparison(one.ranker, other.ranker, one.facts, users, resamples, there)


def _common(left: Said, right: Said) -> list[str]:
    """Return the tasks that both have; raise InputError where their items or labels differ."""
    tasks = [task for task in left.tasks if task in right.tasks]
    if _alike(left, right):
        return tasks
    lacking = f"the tasks {', '.join(left.tasks)} and {', '.join(right.tasks)}"
    other = f"{left.table.num_rows:,} and {right.table.num_rows:,} shown items, not the same ones"
    raise InputError(
        f"cannot compare {left.ranker} with {right.ranker}: their tests have "
        f"{other if tasks else lacking}; train both on one dataset with the same examples="
    )


def _alike(left: Said, right: Said) -> bool:
    """Whether two rankers have a task in common, and were asked about the same items."""
    tasks = [task for task in left.tasks if task in right.tasks]
    shared = ["user", "item", *tasks]
    return bool(tasks) and left.table.select(shared).equals(right.table.select(shared))


def _compared(left: Judged, right: Judged, figure: str, resamples: int) -> Compared | None:
    """Return one figure of a task; None where it is not defined: no yes beside a no."""
    found = (FIGURES[figure](said.said, said.labels, said.users) for said in (left, right))
    first, second = found
    if np.isnan(first):
        return None
    rows = left.said, right.said, left.labels, left.users
    difference = auc_difference(*rows, grouped=figure == "gauc", resamples=resamples)
    return Compared(f"{left.task} {figure}", first, second, difference)
