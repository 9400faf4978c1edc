"""Tables and pictures of the training benchmark's rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

Row = dict[str, Any]
OURS = "recsys train"
BARE = "bare loop"
AXES = {"seconds_a_step": "seconds a step", "peak_memory_gib": "peak memory, GiB"}


def ours_beside(row: Row, rows: Iterable[Row]) -> float | None:
    """Return how many times the positions a second of `row` our command reached, same loss."""
    alike = [
        r
        for r in rows
        if (r["dataset"], r["side"], r["loss"]) == (row["dataset"], OURS, row["loss"])
    ]
    if not alike or "error" in row or "error" in alike[0]:
        return None
    return float(alike[0]["positions_per_second"] / row["positions_per_second"])


def training_table(rows: list[Row], dataset: str) -> Table:
    """Return one dataset's table; an epoch that was extrapolated has a tilde."""
    table = Table(title=f"{dataset}: training side by side", box=box.SIMPLE, title_justify="left")
    table.add_column("side", no_wrap=True)
    table.add_column("loss", no_wrap=True)
    for name in ("positions/s", "ours is", "epoch s", "epochs", "GiB", "ranking s"):
        table.add_column(name, justify="right")
    for name in ("minutes", "R@10", "NDCG@10"):
        table.add_column(name, justify="right")
    for row in (r for r in rows if r["dataset"] == dataset):
        table.add_row(row["side"], row["loss"].removesuffix("_softmax"), *cells(row, rows))
    return table


def cells(row: Row, rows: list[Row]) -> list[str]:
    if "error" in row:
        return ["none"]
    times = ours_beside(row, rows)
    about = "~" if row.get("epochs", 1) < 1 else ""
    return [
        f"{row['positions_per_second']:,.0f}",
        f"{times:.2f}×" if times else "",
        f"{about}{row['epoch_seconds']:,.1f}",
        shown(row.get("epochs"), ".2f"),
        shown(row.get("peak_memory_gib"), ".2f"),
        shown(row.get("rank_seconds"), ".2f"),
        shown(row.get("minutes"), ".1f"),
        shown(row.get("recall@10"), ".4f"),
        shown(row.get("ndcg@10"), ".4f"),
    ]


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
