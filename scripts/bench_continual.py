"""Ten simulated days: continued training against training from scratch on all data so far.

A synthetic shop's log is cut into days. Each day is appended (`grow.onto`), a run goes on from the
day before's (`resume_from`), and another is trained from scratch on the same dataset with early
stopping. Both are tested on the newest day (the one before it validates, so neither has trained on
them). The old-days holdout is people whom no run ever trains on: the last thing that each did
before the first simulated day. Steps that are in the results file already are not run again.

python scripts/bench_continual.py --out continual.jsonl --seeds 1 2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.artifacts import Workspace
from recsys.data.batches import EventBatches
from recsys.data.dataset import Dataset, Split
from recsys.data.fresh import Fresh
from recsys.data.grow import Growth, grow
from recsys.data.prepare import prepare
from recsys.data.shop_stock import DAY, FIRST_DAY
from recsys.data.sources.events import Events
from recsys.data.synthetic import SyntheticShop
from recsys.evaluation.protocol import evaluate
from recsys.evaluation.scorers import EvaluationBatch, ModelScorer
from recsys.launch import configure
from recsys.training import train as training
from recsys.training.runs import dataset_of, load_run
from recsys.training.warm import continued

SPLIT = {"rule": "temporal", "validation_days": 1, "test_days": 1}
COMMON = ["trainer=cpu", "logger=csv", "evaluation.exclude_seen=false"]
SCRATCH = ["model.dropout=0.1", "batches.size=32", "optimizer.lr=2e-3", "item_start=cooccurrence"]
CLOCK = "cpu.json"
HOLDOUT = 0.2
"""Share of people whom no run trains on."""


class OldDays(Dataset):
    """The base dataset and the holdout's people before the simulated days, who alone are asked."""

    def __init__(self, path: Path, first: int) -> None:
        super().__init__(path)
        self.first = first

    @cached_property
    def split(self) -> Split:
        lengths = np.diff(self.offsets)
        asked = (np.arange(self.num_users) >= self.first) & (lengths >= 2)
        return Split(lengths, np.full(len(lengths), -1), np.where(asked, lengths - 1, -1))


class Narrowed:
    """Scores the items of the base dataset alone."""

    def __init__(self, scorer: ModelScorer, num_items: int) -> None:
        self.scorer, self.num_items, self.name = scorer, num_items, scorer.name

    def score(self, batch: EvaluationBatch) -> Any:
        return self.scorer.score(batch)[:, : self.num_items + 1]


def make_logs(folder: Path, seed: int, arguments: argparse.Namespace) -> None:
    """Write `base`, `holdout` and `day-01`, … as Parquet."""
    sold = {"num_items": arguments.items, "num_aisles": arguments.aisles}
    shop = SyntheticShop(
        num_users=round(arguments.users / (1 - HOLDOUT)),
        events_per_user=arguments.events,
        days=arguments.base_days + arguments.days,
        seed=seed,
        **sold,
    )
    folder.mkdir(parents=True)
    shop.write(folder)
    events = pq.read_table(folder / "events.parquet")
    plain = [
        f.with_type(pa.string()) if pa.types.is_dictionary(f.type) else f for f in events.schema
    ]
    events = events.cast(pa.schema(plain))
    people = pc.unique(events["user_id"]).sort()[: arguments.users]
    known = pc.is_in(events["user_id"], people)
    start = FIRST_DAY + arguments.base_days * DAY
    before = pc.less(events["timestamp"], start)
    base = events.filter(pc.and_(known, before))
    pq.write_table(base, folder / "base.parquet")
    sold_before = pc.is_in(events["item_id"], pc.unique(base["item_id"]))
    held = pc.and_(pc.and_(pc.invert(known), before), sold_before)
    pq.write_table(events.filter(held), folder / "holdout.parquet")
    for day in range(1, arguments.days + 1):
        low, high = (start + (day - k) * DAY for k in (1, 0))
        within = pc.and_(
            pc.greater_equal(events["timestamp"], low), pc.less(events["timestamp"], high)
        )
        pq.write_table(events.filter(pc.and_(known, within)), folder / f"day-{day:02}.parquet")


