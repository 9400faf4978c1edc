"""Ours: the real `recsys train`, its manifest's figures, and its checkpoints along the way."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.protocol import Sequences, Settings, driver_environment

HERE = Path(__file__).resolve().parent


class Failed(Exception):
    """A side of the benchmark gave no figures; the message says why."""


@dataclass(frozen=True)
class Home:
    """A workspace for the benchmark's own runs, and one prepared dataset in it."""

    root: Path
    threads: int
    name: str
    gpu: bool = False

    def recsys(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a `recsys` command as a person would, its output in a file."""
        log = (self.root / f"{self.name}-{words[0]}.log").open("wb")
        with log:
            command = [sys.executable, "-m", "recsys.cli", *words]
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.environment
            )

    @property
    def environment(self) -> dict[str, str]:
        environment = driver_environment(self.threads, HERE, gpu=self.gpu)
        return {**environment, "RECSYS_HOME": str(self.root)}

    def prepare(self, file: Path, has_users: bool) -> str:
        """Prepare the dataset; return its name."""
        words = [
            f"data.path={file}",
            f"data.name={self.name}",
            f"data.source.has_users={has_users}",
        ]
        if self.recsys("prepare", "data=sequences", *words, "--json").wait():
            raise Failed(self.said("prepare"))
        lines = (self.root / f"{self.name}-prepare.log").read_text().splitlines()
        return str(json.loads(lines[-1])["dataset"])

    def train(
        self, dataset: str, run: str, settings: Settings, *more: str
    ) -> tuple[Path, list[Path]]:
        """Train one run; return its directory and copies of checkpoints along the way."""
        folder = Path(settings.folder)
        words = [f"data.dataset={dataset}", *overrides(run, settings), *more]
        process = self.recsys("train", *words)
        copies = watch(process, self.root / "runs" / run / "checkpoints" / "last.ckpt", settings)
        if process.returncode:
            raise Failed(self.said("train"))
        last = folder / f"{len(copies)}.ckpt"
        shutil.copy(self.root / "runs" / run / "checkpoints" / "last.ckpt", last)
        return self.root / "runs" / run, [*copies, last]

    def said(self, verb: str) -> str:
        lines = (self.root / f"{self.name}-{verb}.log").read_text(errors="replace").splitlines()
        return " ".join(lines[-3:]) or f"recsys {verb} said nothing"


def overrides(run: str, settings: Settings) -> list[str]:
    """Return the settings of `recsys train`: as shipped, but length, dropout and the time.

    That the shipped model has the other sizes of the benchmark is checked when it is ranked.
    """
    minutes, seconds = divmod(round(settings.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return [
        f"name={run}",
        f"seed={settings.seed}",
        f"loss={settings.loss}",
        *([f"loss.negatives={settings.negatives}"] if "sampled" in settings.loss else []),
        f"model.max_length={settings.length}",
        f"model.dropout={settings.dropout}",
        f"optimizer.lr={settings.lr}",
        f"batches.size={settings.batch}",
        # As the other libraries cut: each user's newest positions.
        "batches.windows=last",
        "trainer=cpu",
        "trainer.max_epochs=1000000",
        f"+trainer.max_time='00:{hours:02}:{minutes:02}:{seconds:02}'",
        "patience=null",
        *settings.ours,
    ]


def watch(process: subprocess.Popen[bytes], last: Path, settings: Settings) -> list[Path]:
    """Copy the newest checkpoint when each point but the last comes, until the command ends."""
    copies: list[Path] = []
    began = None
    while process.poll() is None:
        time.sleep(0.25)
        began = began or (time.perf_counter() if last.parent.is_dir() else None)
        due = settings.seconds * (len(copies) + 1) / settings.points
        waits = len(copies) + 1 < settings.points and last.is_file()
        if began and waits and time.perf_counter() - began >= due:
            copies += copied(last, Path(settings.folder) / f"{len(copies)}.ckpt")
    return copies


def copied(last: Path, to: Path) -> list[Path]:
    """Return the copy, or nothing where the file was just being written."""
    shutil.copy(last, to)
    return [to] if zipfile.is_zipfile(to) else []


def measure(home: Home, dataset: str, sequences: Sequences, settings: Settings) -> dict[str, Any]:
    """Return the row of the real command."""
    run, checkpoints = home.train(dataset, run_name(settings), settings)
    history = json.loads((run / "manifest.json").read_text())["history"]
    # The clock ends the last epoch midway; the first one alone stands for a short run.
    whole = history[:-1] or history
    rate = statistics.median(epoch["train/positions_per_second"] for epoch in whole)
    positions = sequences.positions(settings.length)
    trained = sum(e["train/positions_per_second"] * e["train/seconds"] for e in history)
    return {
        "positions_per_second": rate,
        "epoch_positions": positions,
        "epoch_seconds": positions / rate,
        "epochs": trained / positions,
        "peak_memory_gib": history[-1]["train/peak_memory_gib"],
        "rank_seconds": statistics.median(epoch["validation/seconds"] for epoch in history),
        "points": rank(home, run, checkpoints, settings),
    }


def rank(home: Home, run: Path, checkpoints: list[Path], settings: Settings) -> list[dict]:
    """Return a point a checkpoint: seconds trained and where its top lists are."""
    files = [str(file) for file in checkpoints]
    given = {"run": str(run), "checkpoints": files, "settings": asdict(settings)}
    answer = subprocess.run(
        [sys.executable, str(HERE / "recsys_rank.py"), json.dumps(given)],
        env=home.environment,
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        raise Failed(" ".join(answer.stderr.splitlines()[-3:]))
    return list(json.loads(answer.stdout.splitlines()[-1])["points"])


def overhead(home: Home, dataset: str, sequences: Sequences, settings: Settings) -> dict[str, Any]:
    """Return the row of the bare loop, timed in turn with the real command in short blocks."""
    run = home.root / "runs" / run_name(settings)
    more = ["batches._target_=alternating.AlternatingBatches", f"+batches.run='{run}'"]
    home.train(dataset, run.name, settings, *more)
    report = run / "pairs.jsonl"
    if not report.is_file():
        raise Failed("no pair of blocks was finished: give more --seconds")
    pairs = [json.loads(line) for line in report.read_text().splitlines()]
    ratios = [pair["lightning"] / pair["bare"] for pair in pairs]
    low, middle, high = np.percentile(ratios, [25, 50, 75]) - 1
    rate = sum(p["positions"] for p in pairs) / sum(p["bare"] for p in pairs)
    positions = sequences.positions(settings.length)
    return {
        "positions_per_second": rate,
        "epoch_positions": positions,
        "epoch_seconds": positions / rate,
        "overhead": float(middle),
        "overhead_quartiles": [float(low), float(high)],
        "pairs": len(pairs),
        "points": [],
    }


def run_name(settings: Settings) -> str:
    return f"{Path(settings.folder).name}-{os.getpid()}"
