"""Train rankers beside FuxiCTR, DeepCTR-Torch and Torch-RecHub: same prepared rows, one by one.

    python scripts/bench_ranking.py                          # MovieLens latest-small, all sides
    python scripts/bench_ranking.py --sides ours fuxictr --rounds 3

The target is a rating of 4 or more; train, validation and test follow each other in time, 80, 10
and 10 % of the rows, and a row's history is what its user rated strictly before, and how: the other
libraries read the mean of the ratings' vectors, ours each event's, the newest left out. Each has an
environment of its own, made here once, its own trainer, loader and sizes; the same for all are
embeddings of 16, Adam at 0.001, the batch, and stopping when validation AUC has not risen twice.
Ours is the real `recsys train`. One function computes the figures of all sides from what they
predict for the test rows. A rate is of training rows; evaluation is left out of everyone's clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from bench.ctr_rows import PARTS, CtrRows, CtrSettings, coded
from bench.environments import Library, NotInstalled, python_of
from bench.ours import Failed, Home
from bench.protocol import driver_environment
from recsys.artifacts import Workspace
from recsys.data.dataset import Dataset
from recsys.data.examples import Cut, Examples, rated
from recsys.evaluation.significance import Interval
from recsys.evaluation.task_significance import auc_difference
from recsys.history import value_bucket
from recsys.task_metrics import task_metrics

HERE = Path(__file__).resolve().parent / "bench"
PLAIN = ["model/heads=shared_bottom", "model.numbers=16"]
"""One network behind, as their papers have, and few units that read the three numbers."""
MEAN = ["model.values=true", "model.gaps=false", "model.event_types=false"]
"""Of the path's events what the other libraries' DCNv2 reads: their mean, and what was rated."""
OURS = {
    "DCNv2": ["model/path=mean", "model/crossing=dcnv2", *MEAN, *PLAIN],
    "DIN": ["model/path=din", "model/crossing=mlp", "model.values=true", *PLAIN],
    "default": ["model.values=true"],
}
"""What `recsys train` is given for each of ours besides COMMON: crossing, path, and both.

Validation AUC does not tell PLAIN from experts and 64 units (DCNv2 .6565 and .6563, three seeds;
DIN .7551 and .7563, five, of which the difference is .0012 with a standard error of .0019).
"""
COMPARED = "DIN"
"""Which of ours all others' AUC is held against."""
COMMON = ["model=ranker", "batches=shown", "features=movielens", "examples=rated"]
LIBRARIES = (
    Library("FuxiCTR", ("fuxictr==2.3.10",), "ctr_fuxictr.py", ("dcnv2", "din")),
    Library(
        "DeepCTR-Torch", ("deepctr-torch==0.3.0", "requests"), "ctr_deepctr.py", ("dcnv2", "din")
    ),
    Library("Torch-RecHub", ("torch-rechub==0.9.0",), "ctr_rechub.py", ("dcnv2", "din")),
)
LENGTH, GENRES = 50, 5
CUT = Cut(validation_share=0.1, test_share=0.1)
Row = dict[str, Any]
Measure = Callable[[CtrSettings], Row]
console = Console(width=max(150, Console().width))


@dataclass(frozen=True)
class Bench:
    """What is the same for every side."""

    given: argparse.Namespace
    out: Path
    dataset: Dataset
    rows: CtrRows
    users_R: NDArray[np.int64]

    @property
    def labels_R(self) -> NDArray[np.float32]:
        return self.rows.columns("test")["label"]


