"""Time training beside RecTools, RecBole and RePlay: same data, sizes and protocol, one by one.

    python scripts/bench_training.py                 # speed, memory, quality after 6 minutes each
    python scripts/bench_training.py --minutes 0     # no quality: a minute of training each
    python scripts/bench_training.py --minutes 0 --seconds 20 --rounds 5   # ratios of every round
    python scripts/bench_training.py --scale         # a step's cost by catalogue and history length

Each library runs in a virtual environment of its own, made here once. Ours is the real `recsys
train`: Lightning, validation each epoch, checkpoints and MLflow are part of its minutes, while the
others' clocks stop when they are ranked. A position is one real next item that is trained on,
padding left out. Sequences are leave-one-out; every item is ranked, seen ones removed; one function
computes quality from all sides' top-10 lists.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench import ours, report
from bench.environments import LIBRARIES, Library, NotInstalled, python_of
from bench.protocol import TOP, Sequences, Settings, driver_environment, quality

HERE = Path(__file__).resolve().parent / "bench"
CATALOGUES = (10_000, 100_000, 1_000_000, 5_000_000)
LENGTHS = (50, 200, 1_000, 4_000)
STEP_POSITIONS = 128 * 50
"""Positions of a step on the cost curves: 128 histories of 50, fewer where they are longer."""
console = Console(width=max(160, Console().width))


@dataclass(frozen=True)
class Data:
    """One dataset of the benchmark, and the sizes that go with it."""

    name: str
    file: Path
    has_users: bool
    length: int
    dropout: float


def datasets(given: argparse.Namespace) -> list[Data]:
    every = [
        Data("beauty", Path(given.beauty), True, 50, 0.5),
        Data("movielens-1m", Path(given.movielens), False, 200, 0.2),
    ]
    return [data for data in every if data.name in given.datasets]


def side_by_side(given: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Measure every side on every dataset, one after the other, keeping rows as they come."""
    rows: list[dict[str, Any]] = []
    for data in datasets(given):
        if not data.file.is_file():
            rows.append(blank(data.name, report.OURS, "", f"{data.file}: no such file"))
            continue
        sequences = Sequences.read(data.file, data.has_users)
        for round_, side, loss, measure in measures(given, data, sequences, out):
            console.print(f"{datetime.now():%H:%M:%S} {data.name}: {side}, {loss}")
            row = finished(data.name, side, loss, measure, sequences, given.minutes > 0)
            rows.append({**row, "round": round_})
            write(out / "training.json", {"machine": machine(given), "rows": rows})
        console.print(report.training_table(rows, data.name))
    said(report.overhead_line(rows), report.reasons(rows))
    report.quality_picture(rows, out / "training.png")
    return rows


def said(*texts: str) -> None:
    for text in texts:
        if text:
            console.print(text, markup=False, highlight=False)


def measures(
    given: argparse.Namespace, data: Data, sequences: Sequences, out: Path
) -> Iterator[tuple[int, str, str, Callable[[], dict[str, Any]]]]:
    """Yield each row's round, side and loss, and what measures it."""
    home = ours.Home(out / "recsys-home", given.threads, data.name)
    home.root.mkdir(parents=True, exist_ok=True)
    dataset = home.prepare(data.file.resolve(), data.has_users)
    sequences.save(out / f"{data.name}.npz")
    for round_ in range(1, given.rounds + 1):
        of_round = out / "rounds" / str(round_)
        for one in measures_of_round(given, data, sequences, of_round, home, dataset):
            yield round_, *one


