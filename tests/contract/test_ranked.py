"""The second stage in the server: features, tasks, own candidates, diversity, exploration, skew."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.client import ranking
from recsys.features import Features, ItemTable, gather
from recsys.features.transitions import followed
from recsys.history import Histories, encode
from recsys.index.bundle import Bundle
from recsys.index.search import Hits
from recsys.schema import InputError
from recsys.serving import parts
from recsys.serving.app import App
from recsys.serving.arranging import arranged, diverse, explored
from recsys.serving.deployment import Deployer, Record
from recsys.serving.engine import Engine
from recsys.serving.log import AnswerJournal, LoggedAnswer, Shipper
from recsys.serving.messages import (
    Answer,
    Boosts,
    HistoryEvent,
    RankAnswer,
    RankRequest,
    RecommendRequest,
    Weights,
)
from recsys.serving.rescore import rescore
from recsys.serving.rules import Rules
from recsys.serving.service import Service
from recsys.serving.settings import ServeSettings, flags
from recsys.serving.state import UserPath, open_state
from tiny_bundles import (
    BLEND,
    DAY,
    DEVICES,
    MAX_LENGTH,
    ODD_IDS,
    RANKER_INPUTS,
    START,
    TASKS,
    item_ids,
    tasks_ranker,
    write_tiny_bundle,
)

Call = Callable[..., httpx.Response]
NOW = START + 5 * DAY
ALL = item_ids(120)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "ranked-1"
    return write_tiny_bundle(path, ranker=tasks_ranker(), featured=True)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine.load(bundle)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "plain-1"))


@pytest.fixture
def service(bundle: Path, tmp_path: Path) -> Iterator[Service]:
    yield from made(bundle, tmp_path)


def made(bundle: Path, folder: Path, **settings: Any) -> Iterator[Service]:
    Record(folder).begin(bundle)
    deployer = Deployer(folder)
    state = open_state(f"lmdb:{folder / 'state'}", max_events=50, keep_ms=0, sync=False)
    journal = AnswerJournal(folder / "log")
    asked = ServeSettings(max_history=50, **settings)
    service = Service(deployer, asked, state=state, journal=journal, log_dir=folder / "log")
    yield service
    service.close()
    journal.close()
    state.close()
    deployer.close()


def caller(service: Service) -> Call:
    """Return a function that makes one request in this process."""

    async def send(method: str, url: str, body: Any) -> httpx.Response:
        transport = httpx.ASGITransport(App(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, url, json=body)

    return lambda url, body=None: asyncio.run(
        send("POST" if body is not None else "GET", url, body)
    )


@pytest.fixture
def call(service: Service) -> Call:
    return caller(service)


def refused(response: httpx.Response) -> str:
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    return str(error["message"])


def ask(engine: Engine, **fields: Any) -> Answer:
    return engine.recommend([RecommendRequest(**{"now": NOW, **fields})])[0]


def ids(answer: Any) -> list[str]:
    return [item.item_id for item in answer.items]


def by_hand(path: Path, history: list[int], context: dict[str, Any], user: int) -> np.ndarray:
    """Return [N, T] probabilities as export and training would compute them, array by array."""
    bundle = Bundle.open(path)
    session = onnxruntime.InferenceSession(tasks_ranker().SerializeToString())
    features = Features.of_json(json.loads((path / "ranker" / "features.json").read_text()))
    tables = {p.stem: np.load(p) for p in (path / "ranker").glob("*.npy")}
    table = ItemTable(
        *(tables[f"item_{name}"] for name in ("codes", "numbers", "vectors", "raw")),
        followed(features.transitions, tables.__getitem__),
    )
    count = len(history)
    events = (np.array(history, np.int64), np.ones(count, int), START + DAY * np.arange(count))
    histories, now = Histories.of([events]), np.array([NOW])
    every = np.arange(1, bundle.num_items + 1)[None]
    encoded = encode(histories, MAX_LENGTH, now)
    arrays = encoded | gather(table, every, encoded["items"])
    arrays |= features.crossed(histories, now, every, table)
    codes, numbers = tables["user_codes"][[user]], tables["user_numbers"][[user]]
    arrays |= features.requests(codes, numbers, {n: [v] for n, v in context.items()}, now)
    vectors = np.asarray(bundle.vectors_ND)
    retrieval = vectors @ vectors[history[-1] - 1] if history else np.full(len(vectors), np.nan)
    arrays["retrieval_scores"] = retrieval[None].astype(np.float32)
    return session.run(["probabilities"], {name: arrays[name] for name in RANKER_INPUTS})[0][0]


@pytest.mark.parametrize("context", [{}, {"device": "phone", "budget": 2}, {"device": "fridge"}])
@pytest.mark.parametrize("user", [0, 4])
def test_probabilities_are_those_of_training(
    engine: Engine, bundle: Path, context: dict[str, Any], user: int
) -> None:
    history, user_id = ([], None) if user == 0 else ([4, 5, 6], "u3")
    expected = by_hand(bundle, history, context, user)
    answer = engine.rank(RankRequest(items=ALL, user_id=user_id, context=context, now=NOW))
    assert (answer.source, answer.history_used) == ("model", len(history))
    for item in answer.items:
        chances = expected[engine.catalogue.index[item.item_id] - 1]
        assert [*item.probabilities] == list(TASKS)
        assert [*item.probabilities.values()] == pytest.approx(chances.tolist(), abs=1e-6)
        blended = sum(BLEND[task] * item.probabilities[task] for task in TASKS)
        assert item.score == pytest.approx(blended, abs=1e-6)
    scores = [item.score or 0.0 for item in answer.items]
    assert scores == sorted(scores, reverse=True)
    assert len(ids(answer)) == 120


@pytest.mark.parametrize(
    "history",
    [
        ["i19", "i20", "i21"],
        [HistoryEvent(item, timestamp=(NOW + DAY) / 1000) for item in ("i19", "i20", "i21")],
    ],
    ids=["without times", "by a clock that is fast"],
)
def test_a_history_is_read_as_past_whatever_its_times(
    engine: Engine, history: list[str | HistoryEvent]
) -> None:
    just = [HistoryEvent(item, timestamp=(NOW - 1) / 1000) for item in ("i19", "i20", "i21")]
    known, asked, nothing = (
        engine.rank(RankRequest(items=ALL, history=path, now=NOW)) for path in (just, history, None)
    )
    assert ids(asked) == ids(known)
    scores, expected = ([item.score for item in answer.items] for answer in (asked, known))
    assert scores == expected
    assert scores != [item.score for item in nothing.items]


def test_a_recommendation_is_the_ranking_of_its_candidates(engine: Engine, plain: Engine) -> None:
    asked: dict[str, Any] = {"user_id": "u3", "context": {"device": "desk"}}
    found = ids(ask(plain, user_id="u3", k=20))
    answer = ask(engine, **asked, k=5)
    ranked = engine.rank(RankRequest(items=found, now=NOW, k=5, **asked))
    assert ids(answer) == ids(ranked)
    scores = [item.score for item in ranked.items]
    assert [item.score for item in answer.items] == pytest.approx(scores, abs=1e-6)
    assert list(answer.timings_ms) == ["history", "encode", "search", "rank", "answer"]
    newcomer = ask(engine, k=4, context={"device": "phone"})
    assert (newcomer.source, newcomer.history_used) == ("model", 0)
    popular = ids(ask(plain, k=20))
    assert ids(newcomer) == ids(
        engine.rank(RankRequest(items=popular, now=NOW, k=4, context={"device": "phone"}))
    )


def test_a_batch_is_answered_as_its_requests_alone(engine: Engine) -> None:
    requests = [
        RecommendRequest(user_id="u3", now=NOW, context={"device": "phone"}),
        RecommendRequest(now=NOW, context={"budget": 1.5}),
        RecommendRequest(history=["i9", "i10"], now=NOW, weights=Weights(tasks={"view": 1.0})),
        RecommendRequest(user_id="u3", now=NOW, diversity=0.5, max_per_category=3),
        RecommendRequest(user_id="u5", now=NOW, boosts=Boosts(categories={"hats": 2.0})),
    ]
    for request, answer in zip(requests, engine.recommend(requests), strict=True):
        alone = engine.recommend([request])[0]
        assert ids(alone) == ids(answer)
        scores = [item.score for item in alone.items]
        assert [item.score for item in answer.items] == pytest.approx(scores, abs=1e-6)
        assert alone.path == answer.path


def test_weights_of_tasks_take_the_place_of_the_blend(engine: Engine) -> None:
    items = ALL[20:60]
    whole = engine.rank(RankRequest(items=items, user_id="u3", now=NOW))
    for weights in ({"view": 1.0}, {"purchase": 2.0, "view": -1.0}):
        asked = RankRequest(items=items, user_id="u3", now=NOW, weights=Weights(tasks=weights))
        answer = engine.rank(asked)
        chances = {item.item_id: item.probabilities for item in whole.items}
        for item in answer.items:
            expected = sum(w * chances[item.item_id][task] for task, w in weights.items())
            assert item.score == pytest.approx(expected, abs=1e-6)
    with pytest.raises(
        InputError, match=r"unknown task 'purchse'; did you mean 'purchase'\?.*view"
    ):
        ask(engine, weights=Weights(tasks={"purchse": 1.0}))
    with pytest.raises(InputError, match="0 for every task leaves no score"):
        ask(engine, weights=Weights(tasks={"view": 0.0}))


def test_a_bundle_without_a_ranker_has_no_use_for_tasks_and_context(plain: Engine) -> None:
    with pytest.raises(InputError, match=r"weights.tasks: view has no effect on bundle plain-1"):
        ask(plain, weights=Weights(tasks={"view": 1.0}))
    for fields in ({}, {"user_id": "u3"}):
        with pytest.raises(InputError, match=r"context: device has no effect on bundle plain-1"):
            ask(plain, context={"device": "phone"}, **fields)


WRONG_CONTEXT = [
    ({"devise": "phone"}, "context.devise: no such feature", "did you mean 'device'"),
    ({"hour": 7}, "context.hour: no such feature", "known: device, budget"),
    ({"device": 7}, "context.device: 7 is a number", "expected text"),
    ({"device": ["phone"]}, "context.device: ['phone'] is a list", "expected text"),
    ({"device": {"a": 1}}, "context.device: {'a': 1} is an object", "expected text"),
    ({"budget": "much"}, "context.budget: 'much' is text", "expected a number"),
    ({"budget": True}, "context.budget: True is a truth value", "expected a number"),
    ({"budget": 10**400}, "context.budget: 1000", "not finite"),
]


@pytest.mark.parametrize(("context", "said", "expected"), WRONG_CONTEXT)
@pytest.mark.parametrize("person", [{}, {"user_id": "u3"}])
def test_a_wrong_context_is_refused(
    call: Call, context: dict[str, Any], said: str, expected: str, person: dict[str, str]
) -> None:
    for url, more in (("/v1/recommend", {}), ("/v1/rank", {"items": ["i9"]})):
        message = refused(call(url, {"context": context, **more, **person}))
        assert said in message
        assert expected in message


def test_a_missing_context_is_the_default(engine: Engine) -> None:
    left_out = ask(engine, user_id="u3", context={"device": "phone"})
    said = ask(engine, user_id="u3", context={"device": "phone", "budget": 5.0})
    null = ask(engine, user_id="u3", context={"device": "phone", "budget": None})
    assert ids(left_out) == ids(said) == ids(null)
    scores = [[item.score for item in answer.items] for answer in (left_out, said, null)]
    assert scores[0] == scores[1] == scores[2]
    beyond = ask(engine, user_id="u3", context={"budget": 1e300})
    most = ask(engine, user_id="u3", context={"budget": 9.0})
    assert [i.score for i in beyond.items] == [i.score for i in most.items]


def test_own_candidates(call: Call, engine: Engine) -> None:
    asked = {"items": ["i20", "i9", "i20", "gone", "i10"], "user_id": "u3", "now": NOW}
    answer = call("/v1/rank", asked).json()
    assert {item["item_id"] for item in answer["items"]} == {"i20", "i9", "i10"}
    assert (answer["ignored"]["items"], answer["ignored"]["first_items"]) == (1, ["gone"])
    assert (answer["source"], answer["bundle"]) == ("model", "ranked-1")
    assert answer["answer_id"].startswith("c")
    assert set(answer["timings_ms"]) == {"history", "encode", "rank"}
    assert len(call("/v1/rank", asked | {"k": 2}).json()["items"]) == 2
    seen = call("/v1/rank", {"items": ["i9"], "history": ["i9"]}).json()
    assert [item["item_id"] for item in seen["items"]] == ["i9"]
    text = call("/metrics").text
    assert 'recsys_requests_total{outcome="ok",route="/v1/rank"} 3.0' in text
    assert 'recsys_answers_total{arm="champion",source="model"} 3.0' in text


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({}, "missing required field items"),
        ({"items": []}, "items: expected array of length >= 1"),
        ({"items": [f"x{n}" for n in range(10_001)]}, "items: expected array of length <= 10000"),
        ({"items": ["gone", "away"]}, "knows none of the 2 given, such as 'gone'"),
        ({"items": ["i9"], "k": 0}, "k: expected int >= 1"),
        ({"items": ["i9"], "itms": 1}, "unknown field 'itms'; did you mean 'items'?"),
        ({"items": ["i9", 7]}, "items[1]: expected str, got int"),
        ({"items": ["i9"], "history": ["x"] * 51}, "51 events are over"),
        ({"items": ["i9"], "weights": {"tasks": {"view": 1e9}}}, "expected float <= 1000"),
    ],
)
def test_wrong_candidates(call: Call, body: dict[str, Any], part: str) -> None:
    assert part in refused(call("/v1/rank", body))


def test_ten_thousand_candidates(call: Call) -> None:
    items = [*ALL, *(f"x{n}" for n in range(10_000 - len(ALL)))]
    answer = call("/v1/rank", {"items": items, "user_id": "u3", "deadline_ms": 60_000}).json()
    assert len(answer["items"]) == 120
    assert (answer["ignored"]["items"], len(answer["ignored"]["first_items"])) == (9880, 5)


def test_own_candidates_without_a_ranker(plain: Engine) -> None:
    answer = plain.rank(RankRequest(items=["i9", "i10", "i13"], history=["i9"]))
    assert (answer.source, answer.fallback, ids(answer)[0]) == ("retrieval", None, "i9")
    scores = plain.scores(RecommendRequest(history=["i9"]), ids(answer))
    assert [item.score for item in answer.items] == pytest.approx(scores)
    assert answer.items[0].probabilities == {}
    newcomer = plain.rank(RankRequest(items=["i13", "i10"]))
    assert (newcomer.source, ids(newcomer)) == ("popular", ["i10", "i13"])
    assert newcomer.items[0].score == 1110.0


def test_late_candidates_come_back_as_given(
    service: Service, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = service.engine.rank

    def slowly(*given: Any) -> RankAnswer:
        time.sleep(0.3)
        return rank(*given)

    monkeypatch.setattr(service.engine, "rank", slowly)
    body = {"items": ["i20", "gone", "i9", "i30"], "user_id": "u3", "deadline_ms": 20, "k": 2}
    answer = call("/v1/rank", body).json()
    assert answer["items"] == [{"item_id": "i20"}, {"item_id": "i9"}]
    assert (answer["source"], answer["fallback"]) == ("given", "deadline")
    assert answer["ignored"]["first_items"] == ["gone"]
    assert 'recsys_fallbacks_total{reason="deadline"} 1.0' in call("/metrics").text


@pytest.mark.parametrize("failure", ["raises", "nan"])
def test_a_ranker_that_fails_leaves_the_order_of_retrieval(
    service: Service, call: Call, plain: Engine, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    class Broken:
        def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            if failure == "raises":
                raise RuntimeError("out of memory")
            return [np.full((1, feed["item_codes"].shape[1], 2), np.nan, np.float32)]

    assert service.engine.ranker is not None
    broken = dataclasses.replace(service.engine.ranker, session=Broken())
    monkeypatch.setattr(service.engine.choice, "ranker", broken)
    answer = call("/v1/recommend", {"user_id": "u3", "k": 6}).json()
    assert (answer["source"], answer["fallback"]) == ("model", "ranker")
    assert [i["item_id"] for i in answer["items"]] == ids(ask(plain, user_id="u3", k=6))
    newcomer = call("/v1/recommend", {"k": 3}).json()
    assert (newcomer["source"], newcomer["fallback"]) == ("popular", "ranker")
    assert [item["item_id"] for item in newcomer["items"]] == list(ODD_IDS[:3])
    own = call("/v1/rank", {"user_id": "u3", "items": ["i9", "i14", "i11"]}).json()
    assert (own["source"], own["fallback"]) == ("retrieval", "ranker")
    expected = plain.rank(RankRequest(user_id="u3", items=["i9", "i14", "i11"]))
    assert [item["item_id"] for item in own["items"]] == ids(expected)
    assert 'recsys_fallbacks_total{reason="ranker"} 3.0' in call("/metrics").text


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "short", ranker=tasks_ranker(), featured=True)
    codes = np.load(path / "ranker" / "item_codes.npy")
    np.save(path / "ranker" / "item_codes.npy", codes[:-1])
    with pytest.raises(InputError, match=r"item_codes.npy: \(120, 2\), expected \(121, 2\)"):
        Engine.load(path, verify=False)
    (path / "ranker" / "item_codes.npy").unlink()
    with pytest.raises(InputError, match=r"not a whole bundle: ranker/item_codes\.npy missing"):
        Engine.load(path)
    path = write_tiny_bundle(tmp_path / "others", ranker=tasks_ranker(), featured=True)
    shares = np.load(path / "ranker" / "transition_0_shares.npy")
    np.save(path / "ranker" / "transition_0_shares.npy", shares[:-1])
    with pytest.raises(InputError, match=r"transitions of 119 and 120 items, expected 120; export"):
        Engine.load(path, verify=False)
    (path / "ranker" / "transition_0_shares.npy").unlink()
    with pytest.raises(InputError, match=r"transition_0_shares\.npy"):
        Engine.load(path)
    bare = write_tiny_bundle(tmp_path / "bare", ranker=tasks_ranker())
    with pytest.raises(InputError, match=r"its ranker reads request_codes.*features\.json"):
        Engine.load(bare)
    path = write_tiny_bundle(tmp_path / "blend", ranker=tasks_ranker(), featured=True)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["ranker"]["blend"] = {"buy": 1.0}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"tasks view, purchase and the blend .*buy"):
        Engine.load(path)


def slow_mmr(scores: list[float], vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    """Return places by the formula of the paper, item by item."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    worth = (np.array(scores) - min(scores)) / (max(scores) - min(scores))
    chosen: list[int] = []
    while len(chosen) < k:
        values = {}
        for place in set(range(len(scores))) - set(chosen):
            alike = max((float(unit[place] @ unit[other]) for other in chosen), default=-1.0)
            values[place] = (1 - diversity) * worth[place] - diversity * alike
        chosen.append(max(values, key=lambda place: (values[place], -place)))
    return chosen


