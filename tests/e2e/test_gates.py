"""Real-data gates: hours on two cores, run by `make gates`; each bar is an issue's own figure."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.artifacts import Workspace
from recsys.data.dataset import Dataset
from recsys.data.synthetic import ShopTruth, truth_of
from recsys.serving.engine import Engine
from recsys.serving.messages import RecommendRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]
SEEDS = (1, 2, 3)


def recsys(*arguments: str) -> dict:
    """Run a command as a person would, and return its JSON line."""
    command = [sys.executable, "-m", "recsys.cli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_beauty_reaches_the_published_figures(workspace: Workspace, shared_data: Path) -> None:
    path = shared_data / "amazon_beauty.txt"
    runs = [recsys("run", "experiment=beauty", f"data.path={path}", f"seed={s}") for s in SEEDS]
    assert statistics.mean(run["test"]["recall@10"] for run in runs) >= 0.0900
    assert statistics.mean(run["test"]["ndcg@10"] for run in runs) >= 0.0530
    assert all(run["variants"]["trajectory"]["seconds"] <= 25 * 60 for run in runs)


def test_movielens_beats_the_baselines_on_both_splits(
    workspace: Workspace, shared_data: Path
) -> None:
    path = shared_data / "ml-latest-small"
    result = recsys("run", "experiment=movielens_small", f"data.path={path}")
    for name in ("trajectory", "trajectory_temporal"):
        metrics = result["variants"][name]
        others = [v["ndcg@10"] for k, v in metrics.items() if k.startswith(("item-kNN", "pop"))]
        assert metrics["test"]["ndcg@10"] > max(others), name


def test_synthetic_shop_nears_the_best_achievable(workspace: Workspace) -> None:
    result = recsys("run", "experiment=synthetic")
    reached = result["test"]["ndcg@10"] / result["best achievable"]["ndcg@10"]
    assert reached >= 0.85
    truth = truth_of(Dataset(workspace.find("dataset")))
    assert truth
    engine = Engine.load(workspace.find("bundle"))
    names = list(truth.goods.aisle_names)
    far = names[len(names) // 2 :] + names[: len(names) // 2]
    moved = {
        (a, b): moves_within_two_events(engine, truth, a, b)
        for a, b in zip(names, far, strict=True)
    }
    assert all(moved.values()), [pair for pair, did in moved.items() if not did]


def moves_within_two_events(engine: Engine, truth: ShopTruth, first: str, second: str) -> bool:
    """Whether most of the ten answers stand in the old aisle before, and in the new one after."""
    path = truth.path(first, 4)
    before, after = (aisles(engine, truth, p) for p in (path, path + truth.path(second, 2)))
    return before.count(first) > 5 and after.count(second) > 5


def aisles(engine: Engine, truth: ShopTruth, path: list[str]) -> list[str]:
    (answer,) = engine.recommend([RecommendRequest(history=list(path))])
    return [truth.aisle_of(item.item_id) for item in answer.items]
