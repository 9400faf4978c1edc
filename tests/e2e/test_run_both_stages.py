"""`recsys run` with a second stage: two variants, a ranker of the first, and one bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranked_shop import COMMON, FEW, RANKER, SHOP, SIMPLE
from recsys import launch
from recsys.artifacts import Workspace, read_manifest
from recsys.cli import main
from recsys.schema import InputError

SIZES = [*SHOP, "model.max_length=20", "logger=csv", "trainer=cpu", "patience=null"]
SIZES += ["trainer.max_epochs=1", "batches.size=64", "index=flat"]
SECOND = ["model=ranker", "batches=shown", "examples=impressions", "model.dim=8", *FEW, *SIMPLE]


def quoted(overrides: list[str]) -> str:
    return "[" + ",".join(f"'{override}'" for override in overrides) + "]"


def test_both_stages_in_one_command(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    second = f"second_stage={quoted(SECOND)}"
    typed = ["name=shop", "ranking.tasks=[view,cart]", "ranking.candidates=20", "item_start=random"]
    typed += ["model.layer.heads=1", "model.dim=16"]
    assert main(["run", *SIZES, *typed, second, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["run"], facts["second_stage"]["run"]) == ("shop", "shop-ranker")
    assert set(facts["variants"]) == {"trajectory"}
    assert "ndcg@10" in facts["test"]
    assert "view/auc" in facts["second_stage"]["test"]
    run = read_manifest(workspace.find("run", "shop-ranker"), "run")
    assert (run["tasks"], run["retriever"]["run"]) == (["view", "cart"], "shop")
    bundle = read_manifest(Path(facts["bundle"]), "bundle")
    assert bundle["ranker"]["run"] == "shop-ranker"
    assert bundle["ranker"]["candidates"] == 20
    assert bundle["run"] == "shop"


@pytest.mark.parametrize(
    ("typed", "also", "problem"),
    [
        ("ranking.candidate=20", [], "no setting 'ranking.candidate'"),
        (
            "seed=2",
            ["model.layer.heads=2"],
            "no setting 'model.layer.heads' with the other choices",
        ),
    ],
)
def test_a_mistake_of_the_second_stage_is_found_before_the_first(
    typed: str,
    also: list[str],
    problem: str,
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", *SIZES, typed, f"second_stage={quoted([*SECOND, *also])}"]) == 2
    assert problem in capsys.readouterr().err
    assert not workspace.root.exists() or not list(workspace.root.rglob("manifest.json"))


def test_without_a_second_stage_its_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"ranking.candidates=20 has no effect on Trajectory"):
        launch.configure([*COMMON, "ranking.candidates=20"])
    assert launch.configure([*SHOP, *RANKER]).ranking.candidates == 20