@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9, 1.0])
def test_diversity_is_maximal_marginal_relevance(diversity: float) -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    scores = np.sort(rng.normal(size=40))[::-1].tolist()
    hits = np.arange(1, 41), np.array(scores)
    items, kept = diverse(hits, 12, diversity, vectors, None, [])
    expected = slow_mmr(scores, vectors, 12, diversity)
    assert [item - 1 for item in items] == expected
    assert kept.tolist() == [scores[place] for place in expected]


def test_a_diverse_answer_mixes_aisles_and_keeps_its_rules(plain: Engine) -> None:
    same = ask(plain, history=["i9"], k=8)
    assert {item.category for item in same.items} == {"shoes"}
    assert ids(ask(plain, history=["i9"], k=8, diversity=0.0)) == ids(same)
    mixed = ask(plain, history=["i9"], k=8, diversity=0.6)
    assert ids(mixed)[0] == ids(same)[0]
    assert len({item.category for item in mixed.items}) == 4
    capped = ask(plain, history=["i9"], k=6, diversity=0.3, max_per_category=2)
    assert max(Counter(item.category for item in capped.items).values()) == 2
    assert len(capped.items) == 6
    newcomer = ask(plain, k=8, diversity=0.6)
    assert newcomer.source == "popular"
    assert len({item.category for item in newcomer.items}) == 4


