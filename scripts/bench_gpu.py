"""Time `recsys train` on a GPU: positions/s, share of the card's matrix rate, waits for data.

    python scripts/bench_gpu.py                  # d 256, 8 layers, length 512, 1,000,000 items
    python scripts/bench_gpu.py --small          # the same on a CPU at small size, in a minute
    python scripts/bench_gpu.py --rectools PYTHON   # beside RecTools in that interpreter
    python scripts/bench_gpu.py --search            # FAISS and torch on the device, and the CPU

Each row is the real command in a process of its own, on made-up sequences that `recsys prepare`
reads. Lightning's profiler times a block of steps after some that warm up, and then stops the
command: no validation, checkpoint or test is in the figures. Model FLOP/s count the matrix products
that the model needs, forward and backward; the card's own rate is that of large products in the
same number format, measured first. RecTools runs at a catalogue that it can hold, and ours beside
it at the same sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench import made, report
from bench.ours import Failed, Home
from bench.protocol import Settings, driver_environment

HERE = Path(__file__).resolve().parent / "bench"
ROWS = {
    "sampled_softmax": ["loss=sampled_softmax"],
    "full_softmax": ["loss=full_softmax"],
    "full_softmax, bf16, chunk 1024": [
        "loss=full_softmax",
        "loss.products=bf16",
        "loss.chunk=1024",
    ],
    "full_softmax, liger, chunk 1024": [
        "loss=full_softmax",
        "loss.kernel=liger",
        "loss.chunk=1024",
    ],
}
RECTOOLS = "RecTools"
SEARCHED = (1_000_000, 10_000_000)
SEARCHES = (
    *(("cpu", "flat"), ("cuda", "torch"), ("cuda", "flat")),
    *(("cuda", "ivf_flat"), ("cuda", "cagra")),
)
"""Device and kind; `torch` is exact search without FAISS."""
console = Console(width=max(120, Console().width))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a row; `steps` are timed after `warm` ones."""

    dim: int = 256
    layers: int = 8
    heads: int = 4
    feedforward: int = 1024
    length: int = 512
    items: int = 1_000_000
    batch: int = 128
    negatives: int = 256
    warm: int = 10
    steps: int = 60

    @property
    def positions(self) -> int:
        """Positions of a step: every row is full."""
        return self.batch * self.length

    @property
    def users(self) -> int:
        """Users of an epoch that the timed block does not reach the end of."""
        return self.batch * (self.warm + self.steps + 2)


SMALL = Sizes(32, 2, 2, 64, 32, 2_000, 16, 64, warm=2, steps=5)


def flops(sizes: Sizes, loss: str) -> int:
    """Return FLOPs of a position's matrix products, forward and backward.

    A layer multiplies by 4 d² weights of attention and 2 d f of the feed-forward network, and each
    position reads (L + 1) / 2 others on average, twice (keys, values). The loss multiplies by each
    candidate's d numbers. Backward is twice forward; adding is another FLOP beside multiplying.

    >>> flops(Sizes(dim=2, layers=1, feedforward=3, length=5, items=7), "full_softmax")
    324
    """
    weights = 4 * sizes.dim**2 + 2 * sizes.dim * sizes.feedforward
    attended = sizes.dim * (sizes.length + 1)
    candidates = sizes.items if loss.startswith("full") else sizes.negatives + 1
    return 2 * 3 * (sizes.layers * (weights + attended) + candidates * sizes.dim)


