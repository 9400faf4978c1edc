"""A training that is killed in mid-epoch and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recsys.artifacts import Workspace
from recsys.cli import main

RECSYS = [sys.executable, "-m", "recsys.cli"]
EPOCHS = 5
TRAIN = (
    f"train trainer=cpu model.dim=16 batches.size=2 trainer.max_epochs={EPOCHS} patience=null "
    "model.dropout=0.3"
).split()


def result(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def kill_in_epoch(command: list[str], epoch: int) -> None:
    """Start a training and kill it a moment after `epoch` epochs are done."""
    process = subprocess.Popen(
        [*RECSYS, *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr
    for line in process.stderr:
        if line.startswith(f"epoch {epoch:>3}/"):
            break
    time.sleep(0.15)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_and_resumed_equals_uninterrupted(
    workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    whole = result([*TRAIN, "name=whole"], capsys)
    kill_in_epoch([*TRAIN, "name=killed"], epoch=2)
    assert not (workspace.folder("run") / "killed" / "manifest.json").exists()
    resumed = result(["train", "resume=killed"], capsys)
    for name, value in whole["test"].items():
        assert resumed["test"][name] == pytest.approx(value, abs=1e-6), name
    client = MlflowClient(workspace.tracking_uri)
    experiment = client.get_experiment_by_name("recsys")
    assert experiment
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["killed", "whole"]
    assert runs["killed"].info.status == "FINISHED"
    # A kill between an epoch's log and its checkpoint repeats that epoch: the same step, the same
    # value, once more.
    whole_run, killed_run = (runs[name].info.run_id for name in ("whole", "killed"))
    losses = {m.step: m.value for m in client.get_metric_history(whole_run, "train/loss")}
    assert len(losses) == EPOCHS
    again = client.get_metric_history(killed_run, "train/loss")
    assert {m.step for m in again} == set(losses)
    assert all(m.value == pytest.approx(losses[m.step], abs=1e-6) for m in again)
    assert main(["train", "resume=killed"]) == 2
    assert "is finished" in capsys.readouterr().err