def measures_of_round(
    given: argparse.Namespace,
    data: Data,
    sequences: Sequences,
    out: Path,
    home: ours.Home,
    dataset: str,
) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Yield the sides one after the other: what a round compares lies minutes apart."""
    asked = settings_of(given, data, out)
    if "recsys" in given.sides:
        for loss in given.losses:
            settings = placed(asked, out, data.name, "recsys", loss)
            if loss == "sampled_softmax":
                settings = replace(settings, ours=(*settings.ours, *given.ours_sampled))
            yield report.OURS, loss, bound(ours.measure, home, dataset, sequences, settings)
    if "bare" in given.sides:
        settings = placed(asked, out, data.name, "bare", "full_softmax")
        settings = replace(settings, seconds=given.seconds, points=1)
        call = bound(ours.overhead, home, dataset, sequences, settings)
        yield report.BARE, "full_softmax", call
    for library in LIBRARIES:
        if library.name.lower() in given.sides:
            for loss in (name for name in library.losses if name in given.losses):
                settings = placed(asked, out, data.name, library.name.lower(), loss)
                yield title(library), loss, bound(measure_library, library, settings, given)


def bound(function: Callable[..., dict[str, Any]], *arguments: Any) -> Callable[[], dict[str, Any]]:
    return lambda: function(*arguments)


def title(library: Library) -> str:
    return f"{library.name} {library.requirements[0].split('==')[1]}"


def settings_of(given: argparse.Namespace, data: Data, out: Path) -> Settings:
    return Settings(
        data=str(Path(given.out).resolve() / f"{data.name}.npz"),
        folder=str(out),
        length=data.length,
        dropout=data.dropout,
        seconds=max(given.seconds, given.minutes * 60),
        points=given.points if given.minutes else 1,
        threads=given.threads,
        seed=given.seed,
        ours=tuple(given.ours),
    )


def placed(asked: Settings, out: Path, data: str, side: str, loss: str) -> Settings:
    """Return the settings of one row, with a folder of its own."""
    folder = out / f"{data}-{side}-{loss}-{out.name}"
    folder.mkdir(parents=True, exist_ok=True)
    return replace(asked, folder=str(folder), loss=loss)


def measure_library(
    library: Library, settings: Settings, given: argparse.Namespace
) -> dict[str, Any]:
    """Run the library's driver in its own environment; return what it printed last."""
    python = python_of(library, given.torch, Path(given.envs).resolve())
    environment = driver_environment(settings.threads)
    environment.pop("PYTHONPATH")
    command = [str(python), str(HERE / library.driver), settings.as_json()]
    log = Path(settings.folder) / "driver.log"
    with log.open("w") as errors:
        answer = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            timeout=2 * settings.seconds + 3600,
        )
    if answer.returncode:
        raise ours.Failed(f"driver failed, see {log}: {last_line(log)}")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"


def finished(
    data: str,
    side: str,
    loss: str,
    measure: Callable[[], dict[str, Any]],
    sequences: Sequences,
    wants_quality: bool,
) -> dict[str, Any]:
    """Return a row with its quality, or with the reason why it has no figures."""
    try:
        row = {"dataset": data, "side": side, "loss": loss, **measure()}
    except (NotInstalled, ours.Failed, subprocess.TimeoutExpired) as error:
        return blank(data, side, loss, str(error))
    for point in row["points"]:
        point |= graded(point, sequences)
    if wants_quality and row["points"]:
        last = row["points"][-1]
        row |= {"minutes": last["seconds"] / 60, **graded(last, sequences)}
    return row


def graded(point: dict[str, Any], sequences: Sequences) -> dict[str, float]:
    found = quality(np.load(point["lists"]), sequences.targets)
    return {f"{name}@{TOP}": value for name, value in found.items()}


def blank(data: str, side: str, loss: str, error: str) -> dict[str, Any]:
    return {"dataset": data, "side": side, "loss": loss, "points": [], "error": error}


def machine(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "arguments": vars(given),
    }


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1))


