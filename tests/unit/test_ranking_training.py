"""Training of a ranker: what it leaves, what it refuses, and that it can be done again."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ranked_shop import FEW, RANKER, RETRIEVER, SHOP, SIMPLE
from recsys.artifacts import Workspace, read_manifest
from recsys.cli import main
from recsys.data.shown import retrieved
from recsys.evaluation.calibration import Calibration
from recsys.features.transitions import PARTS
from recsys.training.first_stage import Retrieval
from recsys.training.ranker_runs import load_ranker
from recsys.training.runs import BEST, load_run, read_config
from recsys.training.task_test import columns_of
from recsys.training.train import retest

FILES = {
    "calibration.json",
    "config.yaml",
    "importance.png",
    "learning-curves.png",
    "manifest.json",
    "ranks-test.parquet",
    "reliability.png",
    "run.json",
    "shown-test.parquet",
}
TABLES = (
    *("features.json", "item_codes.npy", "item_numbers.npy", "item_raw.npy"),
    *("item_vectors.npy", "user_codes.npy", "user_numbers.npy"),
    *(f"transition_0_{part}.npy" for part in PARTS),
)


def trained(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """Train a ranker on the shop and return its facts."""
    capsys.readouterr()
    assert main(["train", *SHOP, *RANKER, *more, "--json"]) == 0, capsys.readouterr().err
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_a_run_has_all_that_says_how_it_did(ranked: Workspace) -> None:
    run = ranked.find("run", "second")
    assert {path.name for path in run.iterdir() if path.is_file()} == FILES
    assert {path.name for path in (run / "ranker").iterdir()} == set(TABLES)
    manifest, first = read_manifest(run, "run"), read_manifest(ranked.find("run", "first"), "run")
    assert manifest["tasks"] == ["view", "favourite", "cart", "purchase", "dwell"]
    assert manifest["retriever"]["run"] == "first"
    assert manifest["retriever"]["fingerprint"] == first["fingerprint"]
    metrics = manifest["metrics"]
    assert set(metrics) == {"test", "uncalibrated", "validation", "best achievable"}
    for task in manifest["tasks"][:-1]:
        found = metrics["test"]
        assert 0 < found[f"{task}/log_loss"] < 1
        assert metrics["best achievable"][f"{task}/auc"] > 0.6
    assert metrics["test"]["dwell/mae"] > 0
    assert metrics["test"]["view/log_loss"] <= metrics["uncalibrated"]["view/log_loss"] + 0.01
    assert metrics["validation"]["epoch"] == 0
    assert metrics["test"]["auc"] == pytest.approx(
        np.mean([metrics["test"][f"{task}/auc"] for task in manifest["tasks"][:-1]])
    )
    with next(run.glob("csv/*/metrics.csv")).open() as file:
        logged = [row for row in csv.DictReader(file) if row.get("validation/auc")]
    assert float(logged[0]["validation/auc"]) == pytest.approx(metrics["validation"]["auc"])


def test_evaluating_again_finds_the_same(
    ranked: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ranked.find("run", "second")
    before = json.loads((run / "manifest.json").read_text())
    saved = {name: (run / "ranker" / name).read_bytes() for name in TABLES}
    again = retest(run, ranked)
    assert again.tested.metrics == before["metrics"]
    assert again.reached == before["metrics"]["validation"]["auc"]
    assert {name: (run / "ranker" / name).read_bytes() for name in TABLES} == saved
    assert list(again.tested.stages) == ["retrieval", "two stages"]
    assert again.tested.worth is not None
    assert set(again.tested.worth.metrics) == {"retrieval, by truth", "two stages, by truth"}
    assert all(np.isfinite(value) for value in again.tested.logged.values())


def test_a_retriever_named_latest_is_still_that_one_later(
    ranked: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    ranked.mark_latest("run", ranked.find("run", "first"))
    result = trained(
        capsys, *FEW, *SIMPLE, "ranking.retriever=latest", "ranking.tasks=[view]", "name=late"
    )
    run = ranked.find("run", "late")
    assert ranked.find("run") == run
    assert read_config(run).ranking.retriever == str(ranked.find("run", "first"))
    assert main(["evaluate", "late", "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["test"] == result["test"]
    assert main(["train", *SHOP, *RANKER, "ranking.retriever=latest"]) == 2
    said = capsys.readouterr().err
    assert "ranking.retriever=latest is a ranker, late; name a retriever's run, such as" in said
    assert "its own: first" in said


KILLED = """
import os, signal, sys
from recsys.cli import main
from recsys.training.ranking import RankerModule