def hits(items: list[int], best: float) -> Hits:
    return np.array(items, np.int64), best - np.arange(float(len(items)))


def test_exploration_shows_each_item_as_often_as_it_says() -> None:
    """Of each (item, place) the share of 40,000 answers is its propensity."""
    rng = np.random.default_rng(1)
    top, tail = hits([1, 2, 3], 9), hits([4, 5, 6, 7], 6)
    shown: Counter[tuple[int, int]] = Counter()
    said: dict[tuple[int, int], float] = {}
    for _ in range(40_000):
        answer = explored(top, tail, 0.4, rng)
        assert len(set(answer.items)) == 3
        assert answer.propensities is not None
        for place, (item, chance) in enumerate(zip(answer.items, answer.propensities, strict=True)):
            shown[item, place] += 1
            said[item, place] = chance
    for key, chance in said.items():
        assert chance == pytest.approx(0.6 if key[0] == key[1] + 1 else 0.1)
        assert shown[key] / 40_000 == pytest.approx(chance, abs=0.01)
    assert len(said) == 3 + 3 * 4


def test_exploration_with_a_cap_and_with_a_short_tail() -> None:
    categories = [None, "a", "b", "a", "b", "a", ["a", "b"], None]
    ranked = hits([1, 2, 3, 4, 5, 6, 7], 7)
    vectors = np.eye(7, dtype=np.float32)
    rng = np.random.default_rng(2)
    for _ in range(200):
        answer = arranged(ranked, 2, Rules(1, None, 0.0, 0.9), categories, vectors, rng)
        assert Counter(categories[item] for item in answer.items) == {"a": 1, "b": 1}
    short = explored(hits([1, 2, 3], 4), hits([4], 1), 1.0, rng)
    assert (short.items, short.propensities) == ([4, 2, 3], [1.0, 1.0, 1.0])
    none = explored(hits([1, 2], 2), hits([], 0), 0.5, rng)
    assert (none.items, none.propensities) == ([1, 2], [1.0, 1.0])
    assert explored(hits([], 0), hits([], 0), 0.5, rng).items == []