def scale(given: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Measure a step along both curves, each point in a process of its own."""
    rows: list[dict[str, Any]] = []
    for point in scale_points(given):
        asked = f"{point['loss']}, {point['items']:,} items, length {point['length']:,}"
        console.print(f"{datetime.now():%H:%M:%S} {asked}")
        rows.append(scale_row(point, rows, given))
        write(out / "scale.json", {"machine": machine(given), "rows": rows})
    console.print(report.scale_table(rows))
    said(report.reasons(rows))
    report.scale_picture(rows, out / "scale.png")
    return rows


def scale_points(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for loss in ("sampled_softmax", "full_softmax"):
        for items in given.catalogues:
            sizes = {"items": items, "length": 50, "rows": STEP_POSITIONS // 50}
            yield {"curve": "items", "loss": loss, **sizes}
    for length in given.lengths:
        sizes = {"items": 10_000, "length": length, "rows": round(STEP_POSITIONS / length)}
        yield {"curve": "length", "loss": "sampled_softmax", **sizes}


def scale_row(
    point: dict[str, Any], before: list[dict[str, Any]], given: argparse.Namespace
) -> dict[str, Any]:
    """Return the point with its figures, or with the reason why it was not measured."""
    seconds = expected_seconds(point, before)
    if seconds > given.affordable:
        reason = f"not measured: {seconds:,.0f} s a step expected"
        return {
            **point,
            "expected": seconds,
            "error": f"{reason}, --affordable {given.affordable:g}",
        }
    asked = {**point, "steps": given.steps, "threads": given.threads}
    answer = subprocess.run(
        [sys.executable, str(HERE / "scale_point.py"), json.dumps(asked)],
        capture_output=True,
        text=True,
        env=driver_environment(given.threads),
    )
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or ["killed, most likely for its memory"]
        return {**point, "expected": seconds, "error": f"exit {answer.returncode}: {said[-1]}"}
    return {**point, **json.loads(answer.stdout.splitlines()[-1])}


def expected_seconds(point: dict[str, Any], before: list[dict[str, Any]]) -> float:
    """Extrapolate in proportion from the point before on the same curve; 0 where there is none."""
    if not before or any(before[-1][key] != point[key] for key in ("curve", "loss")):
        return 0.0
    last = before[-1]
    grown = point["items"] / last["items"]
    return float(last.get("seconds_a_step", last.get("expected", 0.0)) * grown)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sides = ["recsys", "bare", *(library.name.lower() for library in LIBRARIES)]
    names = ["beauty", "movielens-1m"]
    losses = ["full_softmax", "sampled_softmax"]
    parser.add_argument("--beauty", default="../shared/data/amazon_beauty.txt")
    parser.add_argument("--movielens", default="../shared/data/ml-1m-sequences.txt.gz")
    parser.add_argument("--datasets", nargs="+", default=names, choices=names)
    parser.add_argument("--sides", nargs="+", default=sides, choices=sides)
    parser.add_argument("--losses", nargs="+", default=losses, choices=losses)
    parser.add_argument("--ours", nargs="+", default=[], help="more settings of recsys train")
    parser.add_argument("--ours-sampled", nargs="+", default=[], help="those of sampled softmax")
    parser.add_argument("--seconds", type=float, default=60, help="of training each, at least")
    parser.add_argument("--minutes", type=float, default=6, help="before quality; 0: no quality")
    parser.add_argument("--points", type=int, default=6, help="of quality along those minutes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="of all sides, one after the other")
    parser.add_argument("--out", default="workspace/benchmarks")
    parser.add_argument("--envs", default="workspace/bench-envs", help="of the other libraries")
    parser.add_argument("--torch", default="torch==2.13.0", help="for every environment")
    parser.add_argument("--scale", action="store_true", help="the cost curves instead")
    parser.add_argument("--catalogues", type=int, nargs="+", default=CATALOGUES, help="--scale")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="--scale")
    parser.add_argument("--steps", type=int, default=5, help="a point of the cost curves")
    parser.add_argument("--affordable", type=float, default=60, help="seconds a step, --scale")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    out = Path(given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    name = "scale" if given.scale else "training"
    rows = scale(given, out) if given.scale else side_by_side(given, out)
    failed = sum("error" in row for row in rows)
    console.print(f"{len(rows)} rows, {failed} without figures: {out / name}.json, .png")


if __name__ == "__main__":
    main()