def rows_of(dataset: Dataset, examples: Examples) -> CtrRows:
    """Return examples as prepared rows: codes of what training rows hold, and histories."""
    requests = examples.request_of_row()
    part_R = np.zeros(len(requests), np.int8)
    for code, name in enumerate(PARTS):
        part_R[examples.rows(name)] = code
    users_R, times_R = examples.users[requests], examples.times[requests]
    items_R = coded(examples.items, part_R == 0)
    code_of = np.ones(dataset.num_items + 1, np.int64)
    code_of[examples.items] = items_R
    histories, ratings, lengths = histories_of(dataset, examples, code_of)
    hours = times_R // 3_600_000
    return CtrRows(
        part=part_R,
        users=coded(users_R, part_R == 0),
        items=items_R,
        hours=hours % 24,
        # 1 January 1970 was a Thursday.
        weekdays=(hours // 24 + 3) % 7,
        histories=histories[requests],
        lengths=lengths[requests],
        ratings=ratings[requests],
        labels=examples.labels[:, 0],
        item_genres=genres_of(dataset, code_of),
    )


def histories_of(
    dataset: Dataset, examples: Examples, code_of: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Return each request's newest item and rating codes [Q, L], and how many there are."""
    known = np.maximum(examples.users, 0)
    paths = dataset.histories(known, examples.places, LENGTH)
    lengths = np.diff(paths.offsets)
    items, ratings = np.zeros((2, len(lengths), LENGTH), np.int32)
    there = np.arange(LENGTH) < lengths[:, None]
    items[there], ratings[there] = code_of[paths.items], value_bucket(paths.values)
    return items, ratings, lengths


def genres_of(dataset: Dataset, code_of: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return genre codes by item code, most first GENRES of each: int32 [N + 2, GENRES]."""
    table = np.zeros((int(code_of.max()) + 1, GENRES), np.int32)
    names: dict[str, int] = {}
    for code, genres in zip(code_of[1:], dataset.items["genres"].to_pylist(), strict=True):
        if code > 1:
            codes = [names.setdefault(name, len(names) + 2) for name in (genres or [])[:GENRES]]
            table[code, : len(codes)] = codes
    return table


def prepared(given: argparse.Namespace, out: Path) -> Bench:
    """Prepare the dataset as a person would, and write the rows that all others read."""
    home = Home(out / "recsys-home", given.threads, "movielens")
    home.root.mkdir(parents=True, exist_ok=True)
    words = ["data=movielens", f"data.path={Path(given.movielens).resolve()}", "--json"]
    if home.recsys("prepare", *words).wait():
        raise Failed(home.said("prepare"))
    line = (home.root / "movielens-prepare.log").read_text().splitlines()[-1]
    dataset = Dataset(Workspace(home.root).find("dataset", json.loads(line)["dataset"]))
    examples = rated(dataset, cut=CUT)
    rows = rows_of(dataset, examples)
    rows.save(out / "rows.npz")
    users_R = examples.users[examples.request_of_row()][examples.rows("test")]
    return Bench(given, out, dataset, rows, users_R)


def sides(bench: Bench) -> Iterator[tuple[str, str, Measure]]:
    """Yield each side, its model, and what measures one round of it."""
    if "ours" in bench.given.sides:
        for name, words in OURS.items():
            yield "recsys", name, partial(measure_ours, bench, words)
    for library in LIBRARIES:
        if library.name.lower() in bench.given.sides:
            for model in library.losses:
                yield library.name, model, partial(measure_library, bench, library)


def measure_ours(bench: Bench, words: list[str], settings: CtrSettings) -> Row:
    """Train a run, and predict the test rows with it."""
    folder = Path(settings.folder)
    home = Home(bench.out / "recsys-home", settings.threads, folder.name)
    run = f"{folder.name}-{os.getpid()}"
    shares = (f"examples.cut.{part}_share=0.1" for part in ("validation", "test"))
    trained = [
        f"name={run}",
        f"data.dataset={bench.dataset.path.name}",
        f"seed={settings.seed}",
        f"model.dim={settings.embedding}",
        f"model.max_length={LENGTH}",
        f"batches.size={settings.batch}",
        f"optimizer.lr={settings.lr}",
        f"patience={settings.patience}",
        f"trainer.max_epochs={settings.epochs}",
        "trainer=cpu",
        *shares,
    ]
    if home.recsys("train", *COMMON, *words, *trained, *bench.given.ours, "--json").wait():
        raise Failed(home.said("train"))
    path = home.root / "runs" / run
    file = folder / "test.npy"
    asked = json.dumps({"run": str(path), "predictions": str(file)})
    command = [sys.executable, str(HERE / "ctr_ours.py"), asked]
    answer = subprocess.run(command, env=home.environment, capture_output=True, text=True)
    if answer.returncode:
        raise Failed(" ".join(answer.stderr.splitlines()[-3:]))
    history = json.loads((path / "manifest.json").read_text())["history"]
    return {
        "rows_per_second": median(epoch["train/positions_per_second"] for epoch in history),
        "epochs": len(history),
        "peak_memory_gib": history[-1]["train/peak_memory_gib"],
        "predictions": str(file),
    }


def measure_library(bench: Bench, library: Library, settings: CtrSettings) -> Row:
    """Run the library's driver in its own environment; return what it printed last."""
    python = python_of(library, bench.given.torch, Path(bench.given.envs).resolve())
    environment = driver_environment(settings.threads)
    environment.pop("PYTHONPATH")
    command = [str(python), str(HERE / library.driver), settings.as_json()]
    log = Path(settings.folder) / "driver.log"
    with log.open("w") as errors:
        answer = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    if answer.returncode:
        lines = log.read_text(errors="replace").splitlines() or ["it said nothing"]
        raise Failed(f"driver failed, see {log}: {lines[-1]}")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def measured(bench: Bench) -> list[Row]:
    """Measure every side in turn, round by round, keeping rows as they come."""
    rows: list[Row] = []
    for number in range(bench.given.rounds):
        for side, model, measure in sides(bench):
            console.print(f"{datetime.now():%H:%M:%S} round {number + 1}: {side}, {model}")
            rows.append(one_of(bench, side, model, number, measure))
            facts = {"machine": machine(bench.given), "rows": rows}
            (bench.out / "ranking.json").write_text(json.dumps(facts, indent=1))
    return rows


def one_of(bench: Bench, side: str, model: str, number: int, measure: Measure) -> Row:
    folder = bench.out / "ranking" / f"{side}-{model}-{number}".lower()
    folder.mkdir(parents=True, exist_ok=True)
    given = bench.given
    settings = CtrSettings(
        rows=str(bench.out / "rows.npz"),
        folder=str(folder),
        model=model,
        batch=given.batch,
        epochs=given.epochs,
        threads=given.threads,
        seed=given.seed + number,
    )
    try:
        row = measure(settings)
    except (Failed, NotInstalled) as error:
        return {"side": side, "model": model, "round": number, "error": str(error)}
    return {**row, "side": side, "model": model, "round": number, **quality(bench, row)}


def quality(bench: Bench, row: Row) -> Row:
    """Return AUC, grouped AUC, log loss and ECE of the test rows."""
    predicted_RT = np.clip(np.load(row["predictions"]), 0, 1)[:, None]
    labels_RT = bench.labels_R[:, None]
    found = task_metrics(predicted_RT, labels_RT, ["like"], bench.users_R)
    return {name.removeprefix("like/"): value for name, value in found.items()}


def table(bench: Bench, rows: list[Row]) -> Table:
    """Return medians over rounds; beside each how much faster our like model trains, by round."""
    title = f"{bench.dataset.name}: {len(bench.rows.labels):,} rows, medians of rounds"
    found = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in ("side", "model"):
        found.add_column(name, no_wrap=True)
    for name in ("rows/s", "ours is", "epochs", "AUC", "gAUC", "log loss", "ECE", "GiB"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column(f"our {COMPARED}'s AUC\nless theirs, 95 %", justify="right", no_wrap=True)
    for side, model in dict.fromkeys((row["side"], row["model"]) for row in rows):
        some = [row for row in rows if (row["side"], row["model"]) == (side, model)]
        found.add_row(side, model, *cells(bench, some, rows))
    return found


def cells(bench: Bench, some: list[Row], rows: list[Row]) -> list[str]:
    good = [row for row in some if "error" not in row]
    if not good:
        return ["none"]
    middle = {name: median(row[name] for row in good) for name in good[0] if numeric(good[0], name)}
    figures = (f"{middle[name]:.4f}" for name in ("auc", "gauc", "log_loss", "ece"))
    return [
        f"{middle['rows_per_second']:,.0f}",
        times(good, rows),
        f"{middle['epochs']:.0f}",
        *figures,
        f"{middle['peak_memory_gib']:.2f}",
        "\n".join(ahead(bench, row, rows) for row in good),
    ]


def numeric(row: Row, name: str) -> bool:
    return isinstance(row[name], int | float)


def ours_by_round(rows: list[Row], model: str) -> dict[int, Row]:
    """Return the rows of one of our models by round."""
    ours = (row for row in rows if row["side"] == "recsys" and row["model"].lower() == model)
    return {row["round"]: row for row in ours if "error" not in row}


def times(good: list[Row], rows: list[Row]) -> str:
    """Return the middle ratio of the rate of our like model to theirs, least and greatest."""
    ours = ours_by_round(rows, good[0]["model"].lower())
    pairs = [(ours[row["round"]], row) for row in good if row["round"] in ours]
    found = [our["rows_per_second"] / row["rows_per_second"] for our, row in pairs]
    if not found or good[0]["side"] == "recsys":
        return ""
    return f"{median(found):.1f}× ({min(found):.1f} to {max(found):.1f})"


def ahead(bench: Bench, row: Row, rows: list[Row]) -> str:
    """Return AUC of ours less this row's, by a bootstrap over users, of the same round."""
    our = ours_by_round(rows, COMPARED.lower()).get(row["round"])
    if our is None or our is row:
        return ""
    scores = (np.load(one["predictions"]) for one in (row, our))
    found: Interval = auc_difference(*scores, bench.labels_R, bench.users_R)
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def machine(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "arguments": vars(given),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = ["ours", *(library.name.lower() for library in LIBRARIES)]
    parser.add_argument("--movielens", default="../shared/data/ml-latest-small")
    parser.add_argument("--sides", nargs="+", default=names, choices=names)
    parser.add_argument("--ours", nargs="+", default=[], help="more settings of recsys train")
    parser.add_argument("--rounds", type=int, default=1, help="each with a seed of its own")
    parser.add_argument("--batch", type=int, default=1024, help="rows a step")
    parser.add_argument("--epochs", type=int, default=30, help="at most")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="workspace/benchmarks")
    parser.add_argument("--envs", default="workspace/bench-envs", help="of the other libraries")
    parser.add_argument("--torch", default="torch==2.13.0", help="for every environment")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    out = Path(given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    bench = prepared(given, out)
    rows = measured(bench)
    console.print(table(bench, rows))
    for row in (row for row in rows if "error" in row):
        console.print(f"{row['side']}, {row['model']}: {row['error']}", markup=False)
    console.print(f"{len(rows)} rows: {out / 'ranking.json'}")


if __name__ == "__main__":
    main()