def test_exploration_is_in_the_answer_and_can_be_repeated(engine: Engine) -> None:
    greedy = ask(engine, user_id="u3", k=5)
    assert {item.propensity for item in greedy.items} == {None}
    told = []
    for _ in range(2):
        engine.choice.draws = np.random.default_rng(11)
        told.append([ask(engine, user_id="u3", k=5, explore=0.5) for _ in range(20)])
    assert [ids(answer) for answer in told[0]] == [ids(answer) for answer in told[1]]
    pool = set(ids(ask(engine, user_id="u3", k=20)))
    for answer in told[0]:
        for item, own in zip(answer.items, ids(greedy), strict=True):
            # 20 items are ranked, of which 15 are not in the first five places.
            assert item.propensity == pytest.approx(0.5 if item.item_id == own else 0.5 / 15)
            assert item.item_id in pool


def test_the_servers_share_is_explored_and_logged(bundle: Path, tmp_path: Path) -> None:
    for service in made(bundle, tmp_path, explore=0.25):
        call = caller(service)
        answer = call("/v1/recommend", {"user_id": "u3"}).json()
        assert len(answer["items"]) == 10
        assert {"propensity"} <= answer["items"][0].keys()
        off = call("/v1/recommend", {"user_id": "u3", "explore": 0}).json()
        assert "propensity" not in off["items"][0]
    logged = {row["answer_id"]: row for row in answers(tmp_path / "log")}
    row = logged[answer["answer_id"]]
    assert row["items"] == [item["item_id"] for item in answer["items"]]
    assert row["propensities"] == [item["propensity"] for item in answer["items"]]
    assert row["explore"] == 0.25
    assert (logged[off["answer_id"]]["propensities"], logged[off["answer_id"]]["explore"]) == (
        (None, None)
    )


