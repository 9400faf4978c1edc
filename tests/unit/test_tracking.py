"""What MLflow is told of a training, and a run's folder: whose it is, and when it is free again."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from recsys.artifacts import LAST, Workspace
from recsys.cli import main
from recsys.training import train
from recsys.training.retrieval import RetrievalJob

TRAIN = ["train", "trainer=cpu", "model.dim=8", "trainer.max_epochs=1", "patience=null"]

HOLDS = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def prepared(workspace: Workspace, ring_csv: Path) -> Workspace:
    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    return workspace


def runs(workspace: Workspace) -> dict[str, Run]:
    client = MlflowClient(workspace.tracking_uri)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {run.info.run_name: run for run in found}


def test_a_run_is_finished_once_it_is_tested(
    prepared: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(job: RetrievalJob, folder: Path) -> None:
        assert runs(prepared)["fails"].info.status == "RUNNING"
        raise RuntimeError("the test failed")

    with monkeypatch.context() as patch:
        patch.setattr(RetrievalJob, "test", fails)
        with pytest.raises(RuntimeError, match="the test failed"):
            main([*TRAIN, "name=fails"])
    assert runs(prepared)["fails"].info.status == "FAILED"
    assert main(["train", "resume=fails"]) == 0
    run = runs(prepared)["fails"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["best/ndcg_at_10"] == run.data.metrics["validation/ndcg_at_10"]
    assert run.data.metrics["best/epoch"] == 0


def test_a_training_that_is_told_to_stop_is_shown_as_killed(
    prepared: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupts(job: RetrievalJob, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RetrievalJob, "test", interrupts)
    assert main([*TRAIN, "name=told"]) == 130
    assert "interrupted; a training goes on with" in capsys.readouterr().err
    assert runs(prepared)["told"].info.status == "KILLED"


def test_what_changes_a_result_is_a_parameter(prepared: Workspace) -> None:
    words = "loss=sampled_softmax loss.negatives=4 schedule=cosine averaging=1 workers=1"
    assert main([*TRAIN, *words.split(), "name=mixed"]) == 0
    told = runs(prepared)["mixed"].data.params
    assert {k: told[k] for k in ("schedule", "schedule/warmup", "averaging", "patience")} == {
        "schedule": "Cosine",
        "schedule/warmup": "0.05",
        "averaging": "1",
        "patience": "None",
    }
    assert (told["loss"], told["item_start"]) == ("sampled_softmax", "random")
    assert not {"workers", "name", "ranking/candidates"} & set(told)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("name=latest", "name=latest cannot be a run's"),
        ("name=a/b", "name=a/b cannot be a run's"),
        ("name=../b", "name=../b cannot be a run's"),
        ("seed=-1", "seed=-1: expected a whole number, 0 or more"),
        ("workers=-1", "workers=-1: expected a whole number, 0 or more"),
        ("patience=0", "patience=0: expected a whole number, 1 or more"),
        ("batches.size=abc", "batches.size=abc: expected a whole number, 1 or more"),
        ("optimizer.lr=-1", "optimizer.lr=-1: expected a number, 0 or more"),
        ("model.max_length=0", "model.max_length=0: expected a whole number, 2 or more"),
    ],
)
def test_what_no_run_can_have_is_refused_before_one_begins(
    setting: str, problem: str, prepared: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, "logger=csv", setting]) == 2
    assert problem in capsys.readouterr().err
    assert not prepared.folder("run").exists()


def test_a_number_is_a_name(prepared: Workspace) -> None:
    assert main([*TRAIN, "logger=csv", "name=20261123"]) == 0
    assert (prepared.folder("run") / "20261123" / LAST).is_file()


def test_a_name_is_free_again_where_mlflow_does_not_answer(
    prepared: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert main([*TRAIN, "name=u"]) == 2
    assert "no MLflow server answers at http://127.0.0.1:" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://shop")
    assert main([*TRAIN, "name=u"]) == 2
    assert "MLflow cannot use htp://shop" in capsys.readouterr().err
    assert main([*TRAIN, "logger=csv", "name=u"]) == 0


def test_two_trainings_do_not_share_a_folder(
    prepared: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared.folder("run") / "same"
    train._claim(folder, again=False)
    assert main([*TRAIN, "logger=csv", "name=same"]) == 2
    assert "a training begins it, or died at once" in capsys.readouterr().err
    folder.rmdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_fit", lambda *given: None)
        assert main([*TRAIN, "logger=csv", "name=same"]) == 2  # without a step there are no weights
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder / train.LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        capsys.readouterr()
        assert main(["train", "resume=same"]) == 2
        assert "run same is being trained by another process" in capsys.readouterr().err
        other.communicate()
    assert main(["train", "resume=same"]) == 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("resume=x", "resume=x is of one run; leave out -m"),
        ("name=all", "name=all would be the name of every training; leave it out"),
        ("trainer=ddp", "trainer=ddp is for one training; leave out -m, or use trainer=cpu"),
    ],
)
def test_what_cannot_be_of_several_trainings_is_refused(
    words: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", "seed=1,2", words]) == 2
    assert problem in capsys.readouterr().err
