"""Tables and pictures of the training benchmark's rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

Row = dict[str, Any]
OURS = "recsys train"
BARE = "bare loop"
OURS_IS = {"our full is": "full_softmax", "our sampled is": "sampled_softmax"}
FIGURES = (
    *("positions_per_second", "epoch_seconds", "epochs", "peak_memory_gib", "rank_seconds"),
    *("minutes", "recall@10", "ndcg@10"),
)
AXES = {"seconds_a_step": "seconds a step", "peak_memory_gib": "peak memory, GiB"}


def ours_beside(row: Row, rows: Iterable[Row], loss: str) -> float | None:
    """Return how many times a row's positions a second ours with `loss` reached in its round."""
    wanted = row["dataset"], row["round"], OURS, loss
    alike = [r for r in rows if (r["dataset"], r["round"], r["side"], r["loss"]) == wanted]
    if not alike or alike[0] is row or "error" in row or "error" in alike[0]:
        return None
    return float(alike[0]["positions_per_second"] / row["positions_per_second"])


def training_table(rows: list[Row], dataset: str) -> Table:
    """Return one dataset's table, medians of its rounds; an extrapolated epoch has a tilde."""
    table = Table(title=f"{dataset}: training side by side", box=box.SIMPLE, title_justify="left")
    table.add_column("side", no_wrap=True)
    table.add_column("loss", no_wrap=True)
    for name in ("positions/s", *OURS_IS, "epoch s", "epochs", "GiB", "ranking s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("minutes", "R@10", "NDCG@10"):
        table.add_column(name, justify="right", no_wrap=True)
    mine = [row for row in rows if row["dataset"] == dataset]
    for side, loss in dict.fromkeys((row["side"], row["loss"]) for row in mine):
        some = [row for row in mine if (row["side"], row["loss"]) == (side, loss)]
        table.add_row(side, loss.removesuffix("_softmax"), *cells(some, mine))
    return table


def cells(some: list[Row], rows: list[Row]) -> list[str]:
    """Return the figures of one side's rounds; ratios are of each round, least and greatest."""
    good = [row for row in some if "error" not in row]
    if not good:
        return ["none"]
    middle = {name: median(r[name] for r in good) for name in FIGURES if name in good[0]}
    about = "~" if middle.get("epochs", 1) < 1 else ""
    return [
        f"{middle['positions_per_second']:,.0f}",
        *(times([ours_beside(row, rows, loss) for row in good]) for loss in OURS_IS.values()),
        f"{about}{middle['epoch_seconds']:,.1f}",
        shown(middle.get("epochs"), ".2f"),
        shown(middle.get("peak_memory_gib"), ".2f"),
        shown(middle.get("rank_seconds"), ".2f"),
        shown(middle.get("minutes"), ".1f"),
        shown(middle.get("recall@10"), ".4f"),
        shown(middle.get("ndcg@10"), ".4f"),
    ]


def times(ratios: list[float | None]) -> str:
    """Return the middle ratio, and behind it the least and the greatest of several.

    >>> times([2.0, 4.0, 3.0]), times([2.0]), times([None])
    ('3.00× (2.0 to 4.0)', '2.00×', '')
    """
    found = [ratio for ratio in ratios if ratio is not None]
    if not found:
        return ""
    spread = f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""
    return f"{median(found):.2f}×{spread}"


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def reasons(rows: list[Row]) -> str:
    """Return why some rows have no figures, a line each."""
    names = ("dataset", "side", "loss", "items", "length")
    return "\n".join(
        " ".join(
            f"{row[name]:,}" if isinstance(row[name], int) else row[name]
            for name in names
            if name in row
        )
        + f": no figures: {row['error']}"
        for row in rows
        if "error" in row
    )


def overhead_line(rows: list[Row]) -> str:
    """Return what the framework costs over the bare loop, measured in turn."""
    lines = [
        f"{row['dataset']}: Lightning over the bare loop {row['overhead']:+.1%} "
        f"(quartiles {row['overhead_quartiles'][0]:+.1%} to {row['overhead_quartiles'][1]:+.1%}, "
        f"{row['pairs']} pairs of blocks)"
        for row in rows
        if "overhead" in row
    ]
    return "\n".join(lines)


def quality_picture(rows: list[Row], file: Path) -> Path | None:
    """Draw NDCG@10 on the test users against minutes of training, a panel a dataset."""
    drawn = [row for row in rows if any("ndcg@10" in p for p in row.get("points", []))]
    names = list(dict.fromkeys(row["dataset"] for row in drawn))
    if not names:
        return None
    figure, panels = panels_of(len(names))
    for panel, name in zip(panels, names, strict=True):
        for row in (r for r in drawn if r["dataset"] == name):
            minutes = [point["seconds"] / 60 for point in row["points"]]
            style = "--" if row["loss"] == "sampled_softmax" else "-"
            label = f"{row['side']}, {row['loss'].removesuffix('_softmax')}"
            width = 2.5 if row["side"] == OURS else 1.2
            gains = [point["ndcg@10"] for point in row["points"]]
            panel.plot(minutes, gains, style, marker=".", linewidth=width, label=label)
        panel.set(title=name, xlabel="minutes of training", ylabel="test NDCG@10")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)
    return saved(figure, file)


def scale_table(rows: list[Row]) -> Table:
    """Return what a step costs as the catalogue and the history grow."""
    table = Table(title="What a step costs", box=box.SIMPLE, title_justify="left")
    table.add_column("loss")
    for name in ("items", "length", "histories", "s a step", "positions/s", "peak GiB"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = [f"{row[name]:,}" for name in ("items", "length", "rows")]
        figures = ["none"] if "error" in row else scale_cells(row)
        table.add_row(row["loss"].removesuffix("_softmax"), *sizes, *figures)
    return table


def scale_cells(row: Row) -> list[str]:
    rate, memory = row["positions_per_second"], row["peak_memory_gib"]
    return [f"{row['seconds_a_step']:.3f}", f"{rate:,.0f}", f"{memory:.2f}"]


def scale_picture(rows: list[Row], file: Path) -> Path | None:
    """Draw seconds a step and peak memory against catalogue size and against history length."""
    good = [row for row in rows if "error" not in row]
    if not good:
        return None
    figure, panels = panels_of(4)
    wanted = [(x, y) for x in ("items", "length") for y in ("seconds_a_step", "peak_memory_gib")]
    for panel, (x, y) in zip(panels, wanted, strict=True):
        for loss in dict.fromkeys(row["loss"] for row in good):
            some = [row for row in good if (row["curve"], row["loss"]) == (x, loss)]
            if some:
                panel.plot([r[x] for r in some], [r[y] for r in some], marker="o", label=loss)
        panel.set(
            xlabel="items" if x == "items" else "history length",
            ylabel=AXES[y],
            xscale="log",
            yscale="log",
        )
        panel.legend(fontsize=7)
    return saved(figure, file)


def panels_of(count: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, count, figsize=(5 * count, 4), squeeze=False)
    return figure, list(panels[0])


def saved(figure: Any, file: Path) -> Path:
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    return file