def test_the_share_to_explore_is_checked(call: Call) -> None:
    with pytest.raises(InputError, match="explore=2 is out of range; expected 0 to 1"):
        ServeSettings(explore=2)
    flag = dict(flags())["--explore"]
    assert (flag["type"]("0.05"), flag["metavar"]) == (0.05, "N")
    for field in ("explore", "diversity"):
        assert f"{field}: expected float <= 1.0" in refused(call("/v1/recommend", {field: 1.5}))


def test_late_answers_do_not_explore(engine: Engine) -> None:
    request = RecommendRequest(user_id="u3", explore=1.0, diversity=0.5, context={"budget": 3})
    answer = engine.popular(request)
    assert {item.propensity for item in answer.items} == {None}


def answers(log_dir: Path) -> list[dict[str, Any]]:
    """Bring the log into Parquet, and return the answers in it."""
    assert Shipper(log_dir).round()
    return [row for file in parts.files(log_dir / "answers") for row in rows(file)]


def rows(file: Path) -> list[dict[str, Any]]:
    with pq.ParquetFile(file) as parquet:
        return list(parquet.read().to_pylist())


def test_logged_requests_scored_again_are_what_was_served(bundle: Path, tmp_path: Path) -> None:
    """300 answers of every kind while people's paths grow, some within one millisecond."""
    rng = np.random.default_rng(5)
    log_dir = tmp_path / "log"
    for service in made(bundle, tmp_path):
        call = caller(service)
        for step in range(300):
            user = f"u{rng.integers(30)}"
            if rng.random() < 0.6:
                event = {"user_id": user, "item_id": str(rng.choice(ALL[8:])), "event_type": "cart"}
                assert call("/v1/events", event).json()["accepted"] == 1
            answer = call("/v1/recommend", asked(rng, user, step)).json()
            assert answer["items"]
        ranked = call("/v1/rank", {"items": ALL[:50], "user_id": "u2", "k": 7}).json()
        assert len(ranked["items"]) == 7
        shipper = Shipper(log_dir, service.state)
        assert shipper.ship() > 100
    found = answers(log_dir)
    assert len(found) == 301
    engine = Engine.load(bundle)
    done = rescore(engine, log_dir, max_events=50)
    assert (done.answers, done.left) == (301, {})
    assert done.items > 2500
    assert done.largest < 1e-5
    lost = sorted((log_dir / "events").glob("*.parquet"))
    for part in lost:
        part.unlink()
    without = rescore(engine, log_dir, max_events=50)
    assert without.left["path not rebuilt"] > 50
    assert without.answers + sum(without.left.values()) == 301
    other = Engine.load(write_tiny_bundle(tmp_path / "other"))
    assert rescore(other, log_dir).left == {"other bundle": 301}