@contextlib.contextmanager
def cpu_seconds() -> Iterator[dict[str, float]]:
    """Measure what fitting takes of the processor, each epoch's validation within, tests not."""
    fit, spent = training._fit, {"cpu_seconds": 0.0}

    def measured(*arguments: Any) -> None:
        began = time.process_time()
        fit(*arguments)
        spent["cpu_seconds"] = time.process_time() - began

    training._fit = measured
    try:
        yield spent
    finally:
        training._fit = fit


class Simulation:
    """One seed's days, with the figures of each run."""

    def __init__(self, root: Path, seed: int, arguments: argparse.Namespace) -> None:
        self.seed, self.arguments = seed, arguments
        self.logs = root / f"logs-{seed}"
        self.workspace = Workspace(root / f"workspace-{seed}")
        os.environ["RECSYS_HOME"] = str(self.workspace.root)
        if not self.logs.exists():
            make_logs(self.logs, seed, arguments)

    def settings(self, name: str) -> dict[str, Any]:
        return {"name": "shop", "path": str(self.logs / f"{name}.parquet")}

    @cached_property
    def base(self) -> Dataset:
        return prepare(self.settings("base"), Events(), SPLIT, self.workspace)

    @cached_property
    def old_days(self) -> OldDays:
        held = grow(Growth(str(self.base.path)), self.settings("holdout"), Events(), self.workspace)
        return OldDays(held.path, self.base.num_users)

    def grown(self, day: int) -> Dataset:
        """Return the dataset up to a day; a day that is there already is found."""
        dataset = self.base
        for one in range(1, day + 1):
            log = self.settings(f"day-{one:02}")
            dataset = grow(Growth(str(dataset.path)), log, Events(), self.workspace)
        return dataset

    def run(self, day: int, way: str) -> dict[str, Any]:
        """Train one run, if it is not there, and return its figures."""
        dataset = self.grown(day)
        name = f"day-{day:02}-{way}"
        if not (self.workspace.folder("run") / name / "manifest.json").is_file():
            self._train(day, way, name, dataset)
        return self._figures(day, way, name)

    def _train(self, day: int, way: str, name: str, dataset: Dataset) -> None:
        typed = [*COMMON, f"name={name}", f"seed={self.seed}", f"data.dataset={dataset.path}"]
        if way == "scratch":
            epochs = [
                f"trainer.max_epochs={self.arguments.epochs}",
                f"patience={self.arguments.patience}",
            ]
            config = configure([*typed, *SCRATCH, *epochs, f"model.dim={self.arguments.dim}"])
        else:
            typed += [
                f"resume_from={self.before(day)}",
                f"replay={self.arguments.replay}",
                f"trainer.max_epochs={self.arguments.warm_epochs}",
                "patience=null",
                f"optimizer.lr={self.arguments.warm_lr}",
            ]
            config = continued(configure(typed), typed, self.workspace)
        config.split = dataset.manifest["split"]
        with cpu_seconds() as spent:
            trained = training.train(config, dataset, self.workspace)
        (trained.run / CLOCK).write_text(json.dumps(spent))

    def before(self, day: int) -> str:
        return "day-00-scratch" if day == 1 else f"day-{day - 1:02}-warm"

    def _figures(self, day: int, way: str, name: str) -> dict[str, Any]:
        run = load_run(self.workspace.folder("run") / name)
        history = run.manifest["history"]
        scorer = Narrowed(ModelScorer(run.model), self.base.num_items)
        old = evaluate(self.old_days, scorer, "test", exclude_seen=False, details=False).metrics
        test = run.manifest["metrics"]["test"]
        best = run.manifest["metrics"].get("best achievable", {})
        figures = {
            "ndcg": test["ndcg@10"],
            "recall": test["recall@10"],
            "old_ndcg": old["ndcg@10"],
            "stale_ndcg": run.manifest["metrics"].get("run before", {}).get("ndcg@10"),
            "best_ndcg": best.get("ndcg@10"),
            "epochs": len(history),
            "seconds": json.loads((run.path / CLOCK).read_text())["cpu_seconds"],
            "targets": sum(e["train/seconds"] * e["train/positions_per_second"] for e in history),
            "positions": self._positions(run) * len(history),
            "events": int(run.dataset.offsets[-1]),
        }
        return {"seed": self.seed, "day": day, "way": way, **figures}

    def _positions(self, run: Any) -> int:
        """Return the positions that an epoch reads, targets and context."""
        from hydra.utils import instantiate

        fresh = None
        if run.config.get("resume_from"):
            parent = json.loads((Path(run.config.resume_from) / "manifest.json").read_text())
            fresh = Fresh.since(dataset_of(parent["dataset"]), run.dataset, run.config.replay)
        length = run.config.model.max_length
        made = {"dataset": run.dataset, "seed": 0, "length": length, "fresh": fresh}
        batches: EventBatches = instantiate(run.config.batches, **made)
        rows = batches.order.rows(0, 0, batches.total)
        return int(np.minimum(batches.find(rows)[1] - 1, length).sum())


