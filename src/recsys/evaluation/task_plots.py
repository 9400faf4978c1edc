"""Pictures of a ranker's tasks, as PNG files: what its probabilities are worth, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.evaluation.importance import Drop
from recsys.evaluation.plots import COLOURS, drawing, whole_of
from recsys.schema import InputError
from recsys.task_metrics import BINS, REGRESSION, Bins, Floats, ece, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_COLUMNS = 20
GREY = "#999999"


def reliability_plot(
    probabilities: Mapping[str, Floats],
    label_RT: Floats,
    tasks: Sequence[str],
    path: Path,
    *,
    title: str = "Reliability",
    bins: int = BINS,
) -> Path:
    """Draw how often what was promised came true, a panel a binary task, a colour a name.

    `probabilities` maps a name, such as `before` and `after` calibration, to [R, T]. Bars say how
    far chance alone moves a bin (95 %); below is how often each probability was given. Raises
    InputError where no binary task has a label.
    """
    drawn = [
        (place, task)
        for place, task in enumerate(tasks)
        if task not in REGRESSION and not np.isnan(label_RT[:, place]).all()
    ]
    if not drawn:
        raise InputError(f"no binary task with labels to draw among {', '.join(tasks)}")
    with drawing(path, title, len(drawn)) as axes:
        whole_of(axes[0]).set_figheight(5.6)
        for axis, (place, task) in zip(axes, drawn, strict=True):
            known_R = ~np.isnan(label_RT[:, place])
            given = {name: p_RT[known_R, place] for name, p_RT in probabilities.items()}
            _reliability(axis, given, label_RT[known_R, place], bins)
            axis.set_title(f"{task}: {int(known_R.sum()):,} shown", fontsize=10)
        axes[0].set_ylabel("share that came true")
    return path


def _reliability(axis: Axes, given: Mapping[str, Floats], label_R: Floats, bins: int) -> None:
    found = {name: reliability(p_R, label_R, bins) for name, p_R in given.items()}
    most = 1.08 * max(max(f.predicted.max(), f.observed.max()) for f in found.values())
    axis.plot([0, most], [0, most], color=GREY, linewidth=1, linestyle="--")
    below = axis.inset_axes((0, -0.24, 1, 0.18), sharex=axis)
    for (name, one), colour in zip(found.items(), COLOURS, strict=False):
        label = f"{name}, ECE {ece(given[name], label_R, bins):.4f}"
        axis.errorbar(one.predicted, one.observed, _chance(one), color=colour, label=label, **DOTS)
        below.hist(given[name], np.linspace(0, most, 41).tolist(), color=colour, alpha=0.55)
    axis.set(xlim=(0, most), ylim=(0, most))
    axis.tick_params(axis="x", labelbottom=False)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    _below(below)


DOTS: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8}


def _chance(bins: Bins) -> Floats:
    """Return 1.96 standard errors of each bin's share, by Agresti and Coull (1998): [K]."""
    share_K = (bins.observed * bins.rows + 2) / (bins.rows + 4)
    return 1.96 * np.sqrt(share_K * (1 - share_K) / (bins.rows + 4))


def _below(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set(xlabel="probability given", yscale="log")
    axis.set_ylabel("rows", fontsize=8)
    axis.tick_params(labelsize=8)


def importance_plot(
    drops: Mapping[str, Mapping[str, Drop]],
    path: Path,
    *,
    title: str = "Permutation importance",
    most: int = MOST_COLUMNS,
) -> Path:
    """Draw the fall of each task's metric when a column is shuffled, a panel a task.

    At most `most` columns are drawn, those that matter most to any task; whiskers are one standard
    deviation over the repeats. Raises InputError where there is no column.
    """
    names = _foremost(drops, most)
    if not names:
        raise InputError("no column to draw; declare some under `features`")
    with drawing(path, title, len(drops)) as axes:
        whole_of(axes[0]).set_figheight(1.4 + 0.26 * len(names))
        for axis, (task, found) in zip(axes, drops.items(), strict=True):
            _drops(axis, [found[name] for name in names], names)
            unit = "rise of mean absolute error, s" if task in REGRESSION else "fall of AUC"
            axis.set(xlabel=unit, title=task)
        for axis in axes[1:]:
            axis.tick_params(axis="y", labelleft=False)
    return path


def _foremost(drops: Mapping[str, Mapping[str, Drop]], most: int) -> list[str]:
    """Return the columns by their greatest share of any task's greatest fall."""
    share: dict[str, float] = {}
    for found in drops.values():
        top = max((drop.mean for drop in found.values()), default=0.0)
        for name, drop in found.items():
            share[name] = max(share.get(name, 0.0), drop.mean / top if top > 0 else 0.0)
    return sorted(share, key=lambda name: -share[name])[:most]


def _drops(axis: Axes, found: Sequence[Drop], names: Sequence[str]) -> None:
    means, spread = [drop.mean for drop in found], [drop.sd for drop in found]
    axis.barh(names, means, xerr=spread, color=COLOURS[0], height=0.7, ecolor="#555555")
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.grid(False, axis="y")
    axis.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.locator_params(axis="x", nbins=5)