train = RankerModule.training_step

def training_step(module, batch, number):
    if module.global_step == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(module, batch, number)

RankerModule.training_step = training_step
sys.exit(main(sys.argv[1:]))
"""


def test_killed_and_resumed_equals_uninterrupted(
    ranked: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        *FEW,
        *SIMPLE,
        "checkpoint_every.steps=2",
        "trainer.max_epochs=2",
        "ranking.weights=learned",
    ]
    whole = trained(capsys, *settings, "name=whole")
    command = ["train", *SHOP, *RANKER, *settings, "name=killed"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], timeout=200, check=False)
    assert killed.returncode == -9
    folder = ranked.folder("run") / "killed"
    assert not (folder / "manifest.json").exists()
    assert main(["train", "resume=killed", "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(read_manifest(folder, "run")["history"]) == 2
    for name, value in whole["test"].items():
        assert resumed["test"][name] == pytest.approx(value, abs=1e-6), name


def test_weights_of_tasks_can_be_learned(ranked: Workspace) -> None:
    state = torch.load(ranked.find("run", "whole") / BEST, weights_only=True)["state_dict"]
    variance_T = state["uncertainty.log_variance"]
    assert len(variance_T) == 5
    assert (variance_T != 0).all()


def test_tasks_are_chosen_and_statistics_of_others_stay(
    ranked: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shop's columns count purchases, whatever is learned."""
    result = trained(capsys, "ranking.tasks=[dwell,view]", "name=two")
    assert {name.split("/")[0] for name in result["test"] if "/" in name} == {"view", "dwell"}
    assert result["test"]["auc"] == result["test"]["view/auc"]
    run = ranked.find("run", "two")
    assert read_manifest(run, "run")["retriever"] is None
    assert not (run / "ranks-test.parquet").exists()
    assert main(["export", "two"]) == 2
    assert "trained without a retriever" in capsys.readouterr().err


def test_importance_is_measured_of_all_that_a_ranker_reads(ranked: Workspace) -> None:
    ranker = load_ranker(ranked.find("run", "second"))
    inputs = ranker.model.inputs
    places = columns_of(ranker.tables.features.layout, inputs)
    assert {place.array for column in places.values() for place in column} == set(inputs)
    assert {place.array for place in places["path"]} > {"path_codes", "types"}


EARLY = ["examples.cut.validation_share=0.003", "examples.cut.test_share=0.1"]


@pytest.fixture
def compared(
    ranked: Workspace, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], dict[str, Any]]:
    def compare(left: str, right: str) -> dict[str, Any]:
        assert main(["compare", left, right, "--json"]) == 0, capsys.readouterr().err
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    return compare


