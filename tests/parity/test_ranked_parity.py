"""What both stages answer over HTTP is what they answer offline, probabilities torch's own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch

from recsys.artifacts import Workspace, read_manifest
from recsys.cli import main
from recsys.data.shown import as_model, asked
from recsys.evaluation.scorers import EvaluationBatch
from recsys.evaluation.two_stage import TwoStages
from recsys.serving.app import App
from recsys.serving.deployment import Deployer, Record, self_test
from recsys.serving.engine import Engine
from recsys.serving.item_log import ItemChange
from recsys.serving.messages import RankRequest
from recsys.serving.service import Service
from recsys.serving.settings import ServeSettings
from recsys.training.first_stage import Retrieval
from recsys.training.ranker_runs import LoadedRanker, load_ranker
from recsys.training.runs import load_run
from recsys.training.task_test import Reranker
from wire import history

REQUESTS, K = 200, 10
Ask = Callable[[str, list[dict[str, Any]]], list[dict[str, Any]]]


class Offline:
    """Both stages as they were trained, with the tables of the end of the log, as of now."""

    def __init__(self, ranker: LoadedRanker) -> None:
        run = load_run(ranker.retriever)
        self.ranker, self.data, self.retrieval = ranker, run.dataset, Retrieval(run)
        self.rank = Reranker(ranker.model, ranker.tables, self.retrieval, ranker.blend)

    def asks(self, rng: np.random.Generator, newcomers: bool) -> EvaluationBatch:
        """People with some of their path, or people unknown, at moments after it."""
        lengths = np.diff(self.data.offsets)
        users = rng.choice(np.flatnonzero(lengths >= 2), REQUESTS)
        ends = rng.integers(1, lengths[users] + 1)
        if newcomers:
            users, ends = np.full(REQUESTS, -1), np.zeros(REQUESTS, np.int64)
        last = int(np.asarray(self.data.events["times"]).max())
        now = last + rng.integers(1, 10**8, REQUESTS)
        return EvaluationBatch(users, self.data.histories(users, ends), now)

    def bodies(self, batch: EvaluationBatch) -> list[dict[str, Any]]:
        names = self.data.users["user_id"]
        return [
            {
                "user_id": names[int(user)].as_py() if user >= 0 else None,
                "history": history(self.data, batch, b),
                "now": int(batch.now[b]),
            }
            for b, user in enumerate(batch.users)
        ]

    def probabilities(self, batch: EvaluationBatch, items_BC: np.ndarray) -> np.ndarray:
        """Return torch's [B, C, T], array by array as a training makes them."""
        model = self.ranker.model
        asks = batch.users, batch.histories, batch.now
        queries_BHD, vectors_ND = self.retrieval.queries(*asks), self.retrieval.vectors_ND
        tables, length = self.ranker.tables, model.max_length
        arrays = asked(tables, length, *asks, items_BC, queries_BHD, vectors_ND)
        with torch.no_grad():
            return model(*(torch.from_numpy(as_model(arrays[n])) for n in model.inputs)).numpy()


@pytest.fixture(scope="module")
def offline(trained_shop: Workspace) -> Offline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(trained_shop.root))
        assert main(["export", "second", "index=flat"]) == 0
    return Offline(load_ranker(trained_shop.find("run", "second")))