@dataclass(frozen=True)
class Bench:
    """What all rows share: where things are, on which device, and for how long."""

    out: Path
    gpu: bool
    threads: int
    workers: int
    limit: float

    def home(self, sizes: Sizes) -> Home:
        return Home(self.out / "recsys-home", self.threads, f"made-{sizes.items}", self.gpu)

    def environment(self) -> dict[str, str]:
        return driver_environment(self.threads, HERE, gpu=self.gpu)

    def matrix_rate(self) -> dict[str, Any]:
        """Return the device's name and its rate of large matrix products."""
        command = [sys.executable, str(HERE / "matrix_rate.py"), "gpu" if self.gpu else "cpu"]
        answer = subprocess.run(command, env=self.environment(), capture_output=True, text=True)
        if answer.returncode:
            raise SystemExit(f"no device to measure: {answer.stderr.splitlines()[-1]}")
        return dict(json.loads(answer.stdout.splitlines()[-1]))

    def prepare(self, sizes: Sizes) -> str:
        """Make sequences of these sizes and prepare them; return the dataset's path."""
        home, data = self.home(sizes), made.sequences(sizes.users, sizes.items, sizes.length)
        home.root.mkdir(parents=True, exist_ok=True)
        lines = self.out / f"made-{sizes.items}.txt"
        made.write(data, lines)
        data.save(lines.with_suffix(".npz"))
        return home.prepare(lines, has_users=True)

    def measure(self, dataset: str, sizes: Sizes, loss: str) -> dict[str, Any]:
        """Train until the block of steps is timed; return its figures."""
        home, figures = self.home(sizes), self.out / "block.json"
        figures.unlink(missing_ok=True)
        words = overrides(sizes, loss, self) + clock(figures, sizes)
        process = home.recsys("train", f"data.dataset={dataset}", *words)
        try:
            process.wait(self.limit)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.wait()
            raise Failed(f"{sizes.steps} steps took more than --limit {self.limit:g} s") from error
        if not figures.is_file():
            raise Failed(home.said("train"))
        return derived(json.loads(figures.read_text()), sizes, loss)

    def rectools(self, python: str, sizes: Sizes, loss: str) -> dict[str, Any]:
        """Run RecTools' driver in its own environment; return the figures that it has."""
        folder = self.out / f"rectools-{loss}"
        folder.mkdir(parents=True, exist_ok=True)
        settings = rectools_settings(self, sizes, loss, folder)
        command = [python, str(HERE / "rectools_sasrec.py"), settings.as_json()]
        environment = {**self.environment(), "PYTHONPATH": ""}
        log = folder / "driver.log"
        with log.open("w") as errors:
            answer = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        if answer.returncode:
            raise Failed(f"driver failed: {' '.join(log.read_text().splitlines()[-1:])}")
        row = json.loads(answer.stdout.splitlines()[-1])
        return {**row, "model_flops": row["positions_per_second"] * flops(sizes, loss)}


def overrides(sizes: Sizes, loss: str, bench: Bench) -> list[str]:
    """Return the settings of `recsys train`; all that is not named is as shipped."""
    sampled = [f"loss.negatives={sizes.negatives}"] if loss.startswith("sampled") else []
    return [
        *ROWS[loss],
        *sampled,
        f"model.dim={sizes.dim}",
        f"model.layers={sizes.layers}",
        f"model.layer.heads={sizes.heads}",
        f"model.layer.feedforward={sizes.feedforward}",
        f"model.max_length={sizes.length}",
        f"batches.size={sizes.batch}",
        "batches.windows=last",
        f"workers={bench.workers}",
        f"trainer={'gpu' if bench.gpu else 'cpu'}",
        "trainer.max_epochs=1",
        "checkpoint_every.minutes=null",
        "patience=null",
        "logger=csv",
    ]


def clock(figures: Path, sizes: Sizes) -> list[str]:
    return [
        "+trainer.profiler._target_=step_clock.StepClock",
        f"+trainer.profiler.file='{figures}'",
        f"+trainer.profiler.warm={sizes.warm}",
        f"+trainer.profiler.steps={sizes.steps}",
    ]


def derived(block: dict[str, Any], sizes: Sizes, loss: str) -> dict[str, Any]:
    """Return a block's figures with its rates and shares."""
    rate = block["steps"] * sizes.positions / block["seconds"]
    return {
        **block,
        "positions_per_second": rate,
        "model_flops": rate * flops(sizes, loss),
        "waited_share": block["waited"] / block["seconds"],
        "starved_share": block["starved"] / block["seconds"],
    }


def rectools_settings(bench: Bench, sizes: Sizes, loss: str, folder: Path) -> Settings:
    return Settings(
        data=str(bench.out / f"made-{sizes.items}.npz"),
        folder=str(folder),
        length=sizes.length,
        dropout=0.5,
        seconds=20 if bench.gpu else 2,
        loss=loss,
        batch=sizes.batch,
        dim=sizes.dim,
        layers=sizes.layers,
        heads=sizes.heads,
        feedforward=sizes.feedforward,
        negatives=sizes.negatives,
        threads=bench.threads,
        accelerator="gpu" if bench.gpu else "cpu",
        precision="bf16-mixed" if bench.gpu else "32-true",
    )


