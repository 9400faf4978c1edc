"""Pictures of training and evaluation, as PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.evaluation.protocol import Evaluation
from recsys.schema import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "train/loss", "validation/loss"),
    "NDCG@10": ("ndcg@10", "validation/ndcg@10", "test/ndcg@10"),
    "positions/s": ("positions_per_second", "train/positions_per_second"),
}
"""Label of each panel of the learning curves → the keys of the history that it draws."""
METRICS = ("recall@10", "ndcg@10", "mrr@10", "coverage@10")
GROUPS = {
    "history": "events in the history",
    "item": "popularity of the target",
    "user": "training events of the user",
}
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#97bbf5")


def learning_curves(
    history: Sequence[Mapping[str, float]],
    path: Path,
    *,
    title: str = "Learning curves",
    panels: Mapping[str, Sequence[str]] = PANELS,
) -> Path:
    """Draw one row a completed epoch (`epoch` and its metrics), a panel for each thing measured.

    A panel whose keys never occur is left out. Raises InputError where that leaves none.
    """
    met = {key for row in history for key in row}
    drawn = {label: [key for key in keys if key in met] for label, keys in panels.items()}
    drawn = {label: keys for label, keys in drawn.items() if keys}
    if not drawn:
        raise InputError(f"no metric to draw; met {sorted(met)}, expected some of {dict(panels)}")
    with drawing(path, title, len(drawn)) as axes:
        for axis, (label, keys) in zip(axes, drawn.items(), strict=True):
            _curves(axis, history, keys)
            axis.set(xlabel="epoch", ylabel=label)
    return path


def _curves(axis: Axes, history: Sequence[Mapping[str, float]], keys: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for key, colour in zip(keys, _colours(len(keys)), strict=True):
        points = [
            (row.get("epoch", place), row[key]) for place, row in enumerate(history) if key in row
        ]
        axis.plot(*zip(*points, strict=True), color=colour, label=key, marker=".", markersize=4)
    axis.yaxis.set_major_formatter("{x:,.6g}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(keys) > 1:
        axis.legend(frameon=False)
    else:
        axis.set_title(keys[0], fontsize=9, color="#666666")
    if "loss" not in keys[0]:
        axis.axhline(0, color="none")  # The axis starts at nothing, as lengths should compare.


def slice_bars(
    evaluations: Mapping[str, Evaluation], path: Path, *, metric: str = "ndcg@10"
) -> Path:
    """Draw a metric by history length, item popularity and newcomers, one colour a scorer.

    A group of a single bucket says nothing and is left out. Raises InputError where that is all.
    """
    first = next(iter(evaluations.values()))
    groups = {group: buckets for group, buckets in first.slices.items() if len(buckets) > 1}
    if not groups:
        raise InputError("no slices to draw; evaluate with details, and more than one bucket")
    title = f"{metric} by slice: {first.dataset}, {first.part}"
    with drawing(path, title, len(groups)) as axes:
        for axis, (group, buckets) in zip(axes, groups.items(), strict=True):
            heights = {
                name: [evaluation.slices[group][bucket][metric] for bucket in buckets]
                for name, evaluation in evaluations.items()
            }
            users = [f"{bucket}\n{int(values['users']):,}" for bucket, values in buckets.items()]
            _bars(axis, users, heights)
            axis.set(xlabel=f"{GROUPS.get(group, group)}; users in each", ylabel=metric)
        handles, labels = axes[0].get_legend_handles_labels()
        whole_of(axes[0]).legend(
            handles, labels, loc="outside lower center", ncols=6, frameon=False
        )
    return path


def scorer_bars(
    evaluations: Mapping[str, Evaluation], path: Path, *, metrics: Sequence[str] = METRICS
) -> Path:
    """Draw several scorers side by side, a panel for each metric as their scales differ."""
    first = next(iter(evaluations.values()))
    seen = "removed" if first.exclude_seen else "kept"
    title = f"{first.dataset}, {first.part}: {first.users:,} users, all items, seen {seen}"
    with drawing(path, title, len(metrics)) as axes:
        for axis, metric in zip(axes, metrics, strict=True):
            values = [evaluation.metrics.get(metric, 0.0) for evaluation in evaluations.values()]
            bars = axis.barh(list(evaluations), values, color=_colours(len(values)), height=0.7)
            axis.bar_label(bars, fmt="%.4f", fontsize=8, padding=2)
            axis.grid(False, axis="y")
            axis.grid(axis="x", color="#e5e5e5", linewidth=0.8)
            axis.set(xlabel=metric, xlim=(0, 1.2 * max(*values, 1e-9)))
            axis.invert_yaxis()
        for axis in axes[1:]:
            axis.tick_params(axis="y", labelleft=False)
        axes[0].set_ylabel("scorer")
    return path


def _bars(axis: Axes, labels: Sequence[str], heights: Mapping[str, Sequence[float]]) -> None:
    """Draw a group of bars at each label, one bar a name."""
    width = 0.8 / len(heights)
    places = np.arange(len(labels))
    pairs = zip(heights.items(), _colours(len(heights)), strict=True)
    for index, ((name, values), colour) in enumerate(pairs):
        left = places - 0.4 + (index + 0.5) * width
        axis.bar(left, values, width, color=colour, label=name)
    axis.set_xticks(places, labels)


def whole_of(axis: Axes) -> Figure:
    """Return the picture that an axes belongs to."""
    figure: Any = axis.figure
    return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


@contextmanager
def drawing(path: Path, title: str, panels: int) -> Iterator[Sequence[Axes]]:
    """Yield one axes a panel, and save the picture when the block ends well."""
    # No pyplot: its global state keeps figures alive and looks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(4.4 * panels, 3.8), layout=layout)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
    yield axes
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    try:
        figure.savefig(scratch, dpi=120, format="png")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
