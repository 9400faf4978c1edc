"""What a mistake in a command says: code 2, the mistake, and the next thing to type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recsys.artifacts import Workspace
from recsys.cli import main

MISTAKES = {
    "train model.dimm=3": "no setting 'model.dimm'; did you mean 'model.dim'?",
    "prepare data=events data.pth=log.csv": "no setting 'data.pth'; did you mean 'data.path'?",
    "train data.path=log.csv": "'data.path' with the other choices; it is of data=ali_ccp, ",
    "train data=synthetic data.dataset=x": "with the other choices; it is of data=existing; ",
    "train model=trajectry": "did you mean 'trajectory'?; model= can be: ranker, ",
    "train +foo=3": "unknown setting foo",
    "train +evaluation.exclude_sen=false": "did you mean 'exclude_seen'?",
    "train a": "missing EQUAL",
    "train split=temporal": "no effect on an existing dataset",
    "train": "there is no dataset yet",
    "train resume=nope": "no run named 'nope'",
    "train resume=nope seed=3": "a resumed run keeps its settings; leave out seed=3",
    "prepare": "recsys prepare data=events data.path=log.csv",
    "prepare data=events": "data.path is missing; give it, as in data.path=…",
    "prepare data=events data.path=nowhere.csv": "nowhere.csv",
    "evaluate nope": "make one with `recsys train`",
    "compare nope nope": "no run named 'nope'",
    "export nope": "no run named 'nope'",
    "serve": "there is no bundle yet",
    "recommend --user u1": "make one with `recsys export`",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_explained(
    command: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert MISTAKES[command] in error
    assert "Traceback" not in error
    assert not list(workspace.root.rglob("manifest.json"))


TRAIN = "train data.dataset=latest logger=csv trainer.max_epochs=1 trainer=cpu"
CONTRADICTIONS = {
    f"{TRAIN} model=two_tower": "two_tower trains on pairs batches, not on packed: batches=pairs",
    f"{TRAIN} model.layer.heads=3": "model.dim=64 is not a multiple of model.layer.heads=3",
    f"{TRAIN} +model.foo=3": "unknown setting model.foo",
    f"{TRAIN} +loss.negatives=3": "unknown setting loss.negatives",
    f"{TRAIN} model=two_tower batches=pairs model.item_features=[brand]": "it has: category",
    f"{TRAIN} trainer=gpu": "sees no CUDA device; use trainer=cpu",
}


@pytest.mark.parametrize("command", CONTRADICTIONS)
def test_a_contradiction_is_explained(
    command: str, workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = ring_csv.with_name("items.csv")
    assert (
        main(["prepare", "data=events", f"data.path={ring_csv}", f"data.source.items={items}"]) == 0
    )
    assert main(command.split()) == 2
    assert CONTRADICTIONS[command] in capsys.readouterr().err
    assert not workspace.folder("run").exists() or not list(workspace.folder("run").iterdir())


def test_prepare_ends_with_the_next_command_and_json(
    workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A setting may stand behind an option.
    assert main(["prepare", "data=events", "--json", f"data.path={ring_csv}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["num_users"] == 120
    assert result["num_items"] == 30
    assert Path(result["dataset"]).is_dir()
    assert any(line.startswith("Next   recsys train data.dataset=") for line in lines)


def test_a_misspelt_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--jsn", "seed=1"]) == 2
    assert "unknown argument '--jsn'; did you mean '--json'?" in capsys.readouterr().err
    assert main(["serve", "--bundel", "x"]) == 2
    assert capsys.readouterr().err == (
        "recsys serve: unknown argument '--bundel'; did you mean '--bundle'?; "
        "recsys serve --help lists what there is\n"
    )
