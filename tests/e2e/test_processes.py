"""Two real processes train what one trains, end together, and go on together after a kill."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from ranked_shop import SHOP
from recsys.artifacts import LAST, Workspace
from recsys.cli import main
from recsys.evaluation.protocol import Evaluation
from recsys.evaluation.significance import RANKS

pytestmark = pytest.mark.timeout(900)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ON_CPU = "trainer.accelerator=cpu"
EXACT = "patience=null model.dropout=0 trainer.log_every_n_steps=1"
# 120 users in batches of 7: the last batch has one, and a process without an example.
TRAJECTORY = (
    f"{EXACT} trainer.max_epochs=2 data.dataset=ring model.dim=16 batches.size=7 batches.horizon=2 "
    "loss.products=fp32 model.layer.products=fp32 objective.type_weights={purchase:4} "
    "checkpoint_every.steps=5 averaging=0.5"
)
TWO_TOWER = (
    f"{EXACT} trainer.max_epochs=1 data.dataset=ring model=two_tower batches=pairs logger=csv "
    "loss=in_batch_softmax batches.size=199 loss.uniform_negatives=8"
)
RANKER = (
    f"{EXACT} trainer.max_epochs=1 data.dataset=shop model=ranker batches=shown logger=csv "
    "examples=impressions features=shop batches.size=61 model.dim=8 ranking.listwise=0.5 "
    "ranking.weights=learned"
)
COMMANDS = {"trajectory": TRAJECTORY, "two_tower": TWO_TOWER, "ranker": RANKER}

SCRIPT = """
import os, signal, sys
from recsys.cli import main
from recsys.training.module import RetrieverModule

train = RetrieverModule.training_step

def training_step(module, batch, number):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and module.global_rank == 1 and module.global_step == 27:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(module, batch, number)

RetrieverModule.training_step = training_step
for command in sys.argv[1:]:
    if code := main(command.split()):
        sys.exit(code)
"""
"""Trains one thing after another; the first time, one process is killed within the first."""


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, ring_csv: Path
) -> Iterator[tuple[Workspace, subprocess.CompletedProcess[str]]]:
    """Every command trained by one process, `NAME-1`, and by two, `NAME-2`; then a wrong one."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(folder / "workspace"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        workspace = Workspace()
        for name, source in {
            "ring": ["data=events", f"data.path={ring_csv}"],
            "shop": SHOP,
        }.items():
            assert main(["prepare", *source]) == 0
            (workspace.folder("dataset") / name).symlink_to(workspace.find("dataset"))
        for name, command in COMMANDS.items():
            assert main(f"train {command} trainer=cpu name={name}-1".split()) == 0
        script = folder / "script.py"
        script.write_text(SCRIPT)
        ddp = f"trainer=ddp {ON_CPU}"
        words = [f"train {command} {ddp} name={n}-2" for n, command in COMMANDS.items()]
        words.append(f"train {ddp} data.dataset=none name=wrong")
        torchrun = [*TORCHRUN, "--max-restarts=1", str(script), *words]
        yield workspace, subprocess.run(torchrun, capture_output=True, text=True, timeout=800)


def steps(run: Path) -> list[float]:
    """Return the loss of each step, as logged."""
    with (run / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row["train/step_loss"]) for row in rows if row["train/step_loss"]]