def test_people_who_were_erased_are_scored_again_too(bundle: Path, tmp_path: Path) -> None:
    log_dir = tmp_path / "log"
    for service in made(bundle, tmp_path):
        call = caller(service)
        call("/v1/events", {"user_id": "u3", "item_id": "i20"})
        assert service.state is not None
        service.state.erase("u3", service.clock())
        call("/v1/events", {"user_id": "u3", "item_id": "i30"})
        answer = call("/v1/recommend", {"user_id": "u3"}).json()
        assert (answer["source"], answer["history_used"]) == ("model", 1)
        Shipper(log_dir, service.state).round()
        erased = dict(service.state.erased())
    assert len(answers(log_dir)) == 1
    engine = Engine.load(bundle)
    assert rescore(engine, log_dir).left == {"path not rebuilt": 1}
    assert rescore(engine, log_dir, erased=erased)[:2] == (1, 10)


def test_events_that_come_with_the_requests(bundle: Path, tmp_path: Path) -> None:
    """Whether an event of the same millisecond had been read, the checksum tells."""

    async def storm(service: Service) -> None:
        transport = httpx.ASGITransport(App(service))
        rng = np.random.default_rng(7)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(40):
                posts = [{"user_id": "u1", "item_id": str(rng.choice(ALL[8:]))} for _ in range(4)]
                sent = [client.post("/v1/events", json=post) for post in posts]
                sent += [client.post("/v1/recommend", json={"user_id": "u1"}) for _ in range(4)]
                order = rng.permutation(8)
                replies = await asyncio.gather(*(sent[place] for place in order))
                assert {reply.status_code for reply in replies} == {200}

    for service in made(bundle, tmp_path):
        asyncio.run(storm(service))
        assert Shipper(tmp_path / "log", service.state).ship() == 160
    assert len(answers(tmp_path / "log")) == 160
    done = rescore(Engine.load(bundle), tmp_path / "log", max_events=50)
    assert (done.answers, done.left) == (160, {})
    assert done.largest < 1e-5