def steps(arguments: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    for seed in arguments.seeds:
        yield seed, 0, "scratch"
        for day in range(1, arguments.days + 1):
            yield seed, day, "warm"
            if day % arguments.scratch_every == 0:
                yield seed, day, "scratch"


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: a line a day, means over seeds, and the totals."""
    days = sorted({row["day"] for row in rows if row["way"] == "warm"})

    def mean(day: int, way: str, name: str) -> float:
        some = [r[name] for r in rows if (r["day"], r["way"]) == (day, way) and r[name] is not None]
        return float(np.mean(some)) if some else float("nan")

    lines = [
        "| day | events | scratch NDCG@10 | continued | ratio | not trained | old days: scratch "
        "| continued | positions, share | CPU seconds, share |",
        "|" + "---|" * 10,
    ]
    total = {name: np.zeros(2) for name in ("ndcg", "positions", "seconds", "old_ndcg")}
    for day in days:
        pair = {n: [mean(day, w, n) for w in ("scratch", "warm")] for n in total}
        if np.isnan(pair["ndcg"]).any():
            continue
        total = {name: value + pair[name] for name, value in total.items()}
        lines.append(
            f"| {day} | {mean(day, 'warm', 'events'):,.0f} | {pair['ndcg'][0]:.4f} | "
            f"{pair['ndcg'][1]:.4f} | {pair['ndcg'][1] / pair['ndcg'][0]:.3f} | "
            f"{mean(day, 'warm', 'stale_ndcg'):.4f} | {pair['old_ndcg'][0]:.4f} | "
            f"{pair['old_ndcg'][1]:.4f} | {pair['positions'][1] / pair['positions'][0]:.1%} | "
            f"{pair['seconds'][1] / pair['seconds'][0]:.1%} |"
        )
    share = {name: value[1] / value[0] for name, value in total.items() if value[0]}
    if share:
        lines.append(
            f"| all | | | | {share['ndcg']:.3f} | | | {share['old_ndcg']:.3f} of scratch | "
            f"{share['positions']:.1%} | {share['seconds']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("continual.jsonl"))
    parser.add_argument("--root", type=Path, default=Path("continual"), help="logs and workspaces")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no step after so many")
    sizes = {"users": 5000, "items": 2000, "aisles": 40, "events": 30, "base-days": 14, "days": 10}
    trains = {"epochs": 30, "patience": 3, "warm-epochs": 3, "scratch-every": 1, "dim": 32}
    for name, default in (sizes | trains).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--replay", type=float, default=0.7)
    parser.add_argument("--warm-lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    began = time.monotonic()
    done = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    rows = [json.loads(line) for line in done]
    for seed, day, way in steps(arguments):
        if any((r["seed"], r["day"], r["way"]) == (seed, day, way) for r in rows):
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        with contextlib.redirect_stdout(sys.stderr):
            rows.append(Simulation(arguments.root.resolve(), seed, arguments).run(day, way))
        with arguments.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, pyarrow {pa.__version__}\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
