"""What is served is what was evaluated: the top 20 of 1,000 users, offline and over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from recsys.artifacts import Workspace
from recsys.cli import main
from recsys.data.dataset import Dataset
from recsys.evaluation.protocol import requests
from recsys.evaluation.scorers import EvaluationBatch, ModelScorer
from recsys.serving.app import App
from recsys.serving.deployment import Deployer, Record
from recsys.serving.service import Service
from recsys.serving.settings import ServeSettings
from recsys.training.runs import load_run
from wire import history

USERS, K = 1000, 20
SHOP = ["data=synthetic", f"data.source.num_users={USERS + 100}", "data.source.num_items=300"]
MODELS = {
    "trajectory": ["batches.size=64"],
    "three interests": ["batches.size=64", "model.dim=16", "model.interests=3"],
    "two_tower": ["model=two_tower", "batches=pairs", "loss=in_batch_softmax"],
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("exclude_seen", [True, False], ids=["unseen", "all"])
def test_http_top_20_is_the_offline_top_20(
    model: str, exclude_seen: bool, workspace: Workspace
) -> None:
    settings = [
        *MODELS[model],
        "trainer=cpu",
        "trainer.max_epochs=1",
        "logger=csv",
        "patience=null",
    ]
    assert main(["train", *SHOP, *settings]) == 0
    assert main(["export", "index=flat"]) == 0
    run = load_run(workspace.find("run"))
    asked = requests(run.dataset, "test")
    users, places, now = asked.users[:USERS], asked.places[:USERS], asked.now[:USERS]
    assert len(users) == USERS
    batch = EvaluationBatch(users, run.dataset.histories(users, places), now)
    offline = top(ModelScorer(run.model).score(batch).numpy(), batch, exclude_seen)
    bodies = [
        {"history": history(run.dataset, batch, b), "k": K, "now": int(now[b])}
        for b in range(USERS)
    ]
    answers = served(workspace, [body | {"exclude_seen": exclude_seen} for body in bodies])
    for answer, (scores_N, best_K) in zip(answers, offline, strict=True):
        check(answer, scores_N, best_K, run.dataset)


def served(workspace: Workspace, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers of an application in this process, asked one after the other."""
    folder = workspace.root / "serving"
    Record(folder).begin(workspace.find("bundle"))
    deployer = Deployer(folder)
    service = Service(deployer, ServeSettings(deadline_ms=60_000))

    async def ask() -> list[dict[str, Any]]:
        transport = httpx.ASGITransport(App(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answers = [await client.post("/v1/recommend", json=body) for body in bodies]
        assert {answer.status_code for answer in answers} == {200}
        return [answer.json() for answer in answers]

    try:
        return asyncio.run(ask())
    finally:
        service.close()
        deployer.close()


def top(
    scores_BN: np.ndarray, batch: EvaluationBatch, exclude_seen: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return all scores of each user, and the 20 best of them."""
    scores_BN = scores_BN.copy()
    scores_BN[:, 0] = -np.inf
    if exclude_seen:
        rows = np.repeat(np.arange(len(batch)), batch.histories.lengths)
        scores_BN[rows, batch.histories.items] = -np.inf
    return [(row, np.sort(row)[::-1][:K]) for row in scores_BN]


def check(answer: dict[str, Any], scores_N: np.ndarray, best_K: np.ndarray, data: Dataset) -> None:
    """The same scores place by place; items may only change places where scores are equal."""
    index = {name: i for i, name in enumerate(data.items["item_id"].to_pylist(), start=1)}
    found = np.array([index[item["item_id"]] for item in answer["items"]])
    np.testing.assert_allclose(scores_N[found], best_K, atol=1e-4)
    np.testing.assert_allclose([item["score"] for item in answer["items"]], best_K, atol=1e-4)