def asked(rng: np.random.Generator, user: str, step: int) -> dict[str, Any]:
    """Return a request of some kind, by turns."""
    body: dict[str, Any] = {"user_id": user, "k": 9}
    if step % 2:
        body["context"] = {"device": str(rng.choice(DEVICES)), "budget": float(rng.uniform(0, 12))}
    if step % 3 == 0:
        body |= {"weights": {"tasks": {"view": 0.7}}, "explore": 0.3}
    if step % 5 == 0:
        body |= {"boosts": {"categories": {"hats": 0.3}}, "diversity": 0.2}
    if step % 7 == 0:
        body["history"] = ["i9", {"item_id": "i10", "event_type": "cart"}, "gone"]
    if step % 11 == 0:
        del body["user_id"]
    return body


def test_a_log_of_an_older_version_is_read_and_merged(tmp_path: Path) -> None:
    """Journals and Parquet files from before the new columns have nothing in them."""
    old = parts.ANSWERS.names[:10]
    folder = tmp_path / "answers"
    folder.mkdir()
    row = ["a0", "u1", START, "b", "champion", "model", 1, ["i9"], [1.0], None]
    table = parts.ANSWERS.empty_table().select(old)
    table = pa.Table.from_pylist([dict(zip(old, row, strict=True))], schema=table.schema)
    for n in range(parts.TOGETHER):
        pq.write_table(table, folder / f"answers-{n:019d}-1.parquet")
    journal = AnswerJournal(tmp_path)
    encoder = journal._encode
    journal._encode = lambda answer: encoder([getattr(answer, name) for name in old])
    journal.record(LoggedAnswer(*row))
    journal.close()
    found = answers(tmp_path)
    assert len(found) == parts.TOGETHER + 1
    assert {row["path"] for row in found} == {None}
    assert set(found[0]) == set(parts.ANSWERS.names)