def test_rankers_without_a_retriever_are_compared_by_their_tasks(
    ranked: Workspace, compared: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    result = trained(capsys, "ranking.tasks=[view,dwell]", "name=alone", "seed=5")
    found = compared("second", "alone")
    assert set(found["rows"]) == {"view auc", "view gauc"}
    row, second = found["rows"]["view auc"], read_manifest(ranked.find("run", "second"), "run")
    assert row["left"] == pytest.approx(second["metrics"]["test"]["view/auc"], abs=1e-6)
    assert row["right"] == pytest.approx(result["test"]["view/auc"], abs=1e-6)
    low, mean, high = (row["difference"][name] for name in ("low", "mean", "high"))
    assert low < mean < high
    assert mean == pytest.approx(row["right"] - row["left"])
    assert main(["compare", "first", "alone"]) == 2
    assert "run first is a retriever: it says nothing of what was shown" in capsys.readouterr().err
    trained(capsys, "ranking.tasks=[cart]", "name=other")
    assert main(["compare", "alone", "other"]) == 2
    assert "their tests have the tasks view and cart;" in capsys.readouterr().err


def test_two_stages_are_compared_by_ranks_and_tasks(
    compared: Callable[..., dict[str, Any]],
) -> None:
    found = compared("second", "second")
    assert "ndcg@10" in found["rows"]
    assert set(found["shown"]["rows"]) == {
        f"{task} {figure}"
        for task in ("view", "favourite", "cart", "purchase")
        for figure in ("auc", "gauc")
    }
    assert all(row["difference"]["mean"] == 0 for row in found["shown"]["rows"].values())


LATE = ["examples.cut.validation_share=0.01", "examples.cut.test_share=0.01"]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["~examples"], "name it: examples=impressions (the log's own), examples=rated"),
        (["features=none"], "a ranker reads declared columns, and none are"),
        (["ranking.tasks=[purchse]"], "no task 'purchse' in these examples.*did you mean 'purch"),
        (["ranking.tasks=[]"], "ranking.tasks=[]: expected a task of yes or no among them"),
        (["ranking.tasks=[dwell]"], "ranking.tasks=[dwell]: expected a task of yes or no"),
        (["ranking.blend={viw: 1}"], "ranking.blend: no task 'viw'; the ranker has view, favou"),
        (["ranking.blend={view: 0}"], "ranking.blend: 0 for every task leaves no score"),
        (["ranking.weights={cert: 1}"], "ranking.weights: no task 'cert'.*did you mean 'cart'?"),
        (["ranking.weights={cart: -1}"], "ranking.weights.cart=-1: expected 0 or more"),
        (["ranking.weights=learnt"], "ranking.weights=learnt: expected learned, or a weight"),
        (["ranking.calibration=plat"], "unknown calibration 'plat' of view.*'platt'?"),
        (["ranking.calibration={vew: platt}"], "calibration of unknown task 'vew'"),
        (["ranking.tasks=view"], "ranking.tasks=view: expected a list of tasks, as in [view, pur"),
        (["ranking.blend=view"], "ranking.blend=view: expected numbers of tasks, as in {view: 2}"),
        (["ranking.blend={view: much}"], "ranking.blend.view=much: expected a number, as in 2 or"),
        (["ranking.blend={view: nan}"], "ranking.blend.view=nan: expected a number"),
        (["ranking.weights={cart: much}"], "ranking.weights.cart=much: expected a number, as in"),
        (["ranking.weights=2"], "ranking.weights=2: expected numbers of tasks, as in {view: 2}"),
        (["ranking.candidates=0"], "ranking.candidates=0: expected a whole number, 1 or more"),
        (["ranking.candidates=1.5"], "ranking.candidates=1.5: expected a whole number, 1 or more"),
        (["ranking.listwise=-1"], "ranking.listwise=-1: expected a number, 0 or more"),
        (["ranking.listwise=nan"], "ranking.listwise=nan: expected a number, 0 or more"),
        (["ranking.listwise=much"], "ranking.listwise=much: expected a number, 0 or more"),
        (["model.max_length=1"], "model.max_length=1: expected a whole number, 2 or more"),
        (
            ["ranking.tasks=[purchase]", *EARLY],
            "items shown in the validation part have no task (purchase) with a yes and a no, so",
        ),
        (["+ranking.listwisse=1"], "unknown setting ranking.listwisse; did you mean 'listwise'?"),
        (["ranking.retriever=nobody"], "no run named 'nobody'"),
        (["ranking.retriever=second"], "ranking.retriever=second is a ranker, second"),
        (["ranking.retriever=first", "model.max_length=30"], "this ranker 30; both must read"),
        (
            [*LATE, "ranking.retriever=first"],
            "examples.cut: the ranker would learn from requests up to.*from which both stages",
        ),
        (["examples=retrieved"], "examples=retrieved draws from what a retriever finds"),
        (["examples=rated"], "features.device: requests have no column 'device'"),
        (["loss=bce"], "loss=bce has no effect on Ranker: it is for a retriever; leave it out"),
        (["item_start=cooccurrence"], "item_start=cooccurrence has no effect on Ranker"),
        (["batches=packed"], "model ranker trains on shown batches, not on packed: batches=shown"),
    ],
)
def test_a_ranker_that_cannot_be_is_refused(
    more: list[str], problem: str, ranked: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    there = set(ranked.folder("run").iterdir())
    usual = [o for o in RANKER if more != ["~examples"] or not o.startswith("examples=")]
    if more == ["batches=packed"]:
        usual = [o for o in usual if not o.startswith("batches")]
    assert main(["train", *SHOP, *usual, *[o for o in more if o != "~examples"]]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(".*".join(map(re.escape, problem.split(".*"))), said), said
    assert set(ranked.folder("run").iterdir()) == there, "a refused training leaves nothing"


@pytest.mark.parametrize("typed", ["ranking.candidates=3", "features=shop", "examples=rated"])
def test_what_is_typed_for_a_ranker_is_refused_for_a_retriever(
    typed: str, ranked: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SHOP, *RETRIEVER, typed]) == 2
    assert f"{typed} has no effect on Trajectory: it is for model=ranker" in capsys.readouterr().err


def test_a_retriever_of_other_data_or_of_a_split_with_a_later_past_is_refused(
    ranked: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [o for o in SHOP if o != "split=temporal"]
    assert main(["train", *other, *RANKER, "ranking.retriever=first"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "ranking.retriever=first was trained on synthetic-" in said
    assert "type data=existing data.dataset=synthetic-" in said
    assert main(["train", *other, *RETRIEVER, "name=one-out"]) == 0
    assert main(["train", *other, *RANKER, "ranking.retriever=one-out"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "learnt from events after those" in said
    assert "is split by leave_one_out. Prepare it with split=temporal" in said


def own_shop(folder: Path, valued: bool = True, **columns: list[Any]) -> list[str]:
    """Write a log, items and impressions, and return what trains a ranker on them."""
    rng = np.random.default_rng(2)
    rows, start = 900, 1_600_000_000_000
    user, place = np.divmod(np.arange(400), 10)
    log = {
        "user_id": [f"u{u}" for u in user],
        "item_id": [f"i{i}" for i in rng.integers(0, 20, 400)],
        "timestamp": start + place * 86_400_000 + user,
        "value": rng.integers(1, 6, 400).astype(float),
    }
    if not valued:
        del log["value"]
    request = np.arange(rows) // 3
    shown = {
        "user_id": [f"u{r % 40}" for r in request],
        "item_id": [f"i{i}" for i in rng.integers(0, 20, rows)],
        "timestamp": start + request * 2_880_000,
        "view": rng.integers(0, 2, rows),
        **columns,
    }
    items = {"item_id": [f"i{i}" for i in range(20)], "kind": [f"k{i % 4}" for i in range(20)]}
    for name, table in {"log": log, "shown": shown, "items": items}.items():
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return [
        *("data=events", f"data.path={folder / 'log.parquet'}", "split=temporal"),
        f"data.source.impressions={folder / 'shown.parquet'}",
        f"data.source.items={folder / 'items.parquet'}",
        *(o for o in RANKER if not o.startswith(("features", "examples"))),
    ]


KIND = ["features=none", "+features.kind={of: item, kind: categorical}"]


def test_a_column_from_the_future_is_refused(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views = np.random.default_rng(2).integers(0, 2, 900)
    request = np.arange(900) // 3
    bought = np.repeat(np.arange(300) % 2, 3)
    told = [f"{'yes' if bought[r] else 'no'}" for r in range(900)]
    command = own_shop(tmp_path, view=views.tolist(), purchase=bought.tolist(), receipt=told)
    assert len(request) == len(told)
    receipt = "+features.receipt={of: request, kind: categorical}"
    command = ["train", *command, "examples=impressions", *KIND, receipt]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "column 'receipt' alone tells 'purchase' with an AUC of 1.0000" in said
    assert "features_allow=[receipt]" in said
    assert not list(workspace.folder("run").glob("*"))
    assert main([*command, "features_allow=[receipt]"]) == 0


def test_events_with_a_value_are_examples(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *own_shop(tmp_path), *KIND, "examples=rated", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "like/auc" in result["test"]
    command = ["train", *own_shop(tmp_path, valued=False), *KIND, "examples=rated"]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no event has a value, so examples=rated has nothing to learn" in said


def test_a_part_of_one_class_has_no_auc_and_is_no_failure(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody buys after training, and nobody at all puts anything into the cart."""
    buys = [float(r % 5 == 0) if r < 600 else 0.0 for r in range(900)]
    command = own_shop(tmp_path, purchase=buys, cart=[0.0] * 900)
    assert main(["train", *command, *KIND, "examples=impressions", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "purchase/log_loss" in result["test"]
    assert not {"purchase/auc", "cart/auc"} & set(result["test"])
    assert result["test"]["auc"] == result["test"]["view/auc"]
    fits = json.loads((workspace.find("run") / "calibration.json").read_text())
    assert [fits[name]["method"] for name in ("view", "purchase", "cart")] == [
        "platt",
        "none",
        "none",
    ]


def test_a_retriever_says_nothing_of_who_has_no_history(ranked: Workspace) -> None:
    run = load_run(ranked.find("run", "first"))
    retrieval, data = Retrieval(run), run.dataset
    users = np.array([0, 1, 2])
    now = np.full(3, 1_800_000_000_000)
    items_BC = np.array([[1, 2], [3, 4], [0, 5]])

    def told(at: slice, items_BC: np.ndarray) -> dict[str, Any]:
        path = data.histories(users[at], np.array([3, 0, 2])[at])
        queries_BHD = retrieval.queries(users[at], path, now[at])
        return retrieved(queries_BHD, retrieval.vectors_ND[items_BC], path.lengths)

    together, alone = told(slice(3), items_BC), told(slice(2, 3), items_BC[2:])
    scores_BC = together["retrieval_scores"]
    assert np.isnan(scores_BC).tolist() == [[False, False], [True, True], [False, False]]
    assert (together["queries"][1] == 0).all()
    np.testing.assert_allclose(alone["retrieval_scores"], scores_BC[2:], atol=1e-5)
    newest = data.histories(users[2:], np.array([2]))
    found = retrieval.finder(7)(newest, now[2:])
    every = np.arange(1, data.num_items + 1)[None]
    expected = np.argsort(-told(slice(2, 3), every)["retrieval_scores"][0])[:7] + 1
    assert found[0].tolist() == expected.tolist()


def test_a_loaded_ranker_answers_as_the_trained_one(ranked: Workspace) -> None:
    loaded = load_ranker(ranked.find("run", "second"))
    assert loaded.candidates == 20
    assert loaded.blend == {"view": 1.0, "favourite": 1.0, "cart": 1.0, "purchase": 1.0}
    fits = json.loads((loaded.path / "calibration.json").read_text())
    ranker = loaded.model.ranker
    assert not loaded.model.training
    one = Calibration.of_json(fits["view"])
    logit_BCT = torch.linspace(-2, 2, 10).reshape(1, 2, 5)
    met = ranker.calibration(logit_BCT, False)[0, :, 0].numpy()
    np.testing.assert_allclose(met, one.probability(logit_BCT[0, :, 0].numpy()), atol=1e-6)