@pytest.fixture(scope="module")
def ask(offline: Offline, trained_shop: Workspace) -> Iterator[Ask]:
    """Ask an application in this process, one request after the other."""
    folder = trained_shop.root / "serving"
    Record(folder).begin(trained_shop.find("bundle"))
    deployer = Deployer(folder)
    service = Service(deployer, ServeSettings(deadline_ms=60_000))

    async def answers(url: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        transport = httpx.ASGITransport(App(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            found = [await client.post(url, json=body) for body in bodies]
        assert {answer.status_code for answer in found} == {200}, found[0].text
        return [answer.json() for answer in found]

    yield lambda url, bodies: asyncio.run(answers(url, bodies))
    service.close()
    deployer.close()


@pytest.mark.parametrize("exclude_seen", [True, False], ids=["unseen", "all"])
def test_an_answer_is_the_offline_two_stages(
    exclude_seen: bool, offline: Offline, ask: Ask
) -> None:
    batch = offline.asks(np.random.default_rng(0), newcomers=False)
    both = TwoStages(
        offline.retrieval.scorer, offline.rank, offline.ranker.candidates, exclude_seen
    )
    best_BK = both.score(batch)[:, 1:].topk(K, dim=1).indices.numpy() + 1
    scores_BK = offline.rank(batch, best_BK)
    bodies = [body | {"k": K, "exclude_seen": exclude_seen} for body in offline.bodies(batch)]
    answers = ask("/v1/recommend", bodies)
    index = {name: i for i, name in enumerate(offline.data.items["item_id"].to_pylist(), start=1)}
    found_BK = np.array([[index[item["item_id"]] for item in a["items"]] for a in answers])
    met_BK = np.array([[item["score"] for item in a["items"]] for a in answers])
    np.testing.assert_allclose(met_BK, scores_BK, atol=1e-4)
    np.testing.assert_allclose(offline.rank(batch, found_BK), scores_BK, atol=1e-4)
    assert (found_BK == best_BK).mean() > 0.99, "items change places only where scores are equal"
    assert {answer["source"] for answer in answers} == {"model"}


@pytest.mark.parametrize("newcomers", [False, True])
def test_probabilities_are_those_of_torch(newcomers: bool, offline: Offline, ask: Ask) -> None:
    rng = np.random.default_rng(1)
    batch = offline.asks(rng, newcomers)
    items_BC = np.stack([rng.permutation(offline.data.num_items)[:12] + 1 for _ in range(REQUESTS)])
    expected_BCT, ids = offline.probabilities(batch, items_BC), offline.data.items["item_id"]
    bodies = offline.bodies(batch)
    for body, items_C in zip(bodies, items_BC, strict=True):
        body["items"] = [ids[int(item) - 1].as_py() for item in items_C]
    tasks = list(offline.ranker.model.tasks)
    answers = ask("/v1/rank", bodies)
    for body, answer, expected_CT in zip(bodies, answers, expected_BCT, strict=True):
        met = {item["item_id"]: item["probabilities"] for item in answer["items"]}
        read = body["history"][-offline.ranker.model.max_length :]
        assert answer.get("history_used", 0) == len(read)
        for item, expected_T in zip(body["items"], expected_CT, strict=True):
            assert list(met[item]) == tasks
            # Seconds of `dwell` are no probability: relative.
            limit = 1e-4 * np.maximum(1, expected_T)
            assert (np.abs(np.array([*met[item].values()]) - expected_T) < limit).all()


def test_the_bundle_passes_its_own_test(offline: Offline, trained_shop: Workspace) -> None:
    bundle = trained_shop.find("bundle")
    manifest = read_manifest(bundle, "bundle")
    assert len(manifest["self_test"]) == 5
    self_test(Engine.load(bundle))
    entry, ranker = manifest["ranker"], offline.ranker
    assert entry["run"] == manifest["name"] == "second"
    assert entry["candidates"] == 20
    assert entry["tasks"] == list(ranker.model.tasks)
    assert entry["blend"] == ranker.blend
    read, made = {*entry["inputs"]}, {"item_embeddings", "path_embeddings"}
    assert {*ranker.model.inputs} - read == {"item_vectors", "candidate_vectors", "path_codes"}
    assert read - {*ranker.model.inputs} == made
    features = json.loads((bundle / "ranker" / "features.json").read_text())
    assert features == ranker.tables.features.as_json()


def test_an_added_item_is_judged_as_one_that_training_has_not_met(
    offline: Offline, trained_shop: Workspace
) -> None:
    engine = Engine.load(trained_shop.find("bundle"))
    vector_D = np.random.default_rng(3).normal(size=engine.bundle.dim).astype(np.float32)
    added = ItemChange("new", False, 0, vector_D.tobytes(), engine.space)
    view = engine.unchanged.changed([added]).view
    batch = offline.asks(np.random.default_rng(4), newcomers=False)
    expected_BCT = offline.probabilities(batch, np.zeros((REQUESTS, 1), np.int64))
    known = engine.catalogue.ids[7]
    for body, expected_CT in zip(offline.bodies(batch), expected_BCT, strict=True):
        request = msgspec.convert(body | {"items": [known, "new"]}, RankRequest)
        met = {item.item_id: item for item in engine.rank(request, view=view).items}
        chances_T = np.array([*met["new"].probabilities.values()])
        np.testing.assert_allclose(chances_T, expected_CT[0], rtol=1e-4, atol=1e-5)
        alone = engine.rank(msgspec.structs.replace(request, items=[known]))
        assert alone.items[0].score == pytest.approx(met[known].score, abs=1e-6)


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("bench_rank_stage.py", ["--requests", "20"], "of the caller"),
        ("check_explanations.py", ["--people", "8"], "at random"),
    ],
)
def test_scripts_that_ask_an_engine(
    script: str, words: list[str], said: str, offline: Offline, trained_shop: Workspace
) -> None:
    file = Path(__file__).parents[2] / "scripts" / script
    home = {**os.environ, "RECSYS_HOME": str(trained_shop.root)}
    done = subprocess.run(
        [sys.executable, str(file), *words], env=home, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
