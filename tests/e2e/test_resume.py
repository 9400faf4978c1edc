"""A training that is killed in mid-epoch and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from recsys.artifacts import LAST, Workspace
from recsys.cli import main
from recsys.optimizers import Cosine
from recsys.training.checkpoints import WholeCheckpoints

EPOCHS, STEPS, LEARNING_RATE = 4, 40, 0.002
TRAIN = (
    f"train trainer=cpu model.dim=16 batches.size=3 trainer.max_epochs={EPOCHS} patience=null "
    f"model.dropout=0.3 schedule=cosine optimizer.lr={LEARNING_RATE} "
    "trainer.log_every_n_steps=1 checkpoint_every.steps=7"
).split()


def result(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


KILLED = """
import os, signal, sys
from recsys.cli import main
from recsys.training.module import RetrieverModule

train = RetrieverModule.training_step

def training_step(module, batch, number):
    if module.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    return train(module, batch, number)

RetrieverModule.training_step = training_step
sys.exit(main(sys.argv[3:]))
"""


def kill_at(step: int, command: list[str], by: signal.Signals = signal.SIGKILL) -> str:
    """Run a training that is sent a signal when it begins that step; return what it said."""
    typed = [sys.executable, "-c", KILLED, by.name, str(step), *command]
    killed = subprocess.run(typed, timeout=300, stderr=subprocess.PIPE, text=True)
    assert killed.returncode == (-by if by == signal.SIGKILL else 128 + by)
    return killed.stderr


def place(last: Path) -> tuple[int, int]:
    """Return the next epoch and step."""
    return torch.load(last, weights_only=True)["callbacks"]["Bookmark"]["place"]


def history(client: MlflowClient, run: Run, metric: str) -> dict[int, float]:
    """Return a metric's value at each step; the steps after a checkpoint repeat it exactly."""
    found: dict[int, set[float]] = {}
    for entry in client.get_metric_history(run.info.run_id, metric):
        found.setdefault(entry.step, set()).add(entry.value)
    assert all(len(values) == 1 for values in found.values())
    return {step: values.pop() for step, values in found.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_equals_uninterrupted(
    workers: int, workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    whole = result([*TRAIN, "name=whole"], capsys)
    killed = workspace.folder("run") / "killed"
    kill_at(STEPS + 25, [*TRAIN, "name=killed", f"workers={workers}"])
    assert place(killed / LAST) == (1, 23)
    kill_at(2 * STEPS + 30, ["train", "resume=killed"])
    assert place(killed / LAST) == (2, 25)
    assert not (killed / "manifest.json").exists()
    resumed = result(["train", "resume=killed"], capsys)
    for name, value in whole["test"].items():
        assert resumed["test"][name] == pytest.approx(value, abs=1e-6), name

    client = MlflowClient(workspace.tracking_uri)
    experiment = client.get_experiment_by_name("recsys")
    assert experiment
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["killed", "whole"]
    assert runs["killed"].info.status == "FINISHED"
    logged = {"train/step_loss": EPOCHS * STEPS, "train/rate": EPOCHS * STEPS, "train/loss": EPOCHS}
    for metric, count in logged.items():
        expected, met = (history(client, runs[name], metric) for name in ("whole", "killed"))
        assert len(expected) == count
        assert met == pytest.approx(expected, abs=1e-6)
    rates = history(client, runs["killed"], "train/rate")
    meant = [LEARNING_RATE * Cosine().share(step, EPOCHS * STEPS) for step in rates]
    assert [*rates.values()] == pytest.approx(meant)

    assert main(["train", "resume=killed"]) == 2
    assert "is finished" in capsys.readouterr().err


def test_told_to_end_it_keeps_its_place_and_goes_on(
    workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM, as of a scheduler: the step is finished and kept; the exit code is no success."""
    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    train = [*TRAIN, "checkpoint_every.steps=null", "checkpoint_every.minutes=null"]
    whole = result([*train, "name=whole", "logger=csv"], capsys)
    said = kill_at(STEPS + 25, [*train, "name=ended", "logger=csv"], signal.SIGTERM)
    assert "stopped by SIGTERM; next: recsys train resume=ended" in said
    assert "Traceback" not in said
    assert place(workspace.folder("run") / "ended" / LAST) == (1, 26)
    resumed = result(["train", "resume=ended"], capsys)
    assert resumed["test"] == pytest.approx(whole["test"], abs=1e-6)


def test_a_checkpoint_cut_short_leaves_the_one_before(tmp_path: Path) -> None:
    file, writer = tmp_path / "last.ckpt", WholeCheckpoints()
    writer.save_checkpoint({"weights": torch.ones(9)}, file)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        writer.save_checkpoint({"weights": torch.zeros(9), "breaks": lambda: None}, file)
    assert torch.load(file, weights_only=True)["weights"].sum() == 9
