"""The test of a run: full ranking beside the baselines, kept for comparison, drawn and tabled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from recsys import peers
from recsys.data.dataset import Dataset
from recsys.data.synthetic import truth_of
from recsys.evaluation.baselines import baselines
from recsys.evaluation.plots import learning_curves, scorer_bars, slice_bars
from recsys.evaluation.protocol import Evaluation, evaluate
from recsys.evaluation.report import report_table, slices_table
from recsys.evaluation.scorers import ModelScorer, Scorer
from recsys.evaluation.significance import RANKS, Comparison, compare_evaluations
from recsys.training.callbacks import Validation

MAIN = ("recall@10", "ndcg@10")


@dataclass(frozen=True)
class Tested:
    """The model's evaluation on the test part, first in `rows`, and the baselines' beside it.

    `metrics`: `test`, `validation` (the best epoch's) and one entry a baseline.
    """

    rows: dict[str, Evaluation]
    metrics: dict[str, dict[str, float]]
    files: list[Path]
    servable = True
    """Whether a bundle can be made of the run."""

    @property
    def model(self) -> Evaluation:
        """The model's own evaluation."""
        return next(iter(self.rows.values()))

    @property
    def logged(self) -> dict[str, float]:
        """The figures that MLflow shows: all of the test, and the main ones of each baseline."""
        shown = {f"test/{k}": v for k, v in self.metrics["test"].items() if "/" not in k}
        others = {p: v for p, v in self.metrics.items() if p not in ("test", "validation")}
        return shown | {f"test baselines/{p} {k}": v[k] for p, v in others.items() for k in MAIN}

    def against(self) -> list[Comparison]:
        """Compare the model's NDCG@10 with each baseline's, user by user."""
        _, *others = self.rows.values()
        return [compare_evaluations(o, self.model, metrics=("ndcg@10",)) for o in others]

    def show(self, console: Console, slices: bool = False) -> None:
        """Print the table, the intervals and, if asked for, the slices."""
        console.print(report_table(self.rows))
        _show_intervals(self.against(), console)
        if slices:
            console.print(slices_table(self.model))


def show_together(tested: Mapping[str, Tested], console: Console) -> None:
    """Print one table a dataset: all variants trained on it, and the baselines."""
    by_dataset: dict[str, dict[str, Evaluation]] = {}
    for name, one in tested.items():
        rows = by_dataset.setdefault(one.model.fingerprint, {})
        others = dict(list(one.rows.items())[1:])
        by_dataset[one.model.fingerprint] = {**rows, name: one.model, **others}
        console.print(f"\n[bold]{name}[/bold]")
        _show_intervals(one.against(), console)
    for rows in by_dataset.values():
        console.print(report_table(rows))


def _show_intervals(comparisons: Iterable[Comparison], console: Console) -> None:
    for comparison in comparisons:
        difference = comparison.rows[0].difference
        console.print(
            f"{comparison.right} - {comparison.left}: ndcg@10 {difference.mean:+.4f}, "
            f"95 % paired bootstrap {difference.low:+.4f} to {difference.high:+.4f}"
        )


def rank_test(
    folder: Path,
    dataset: Dataset,
    scorer: ModelScorer,
    validation: Validation,
    exclude_seen: bool,
    beside: Sequence[Scorer] = (),
) -> Tested:
    """Rank the test part by a model, the baselines and `beside`, and write ranks and plots.

    Every process of a training calls it, and each ranks its share of the users.
    """
    scorers = [scorer, *beside, *baselines(dataset)]
    truth = truth_of(dataset)
    scorers += [truth] if truth else []
    rows = {
        s.name: evaluate(dataset, s, "test", exclude_seen=exclude_seen, shared=True)
        for s in scorers
    }
    metrics = {"test" if name == scorer.name else name: row.metrics for name, row in rows.items()}
    metrics["validation"] = validation.best()
    if not peers.first():
        return Tested(rows, metrics, [])
    rows[scorer.name].save(folder / RANKS)
    return Tested(rows, metrics, [folder / RANKS, *_draw(folder, rows, validation.history)])


def _draw(
    folder: Path, rows: Mapping[str, Evaluation], history: list[dict[str, float]]
) -> list[Path]:
    return [
        learning_curves(history, folder / "learning-curves.png"),
        scorer_bars(rows, folder / "test.png"),
        slice_bars(rows, folder / "slices.png"),
    ]
