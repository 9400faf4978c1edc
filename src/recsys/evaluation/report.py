"""Evaluations as rich tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from recsys.evaluation.protocol import Evaluation

COLUMNS = ("recall@10", "ndcg@10", "ndcg@20", "mrr@10", "coverage@10")


def report_table(rows: Mapping[str, Evaluation], columns: Sequence[str] = COLUMNS) -> Table:
    """Return a table of the main metrics: the model beside its baselines, best values bold.

    The last column is NDCG@10 by the other protocol: seen items kept where the rest removes them.
    """
    first = next(iter(rows.values()))
    other = "with_seen" if first.exclude_seen else "without_seen"
    columns = (*columns, f"{other}/ndcg@10")
    best = {c: max(e.metrics.get(c, 0.0) for e in rows.values()) for c in columns}
    best = best if len(rows) > 1 else {}
    table = Table(title=_title(first), box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in columns:
        table.add_column(_heading(column), justify="right")
    for name, evaluation in rows.items():
        table.add_row(name, *(_cell(evaluation.metrics.get(c), best.get(c)) for c in columns))
    return table


def slices_table(evaluation: Evaluation, columns: Sequence[str] = COLUMNS[:4]) -> Table:
    """Return a table of one scorer's metrics by history length, item popularity and newcomers."""
    table = Table(title=f"{evaluation.scorer} · {_title(evaluation)}", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in ("users", *columns):
        table.add_column(column, justify="right")
    for group, buckets in evaluation.slices.items():
        for bucket, values in buckets.items():
            cells = (_cell(values.get(column)) for column in columns)
            table.add_row(f"{group} {bucket}", f"{int(values['users']):,}", *cells)
        table.add_section()
    return table


def _heading(column: str) -> str:
    """Break a metric's name into lines, so that the table fits a narrow terminal."""
    prefix, _, name = column.rpartition("/")
    name = name if prefix else name.replace("@", "\n@")
    return f"{prefix.replace('_', ' ')}\n{name}".strip()


def _title(evaluation: Evaluation) -> str:
    seen = "removed" if evaluation.exclude_seen else "kept"
    users = f"{evaluation.users:,} users"
    return f"{evaluation.dataset} · {evaluation.part}, {users}, all items, seen {seen}"


def _cell(value: float | None, best: float | None = None) -> str:
    if value is None:
        return "-"
    return f"[bold]{value:.4f}[/bold]" if value == best else f"{value:.4f}"