def facts(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_train_as_one(name: str, trained: tuple) -> None:
    workspace, done = trained
    one, two = (workspace.folder("run") / f"{name}-{n}" for n in (1, 2))
    assert two.is_dir(), done.stderr
    for met, expected in zip(facts(two)["history"], facts(one)["history"], strict=True):
        assert met["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-4)
        for figure, value in expected.items():
            if figure.startswith("validation/") and figure != "validation/seconds":
                assert met[figure] == pytest.approx(value, abs=1e-6), figure
    if name != "trajectory":
        assert steps(two) == pytest.approx(steps(one), abs=1e-4)
    for part in facts(one)["metrics"]:
        for figure, value in facts(one)["metrics"][part].items():
            if figure not in ("seconds", "validation/seconds"):
                assert facts(two)["metrics"][part][figure] == pytest.approx(value, abs=1e-6)


def test_ranks_are_each_users_own(trained: tuple) -> None:
    workspace, _ = trained
    one, two = (
        Evaluation.load(workspace.folder("run") / f"trajectory-{n}" / RANKS).per_user
        for n in (1, 2)
    )
    assert one is not None
    assert one.equals(two)


def test_one_process_writes_and_speaks(trained: tuple) -> None:
    workspace, done = trained
    one, two = (
        sorted(str(f.relative_to(run)) for f in run.rglob("*"))
        for run in (workspace.folder("run") / f"trajectory-{n}" for n in (1, 2))
    )
    assert one == two
    client = MlflowClient(workspace.tracking_uri)
    experiment = client.get_experiment_by_name("recsys")
    assert experiment
    runs = [r.info.run_name for r in client.search_runs([experiment.experiment_id])]
    assert sorted(runs) == ["trajectory-1", "trajectory-2"]
    assert done.stdout.count("Made   run trajectory-2") == 1
    assert done.stderr.count("epoch   1/") == len(COMMANDS)
    assert done.stderr.count("lost another process") <= 1


def test_a_mistake_of_all_is_told_once(trained: tuple) -> None:
    _, done = trained
    assert done.stderr.count("no dataset named 'none'") == 1
    # The one traceback is torchrun's own.
    assert done.stderr.count("Traceback") == 1
    assert "exitcode  : 2" in done.stderr


def test_a_killed_process_is_started_again_and_nothing_is_lost(trained: tuple) -> None:
    workspace, done = trained
    assert f"exitcode: {-signal.SIGKILL}" in done.stderr
    assert "goes on at epoch 2, step 8" in done.stderr
    whole, killed = (
        torch.load(workspace.folder("run") / f"trajectory-{n}" / LAST, weights_only=True)
        for n in (1, 2)
    )
    assert killed["global_step"] == whole["global_step"] == 36
    for name, weights in whole["state_dict"].items():
        torch.testing.assert_close(killed["state_dict"][name], weights, rtol=0, atol=1e-4)


TOLD = """
import os, signal, sys
from recsys.cli import main
from recsys.training.module import RetrieverModule

train = RetrieverModule.training_step

def training_step(module, batch, number):
    if module.global_rank == 1 and module.global_step == 27:
        os.kill(os.getppid(), signal.SIGTERM)
    return train(module, batch, number)

RetrieverModule.training_step = training_step
sys.exit(main(sys.argv[1].split()))
"""
"""Trains; the second process has the launcher of both told to end in mid-epoch."""


def test_told_to_end_all_keep_their_place_and_go_on(trained: tuple, tmp_path: Path) -> None:
    workspace, _ = trained
    script = tmp_path / "told.py"
    script.write_text(TOLD)
    never = "checkpoint_every.steps=null checkpoint_every.minutes=null"
    words = f"train {TRAJECTORY} {never} logger=csv trainer=ddp {ON_CPU} name=told"
    command = [*TORCHRUN, str(script), words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("stopped by SIGTERM; next: recsys train resume=told") == 1
    last = torch.load(workspace.folder("run") / "told" / LAST, weights_only=True)
    assert 27 < last["global_step"] < 36
    resumed = [sys.executable, "-m", "recsys.cli", "train", "resume=told"]
    subprocess.run(resumed, capture_output=True, timeout=300, check=True)
    for met, expected in zip(
        facts(workspace.folder("run") / "told")["history"],
        facts(workspace.folder("run") / "trajectory-1")["history"],
        strict=True,
    ):
        assert met["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-4)
        assert met["validation/ndcg@10"] == pytest.approx(expected["validation/ndcg@10"], abs=1e-6)


def test_recsys_train_starts_the_processes_itself(
    trained: tuple, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "data.dataset=no", "trainer=ddp", "trainer.devices=1", ON_CPU])
    assert end.value.code == 2
    said = capfd.readouterr().err
    assert said.count("no dataset named 'no'") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("trainer=ddp trainer.accelerator=gpu", "sees no CUDA device"),
        ("trainer=gpu", "sees no CUDA device"),
        ("trainer=ddp trainer.devices=0", "trainer.devices=0: expected a number of processes"),
        ("trainer=cpu trainer.devices=2", "train with trainer=ddp trainer.devices=2"),
        ("trainer=ddp trainer.num_nodes=2", "start it on each machine with torchrun --nnodes 2"),
        ("resume=auto", "needs a name; type name=NAME"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    settings: str,
    problem: str,
    trained: tuple,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "data.dataset=ring", *settings.split()]) == 2
    assert problem in capsys.readouterr().err


def test_more_processes_than_devices_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["train", "trainer=ddp", "trainer.devices=4"]) == 2
    said = capsys.readouterr().err
    assert "4 processes on this machine and 2 CUDA device(s)" in said
    assert "trainer.devices=2" in said


def test_a_repeated_command_goes_on_with_its_run_or_says_what_differs(
    trained: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"train {TRAJECTORY} trainer=cpu name=trajectory-1 resume=auto".split()
    assert main(command) == 2
    assert "run trajectory-1 is finished" in capsys.readouterr().err
    assert main([*command, "optimizer.lr=0.5"]) == 2
    said = capsys.readouterr().err
    assert "began with optimizer.lr=" in said
    assert "type the same settings, or another name=" in said