def rows(bench: Bench, given: argparse.Namespace, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield a row a loss, then those beside RecTools: figures, or why there are none."""
    dataset = bench.prepare(sizes)
    for loss in given.losses:
        yield row(report.OURS, loss, sizes, lambda loss=loss: bench.measure(dataset, sizes, loss))
    if not given.rectools:
        reason = "not measured: give its interpreter, --rectools PYTHON"
        yield {**facts(RECTOOLS, "full_softmax", sizes), "error": reason}
        return
    # Its feed-forward network is as wide as the model.
    beside = replace(sizes, items=given.rectools_items, feedforward=sizes.dim)
    dataset = bench.prepare(beside)
    for loss in ("sampled_softmax", "full_softmax"):
        yield row(report.OURS, loss, beside, lambda loss=loss: bench.measure(dataset, beside, loss))
        asked = given.rectools, beside, loss
        yield row(RECTOOLS, loss, beside, lambda asked=asked: bench.rectools(*asked))


def row(side: str, loss: str, sizes: Sizes, measure: Any) -> dict[str, Any]:
    console.print(f"{datetime.now():%H:%M:%S} {side}: {loss}, {sizes.items:,} items")
    try:
        return {**facts(side, loss, sizes), **measure()}
    except Failed as error:
        return {**facts(side, loss, sizes), "error": str(error)}


def facts(side: str, loss: str, sizes: Sizes) -> dict[str, Any]:
    return {"side": side, "loss": loss, **vars(sizes)}


def table(measured: list[dict[str, Any]], device: dict[str, Any]) -> Table:
    """Return the rows as a table, beside the device's own rate."""
    own = device["matrix_flops"] / 1e12
    products = f"{device['format']} products of {device['size']}²"
    title = f"{device['device']}: {own:,.4g} TFLOP/s in {products}"
    shown = Table(title=title, box=box.SIMPLE, title_justify="left")
    shown.add_column("side", no_wrap=True)
    shown.add_column("loss", no_wrap=True)
    for name in ("items", "positions/s", "TFLOP/s", "of own", "waited", "starved", "GiB"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in measured:
        shown.add_row(one["side"], one["loss"], f"{one['items']:,}", *cells(one, own))
    return shown


def cells(one: dict[str, Any], own: float) -> list[str]:
    if "error" in one:
        return ["none"]
    return [
        f"{one['positions_per_second']:,.0f}",
        f"{one['model_flops'] / 1e12:,.3g}",
        f"{one['model_flops'] / 1e12 / own:.1%}",
        report.shown(one.get("waited_share"), ".1%"),
        report.shown(one.get("starved_share"), ".1%"),
        report.shown(one.get("peak_device_gib"), ".2f"),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cores = os.cpu_count() or 1
    parser.add_argument("--small", action="store_true", help="small sizes on a CPU")
    parser.add_argument(
        "--losses", nargs="+", choices=list(ROWS), help="default: all; --small: two"
    )
    parser.add_argument("--items", type=int, help="of the catalogue")
    parser.add_argument("--batch", type=int, help="histories a step")
    parser.add_argument("--steps", type=int, help="timed, after some that warm up")
    parser.add_argument("--limit", type=float, default=300, help="seconds a row at most")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--workers", type=int, help="loader processes; default: 8, --small: 0")
    parser.add_argument(
        "--search",
        type=int,
        nargs="*",
        metavar="ITEMS",
        help="search instead of training, over so many items (1,000,000 and 10,000,000)",
    )
    parser.add_argument("--rectools", help="Python interpreter that has RecTools")
    parser.add_argument("--rectools-items", type=int, default=20_000, help="catalogue beside it")
    parser.add_argument("--out", default="workspace/benchmarks/gpu")
    given = parser.parse_args()
    given.search = list(SEARCHED) if given.search == [] else given.search
    return given


def sizes_of(given: argparse.Namespace) -> Sizes:
    asked = {name: getattr(given, name) for name in ("items", "batch", "steps")}
    sizes = SMALL if given.small else Sizes()
    return replace(sizes, **{name: value for name, value in asked.items() if value is not None})


def searches(given: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Time search on the device beside the CPU's, each in a process of its own; print a table."""
    found = []
    sizes = [20_000] if given.small else given.search
    for items, (device, kind) in itertools.product(sizes, SEARCHES):
        if given.small and device == "cuda":
            continue
        asked = {"items": items, "dim": 64, "device": device, "kind": kind}
        command = [sys.executable, str(HERE / "search_point.py"), json.dumps(asked)]
        environment = driver_environment(given.threads, HERE, gpu=not given.small)
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = (answer.stderr if answer.returncode else answer.stdout).splitlines() or ["nothing"]
        row = {"error": lines[-1]} if answer.returncode else json.loads(lines[-1])
        found.append({**asked, **row})
        console.print(found[-1])
    (out / "search.json").write_text(json.dumps(found, indent=1))
    return found


def main() -> None:
    given = arguments()
    given.losses = given.losses or (list(ROWS)[:2] if given.small else list(ROWS))
    workers = given.workers if given.workers is not None else 0 if given.small else 8
    out = Path(given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.search is not None:
        searches(given, out)
        return
    bench = Bench(out, not given.small, given.threads, workers, given.limit)
    device, measured = bench.matrix_rate(), []
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "arguments": vars(given)}
    facts |= {"cores": os.cpu_count(), "python": platform.python_version(), **device}
    for one in rows(bench, given, sizes_of(given)):
        measured.append(one)
        (out / "gpu.json").write_text(json.dumps({"machine": facts, "rows": measured}, indent=1))
    console.print(table(measured, device))
    console.print(report.reasons(measured), markup=False, highlight=False)
    failed = sum("error" in one for one in measured)
    console.print(f"{len(measured)} rows, {failed} without figures: {out / 'gpu.json'}")


if __name__ == "__main__":
    main()