def test_the_client_asks_with_the_fields_of_a_request() -> None:
    call = ranking(["i9", "i10"], {"user_id": "u1", "context": {"device": "phone"}, "k": 1})
    assert (call.method, call.path) == ("POST", "/v1/rank")
    assert json.loads(call.body or b"") == {
        "items": ["i9", "i10"],
        "user_id": "u1",
        "context": {"device": "phone"},
        "k": 1,
    }
    with pytest.raises(TypeError, match="usr_id"):
        ranking(["i9"], {"usr_id": "u1"})  # type: ignore[typeddict-unknown-key]


def test_a_path_has_one_checksum(engine: Engine) -> None:
    request = RecommendRequest(user_id="new", now=NOW)
    paths = [
        UserPath(list(items), list(types), [START + DAY * t for t in times], list(values), 0)
        for items, types, times, values in (
            (("i9", "i10"), (1, 1), (0, 1), (None, None)),
            (("i10", "i9"), (1, 1), (0, 1), (None, None)),
            (("i9", "i10"), (1, 2), (0, 1), (None, None)),
            (("i9", "i10"), (1, 1), (0, 2), (None, None)),
            (("i9", "i10"), (1, 1), (0, 1), (None, 60.0)),
            (("i9", "i10"), (1, 1), (0, 1), (60.0, None)),
            (("i9",), (1,), (0,), (None,)),
            ((), (), (), ()),
        )
    ]
    sums = [engine.checksum(request, path) for path in paths]
    assert len(set(sums)) == len(sums)
    assert [engine.checksum(request, path) for path in paths] == sums
