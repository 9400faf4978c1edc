"""The engine on a bundle whose answers are known: the aisle of the last item."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from recsys.artifacts import Workspace
from recsys.cli import main
from recsys.history import OWN_RECENCY
from recsys.schema import InputError
from recsys.serving.candidates import Reading
from recsys.serving.engine import Engine
from recsys.serving.messages import Answer, Boosts, HistoryEvent, RecommendRequest, Weights
from recsys.serving.paths import event_times
from recsys.serving.reading import UnknownItem
from recsys.serving.state import UserPath
from tiny_bundles import DAY, MAX_LENGTH, ODD_IDS, START, item_ids, write_tiny_bundle

ALL_INPUTS = ("items", "types", "gaps", "lengths", "request_gap", "request_hour", "users")
BLEND = "model.dim=16 model.layers=1 model.blend=true model.interests=3 trainer.max_epochs=2"
PLAIN = "trainer=cpu logger=csv batches.size=16 evaluation.exclude_seen=false"
FORBIDDEN = ("torch", "pytorch_lightning", "hydra", "pandas", "mlflow", "ibis", "duckdb")
ROOMS = ("recsys.data", "recsys.training", "recsys.models", "recsys.evaluation", "recsys.export")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny-1"))


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Return an engine on a bundle without times and without categories."""
    path = tmp_path_factory.mktemp("bundles") / "placed"
    return Engine.load(write_tiny_bundle(path, has_time=False, has_categories=False))


@pytest.fixture(scope="module")
def blended(ring_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Return an engine on a bundle exported from a small model of three interests that blends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(tmp_path_factory.mktemp("blended")))
        shop = ["data=events", f"data.path={ring_csv}"]
        assert main(["run", *shop, *f"{BLEND} {PLAIN}".split()]) == 0
        yield Engine.load(Workspace().find("bundle"))


def ask(engine: Engine, **fields: object) -> Answer:
    return engine.recommend([RecommendRequest(**fields)])[0]


def ask_live(engine: Engine, path: UserPath, **fields: object) -> Answer:
    return engine.recommend([RecommendRequest(**fields)], [path])[0]


def live(*events: tuple[str, int], erased_before: int = 0) -> UserPath:
    """Return a path of views at days after START."""
    items, days = [item for item, _ in events], [START + day * DAY for _, day in events]
    return UserPath(items, [1] * len(items), days, [None] * len(items), erased_before)


def read(engine: Engine, request: RecommendRequest, path: UserPath | None = None) -> Reading:
    return engine.reader.read(request, path, engine.base)


def ids(answer: Answer) -> list[str]:
    return [item.item_id for item in answer.items]


def aisles(answer: Answer) -> set[object]:
    return {item.category for item in answer.items}


def test_a_known_user_is_answered_from_the_aisle_looked_at_last(engine: Engine) -> None:
    answer = ask(engine, user_id="u0", k=20)
    assert (answer.source, answer.bundle, answer.history_used) == ("model", "tiny-1", 3)
    assert aisles(answer) == {"books"}
    assert len(ids(answer)) == 20
    assert not set(ids(answer)) & set(ODD_IDS[:3])
    scores = [item.score for item in answer.items]
    assert scores == sorted(scores, reverse=True)
    assert {"history", "encode", "search", "answer"} == set(answer.timings_ms)


def test_a_path_that_changes_aisle_changes_the_answer(engine: Engine) -> None:
    assert aisles(ask(engine, history=["i9", "i13"])) == {"shoes"}
    assert aisles(ask(engine, history=["i9", "i13", "i10"])) == {"hats"}


def test_a_given_history_takes_the_place_of_the_stored_one(engine: Engine) -> None:
    given = ask(engine, user_id="u0", history=["i10"], k=100)
    assert ids(given) == ids(ask(engine, history=["i10"], k=100))
    assert ids(ask(engine, user_id="u0", history=[])) == ids(ask(engine, user_id="u0"))


@pytest.mark.parametrize("fields", [{}, {"user_id": "nobody"}, {"history": ["gone", "away"]}])
def test_newcomers_get_popular_items(engine: Engine, fields: dict[str, object]) -> None:
    answer = ask(engine, k=5, **fields)
    assert (answer.source, answer.history_used) == ("popular", 0)
    assert ids(answer) == list(ODD_IDS[:5])
    assert [item.score for item in answer.items] == [1200, 1190, 1180, 1170, 1160]


def test_unknown_items_are_ignored_and_reported(engine: Engine) -> None:
    answer = ask(engine, history=["i9", *(f"gone{i}" for i in range(9))], exclude_items=["no"])
    assert ids(answer) == ids(ask(engine, history=["i9"]))
    assert answer.ignored is not None
    assert answer.ignored.items == 10
    assert answer.ignored.first_items == [f"gone{i}" for i in range(5)]
    assert ask(engine, history=["i9"]).ignored is None


def test_seen_and_excluded_items_stay_out_and_seen_ones_can_stay_in(engine: Engine) -> None:
    assert "i9" not in ids(ask(engine, history=["i9"], k=120))
    assert "i9" in ids(ask(engine, history=["i9"], exclude_seen=False, k=120))
    assert "i13" not in ids(ask(engine, history=["i9"], exclude_items=["i13"], k=120))
    assert ids(ask(engine, exclude_items=["a b", "🎧"], k=3)) == ['say "hi"', "a/b", "名前"]


def test_seen_items_beyond_the_encoders_reach_stay_out_too(engine: Engine) -> None:
    history = item_ids(120)[:60]
    assert not set(ids(ask(engine, history=history, k=120))) & set(history)


@pytest.mark.parametrize("fields", [{}, {"history": ["i9"]}])
def test_category_lists(engine: Engine, fields: dict[str, object]) -> None:
    assert aisles(ask(engine, allow_categories=["hats"], **fields)) == {"hats"}
    allowed = ask(engine, allow_categories=["hats", "books"], deny_categories=["books"], **fields)
    assert aisles(allowed) == {"hats"}
    denied = ask(engine, deny_categories=["shoes"], k=120, **fields)
    assert aisles(denied) == {"hats", "books", "garden"}
    assert len(ids(denied)) == 90
    nothing = ask(engine, allow_categories=["hat"], **fields)
    assert nothing.items == []
    assert nothing.ignored is not None
    assert nothing.ignored.categories == ["hat"]


def test_categories_on_a_bundle_without_them_are_refused(placed: Engine) -> None:
    with pytest.raises(InputError, match="no categories; leave out"):
        ask(placed, allow_categories=["hats"])
    answer = ask(placed, user_id="u0")
    assert (answer.source, answer.items[0].title, answer.items[0].category) == ("model", None, None)


def test_k_beyond_the_catalogue_gives_all_that_there_is(engine: Engine) -> None:
    assert len(ids(ask(engine, history=["i9"], k=1000))) == 119
    assert len(ids(ask(engine, k=1000))) == 120


PATH = [f"i{item}" for item in (1, 2, 3, 4, 5, 6, 20, 21)]


def scored(engine: Engine, **fields: object) -> list[tuple[str, float]]:
    answer = ask(engine, history=PATH, exclude_seen=False, k=30, now=START, **fields)
    return [(item.item_id, item.score) for item in answer.items]


def test_recency_reaches_the_encoder_for_each_request_of_a_batch(blended: Engine) -> None:
    shares = [Weights(), Weights(0), Weights(0.5), Weights(1), Weights(), Weights(0)]
    fixed = {"history": PATH, "exclude_seen": False, "k": 30, "now": START}
    together = blended.recommend([RecommendRequest(weights=w, **fixed) for w in shares])
    for share, answer in zip(shares, together, strict=True):
        alone = dict(scored(blended, weights=share))
        assert {i.item_id: i.score for i in answer.items} == pytest.approx(alone, abs=1e-5)
    one, *others = (dict(scored(blended, weights=Weights(share))) for share in (None, 0, 0.5, 1))
    assert all(one != pytest.approx(other, abs=1e-3) for other in others)
    assert scored(blended) == scored(blended, weights=Weights())
    readings = [read(blended, RecommendRequest(weights=w)).recency for w in shares[:3]]
    assert readings == [OWN_RECENCY, 0, 0.5]


def test_the_recommend_verb_passes_recency_on(
    blended: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ["recommend", "--history", *PATH, "--keep-seen", "--json"]
    scores = []
    for share in ([], ["--recency", "0"], ["--recency", "1"]):
        assert main([*verb, *share]) == 0
        items = json.loads(capsys.readouterr().out.splitlines()[-1])["items"]
        scores.append({item["item_id"]: item["score"] for item in items})
    assert scores[0] != scores[1] != scores[2]
    assert main([*verb, "--recency", "2"]) == 2
    assert "weights.recency: expected float <= 1.0" in capsys.readouterr().err


def test_recency_on_a_bundle_that_does_not_read_it_is_refused(engine: Engine) -> None:
    message = (
        r"weights.recency: 0.8 has no effect on bundle tiny-1: its encoder reads items, lengths, "
        r"expected recency among them; .* train with model=trajectory model.blend=true"
    )
    for fields in ({"history": ["i9"]}, {}):
        with pytest.raises(InputError, match=message):
            ask(engine, weights=Weights(0.8), **fields)
    assert ids(ask(engine, history=["i9"], weights=Weights())) == ids(ask(engine, history=["i9"]))


def test_interests_are_merged_without_repeats_and_in_the_manifest(blended: Engine) -> None:
    assert blended.bundle.manifest["interests"] == 3
    everything = scored(blended)
    assert len({item for item, _ in everything}) == 30
    answer = ask(blended, history=PATH, exclude_items=["i9"], k=30, now=START)
    expected = [item for item, _ in everything if item not in {*PATH, "i9"}]
    assert ids(answer) == expected
    assert len(expected) == 30 - len(PATH) - 1


def test_odd_ids(engine: Engine) -> None:
    for odd in ODD_IDS:
        assert ask(engine, history=[odd]).source == "model"
        assert engine.item(odd).item_id == odd


def test_a_batch_equals_one_at_a_time(engine: Engine) -> None:
    paths = [live(("i50", 9)), None, None, live(("i51", 9)), live(("i52", 1)), *[None] * 7]
    requests = [
        RecommendRequest(user_id="u3", k=7),
        RecommendRequest(),
        RecommendRequest(history=[f"i{i}" for i in range(10, 40)], k=3),
        RecommendRequest(history=["i10"], allow_categories=["books"]),
        RecommendRequest(user_id="u4", deny_categories=["hats"], exclude_items=["i20"]),
        RecommendRequest(user_id="u3", k=7, exclude_seen=False),
        RecommendRequest(history=["gone"], allow_categories=["hats"], k=2),
        RecommendRequest(user_id="u3", max_per_category=2, k=7),
        RecommendRequest(user_id="u3", boosts=Boosts(categories={"hats": 2.0}), k=7),
        RecommendRequest(max_per_category=1),
        RecommendRequest(boosts=Boosts(items={"i77": 9000.0})),
        RecommendRequest(user_id="u5", exclude_items=[f"i{i}" for i in range(10, 120)]),
    ]
    together = engine.recommend(requests, paths)
    for request, path, answer in zip(requests, paths, together, strict=True):
        alone = engine.recommend([request], [path])[0]
        assert ids(alone) == ids(answer)
        assert (alone.source, alone.history_used, alone.ignored) == (
            (answer.source, answer.history_used, answer.ignored)
        )
        scores = [item.score for item in alone.items]
        assert scores == pytest.approx([item.score for item in answer.items], abs=1e-5)


def test_threads_give_the_same_answers(engine: Engine) -> None:
    requests = [RecommendRequest(user_id=f"u{i % 20}") for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda request: engine.recommend([request])[0], requests))
    assert [ids(a) for a in answers] == [ids(a) for a in engine.recommend(requests)]


def test_the_order_of_time_counts_not_the_order_of_sending(engine: Engine) -> None:
    late = HistoryEvent("i10", timestamp=START + DAY)
    early = HistoryEvent("i9", timestamp=START / 1000)
    assert aisles(ask(engine, history=[late, early])) == {"hats"}


def test_events_without_a_time_happen_with_the_one_before() -> None:
    events = [HistoryEvent("a"), HistoryEvent("b", timestamp=10), HistoryEvent("c")]
    events += [HistoryEvent("d", timestamp=20), HistoryEvent("e")]
    assert event_times(events, 5).tolist() == [10_000, 10_000, 10_000, 20_000, 20_000]
    assert event_times(events[:1], 5).tolist() == [5]
    assert event_times([], 5).tolist() == []


def test_a_history_of_100_000_events_is_cut(engine: Engine) -> None:
    answer = ask(engine, history=["i9", "gone"] * 49_999 + ["i9", "i10"])
    assert (answer.history_used, aisles(answer)) == (MAX_LENGTH, {"hats"})
    assert answer.ignored is not None
    assert answer.ignored.items == 49_999


class Told:
    """What an engine's encoder was given last."""

    def __init__(self, engine: Engine) -> None:
        self.run_graph, self.arrays = engine.retrieval.session.run, {}
        engine.retrieval.session = self  # type: ignore[assignment]

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.arrays = {name: array.tolist() for name, array in feed.items()}
        return self.run_graph(names, feed)


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Return an engine whose encoder reads everything."""
    path = tmp_path_factory.mktemp("bundles") / "reading"
    return Engine.load(write_tiny_bundle(path, inputs=ALL_INPUTS))


def test_a_user_seen_a_second_ago_is_answered_from_their_path(engine: Engine) -> None:
    answer = ask_live(engine, live(("i9", 0), ("i10", 1)), user_id="new", k=100)
    assert (answer.source, answer.history_used, answer.ignored) == ("model", 2, None)
    assert aisles(answer) >= {"hats"}
    assert {item.category for item in answer.items[:20]} == {"hats"}
    assert not {"i9", "i10"} & set(ids(answer))
    unknown = ask_live(engine, live(("gone", 0)), user_id="new")
    assert (unknown.source, unknown.ignored) == ("popular", None)


def test_the_live_path_is_joined_to_the_stored_one_by_time(engine: Engine) -> None:
    """User u0 looked at the first three items on days 0, 1 and 2: shoes, hats, books."""
    newer = ask_live(engine, live(("i9", 3), ("gone", 4)), user_id="u0")
    assert (newer.history_used, aisles(newer), newer.ignored) == (4, {"shoes"}, None)
    between = ask_live(engine, live(("i9", 1)), user_id="u0")
    assert (between.history_used, aisles(between)) == (4, aisles(ask(engine, user_id="u0")))
    joined = read(
        engine,
        RecommendRequest(user_id="u0"),
        live(("i9", 0), (ODD_IDS[1], 1), ("i10", 1), ("i11", 7)),
    )
    assert joined.path.items.tolist() == [1, 9, 2, 10, 3, 11]


def test_an_event_that_the_bundle_was_trained_on_meanwhile_counts_once(engine: Engine) -> None:
    first, second, third = ODD_IDS[:3]
    path = live((first, 0), (second, 1), (third, 2), (third, 3))
    reading = read(engine, RecommendRequest(user_id="u0"), path)
    assert reading.path.items.tolist() == [1, 2, 3, 3]
    other_type = path._replace(types=[1, 1, 4, 1])
    reading = read(engine, RecommendRequest(user_id="u0"), other_type)
    assert list(zip(reading.path.items.tolist(), reading.path.types.tolist(), strict=True)) == (
        [(1, 1), (2, 1), (3, 1), (3, 4), (3, 1)]
    )


def test_what_was_posted_comes_after_what_is_stored_where_times_are_places(
    placed: Engine,
) -> None:
    reading = read(placed, RecommendRequest(user_id="u0"), live(("i9", 3), ("i10", 4)))
    assert reading.path.items.tolist() == [1, 2, 3, 9, 10]
    assert (reading.path.times.tolist(), reading.now) == ([0, 1, 2, 3, 4], 5)


def test_seen_items_anywhere_on_the_joined_path_stay_out(engine: Engine) -> None:
    path = live(*((f"i{i}", i) for i in range(9, 9 + 3 * MAX_LENGTH)))
    answer = ask_live(engine, path, user_id="u0", k=1000)
    assert answer.history_used == MAX_LENGTH
    assert not {*path.items, *ODD_IDS[:3]} & set(ids(answer))
    assert len(ids(answer)) == 120 - 3 - 3 * MAX_LENGTH
    kept = ask_live(engine, path, user_id="u0", k=1000, exclude_seen=False)
    assert len(ids(kept)) == 120


def test_a_request_with_its_own_history_leaves_the_live_path_aside(engine: Engine) -> None:
    answer = ask_live(engine, live(("i9", 9)), user_id="u0", history=["i10"], k=100)
    assert ids(answer) == ids(ask(engine, user_id="u0", history=["i10"], k=100))


def test_an_erased_user_is_nobody_to_the_bundle(reading: Engine, placed: Engine) -> None:
    told = Told(reading)
    erased = live(("i9", 5), erased_before=START + 3 * DAY)
    reading.recommend([RecommendRequest(user_id="u0")], [erased])
    assert (told.arrays["items"], told.arrays["users"]) == ([[9]], [0])
    partly = live(("i9", 5), erased_before=START + DAY)
    reading.recommend([RecommendRequest(user_id="u0")], [partly])
    assert (told.arrays["items"], told.arrays["users"]) == ([[3, 9]], [0])
    before = live(("i9", 5), erased_before=START - 1)
    reading.recommend([RecommendRequest(user_id="u0")], [before])
    assert (told.arrays["items"], told.arrays["users"]) == ([[1, 2, 3, 9]], [1])
    own = RecommendRequest(user_id="u0", history=["i10"])
    reading.recommend([own], [erased])
    assert (told.arrays["items"], told.arrays["users"]) == ([[10]], [0])
    reading.retrieval.session = told.run_graph.__self__
    nothing = live(erased_before=START + 3 * DAY)
    assert ask_live(reading, nothing, user_id="u0").source == "popular"
    counts = [reading.reader.stored_events("u0", START + day * DAY) for day in (-1, 0, 1, 2)]
    assert counts == [3, 2, 1, 0]
    assert (reading.reader.stored_events("u0"), reading.reader.stored_events("nobody")) == (3, 0)
    assert read(placed, RecommendRequest(user_id="u0"), live(erased_before=1)).out.size == 0


def test_a_request_from_before_the_newest_event_is_answered(reading: Engine) -> None:
    told = Told(reading)
    answer = ask_live(reading, live(("i9", 9)), user_id="u0", now=START)
    assert (answer.source, told.arrays["request_gap"]) == ("model", [1])
    reading.retrieval.session = told.run_graph.__self__


def test_answers_carry_their_ids_and_their_arm(engine: Engine) -> None:
    asked = [RecommendRequest(user_id="u0"), RecommendRequest()]
    answers = engine.recommend(asked, None, ["one", "two"], "challenger")
    assert [(a.answer_id, a.arm, a.fallback) for a in answers] == [
        ("one", "challenger", None),
        ("two", "challenger", None),
    ]
    assert ask(engine).answer_id == ""


def test_popular_items_need_no_graph(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.retrieval, "session", None)
    request = RecommendRequest(user_id="u0", k=5, deny_categories=["shoes"], max_per_category=2)
    answer = engine.popular(request, live((ODD_IDS[5], 4)))
    assert (answer.source, answer.history_used) == ("popular", 0)
    # Beside shoes (items 1, 5, 9, …) the user's own 2, 3 and 6 are left out.
    assert ids(answer) == [*(ODD_IDS[i] for i in (3, 6, 7)), "i10", "i11"]
    whole = engine.popular(RecommendRequest(k=3))
    assert (ids(whole), whole.items[0].score) == (list(ODD_IDS[:3]), 1200.0)


def test_rules_come_after_the_score_and_before_the_first_k(engine: Engine) -> None:
    plain = {item.item_id: item for item in ask(engine, history=["i9"], k=1000).items}
    far = min(plain, key=lambda item_id: plain[item_id].score)
    boosts = Boosts(items={far: 5.0, "gone": 1.0}, categories={"hats": 0.25, "hat": 1.0})
    answer = ask(engine, history=["i9"], boosts=boosts, k=119)
    added = {item: 0.25 * (shown.category == "hats") for item, shown in plain.items()}
    added[far] += 5.0
    expected = {item: shown.score + added[item] for item, shown in plain.items()}
    assert {i.item_id: i.score for i in answer.items} == pytest.approx(expected, abs=1e-5)
    assert ids(answer) == sorted(expected, key=lambda item: -expected[item])
    assert ids(ask(engine, history=["i9"], boosts=boosts, k=7)) == ids(answer)[:7]
    assert answer.ignored is not None
    assert (answer.ignored.items, answer.ignored.categories) == (1, ["hat"])
    few = ask(engine, history=["i9"], max_per_category=2, k=5)
    assert [i.category for i in few.items].count("shoes") == 2
    assert len(few.items) == 5
    assert len(ask(engine, history=["i9"], max_per_category=2, k=50).items) == 8
    both = {"allow_categories": ["books", "hats"], "exclude_items": [far], "k": 6}
    kept = ask(engine, history=["i9"], boosts=boosts, max_per_category=3, **both)
    assert sorted(i.category for i in kept.items) == ["books"] * 3 + ["hats"] * 3
    assert far not in ids(kept)


def test_rules_hold_for_newcomers(engine: Engine) -> None:
    boosts = Boosts(items={"i120": 1000.0})
    answer = ask(engine, boosts=boosts, max_per_category=1, k=4)
    assert [(i.item_id, i.score) for i in answer.items] == [
        *((ODD_IDS[0], 1200.0), (ODD_IDS[1], 1190.0), (ODD_IDS[2], 1180.0)),
        (ODD_IDS[3], 1170.0),
    ]
    answer = ask(engine, boosts=Boosts(items={"i120": 1195.0}), max_per_category=1, k=4)
    assert ids(answer) == ["i120", *ODD_IDS[:3]]


def test_rules_on_categories_without_any_are_refused(placed: Engine) -> None:
    with pytest.raises(InputError, match="leave out max_per_category"):
        ask(placed, user_id="u0", max_per_category=2)
    item = Boosts(items={"i99": 100.0})
    assert ids(ask(placed, user_id="u0", boosts=item))[0] == "i99"


def test_a_filter_is_resolved_once(engine: Engine) -> None:
    first = engine.catalogue.filter(["hats", "books"], [])
    assert engine.catalogue.filter(["books", "hats"], []) is first
    assert engine.catalogue.filter(None, ["hats"]) is not first
    before = engine.catalogue.filters.nbytes
    for number in range(50):
        assert ask(engine, history=["i9"], allow_categories=[f"no{number}"]).items == []
    assert engine.catalogue.filters.nbytes > before


def ranker(*nodes: onnx.NodeProto, inputs: dict[str, list[str]], output: str = "scores"):
    """Return a ranker's graph; `inputs` are the shapes of what it reads, `two` is the number 2."""
    kinds = {"candidates": TensorProto.INT64, "items": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "ranker",
        [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s)
            for n, s in inputs.items()
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "candidates_c"])],
        [numpy_helper.from_array(np.float32(2), "two")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


BC = ["batch", "count"]
REVERSED = ranker(
    helper.make_node("Neg", ["retrieval_scores"], ["scores"]), inputs={"retrieval_scores": BC}
)
BY_LENGTH = ranker(
    helper.make_node("Cast", ["items"], ["floats"], to=TensorProto.FLOAT),
    helper.make_node("ReduceSum", ["floats"], ["sum"], keepdims=1),
    helper.make_node("Shape", ["floats"], ["shape"]),
    helper.make_node("Cast", ["shape"], ["sizes"], to=TensorProto.FLOAT),
    helper.make_node("ReduceMax", ["sizes"], ["longest"], keepdims=1),
    helper.make_node("Mul", ["sum", "longest"], ["factor"]),
    helper.make_node("Mul", ["retrieval_scores", "factor"], ["scores"]),
    inputs={"items": ["batch", "length"], "retrieval_scores": BC},
)
"""Scores tell how long the padded history was."""
BY_INDEX = ranker(
    helper.make_node("Cast", ["candidates"], ["scores"], to=TensorProto.FLOAT),
    inputs={"candidates": BC, "items": ["batch", "length"]},
)
"""The last of the candidates by index comes first."""


def test_a_ranker_orders_what_the_search_found(engine: Engine, tmp_path: Path) -> None:
    ranked = Engine.load(write_tiny_bundle(tmp_path / "ranked", ranker=REVERSED))
    plain = ask(engine, user_id="u0", k=20)
    answer = ask(ranked, user_id="u0", k=5)
    assert ids(answer) == ids(plain)[::-1][:5]
    expected = [-item.score for item in plain.items[::-1][:5]]
    assert [item.score for item in answer.items] == pytest.approx(expected, abs=1e-6)
    assert list(answer.timings_ms) == ["history", "encode", "search", "rank", "answer"]
    assert ids(ask(ranked, user_id="u0", k=40)) == ids(ask(engine, user_id="u0", k=40))[::-1]
    assert len(ids(ask(ranked, user_id="u0", k=1000))) == 117
    assert ids(ask(ranked, k=3)) == list(ODD_IDS[:3])
    together = ranked.recommend([RecommendRequest(user_id=f"u{u}", k=7) for u in range(5)])
    assert [ids(a) for a in together] == [ids(ask(ranked, user_id=f"u{u}", k=7)) for u in range(5)]


def test_a_ranker_sees_a_request_of_a_batch_as_it_sees_it_alone(tmp_path: Path) -> None:
    ranked = Engine.load(write_tiny_bundle(tmp_path / "ranked", ranker=BY_LENGTH))
    asked = [RecommendRequest(history=["i9"]), RecommendRequest(history=["i10"] * 5)]
    for request, answer in zip(asked, ranked.recommend(asked), strict=True):
        alone = ranked.recommend([request])[0]
        assert [i.score for i in alone.items] == pytest.approx([i.score for i in answer.items])


def test_rules_are_applied_to_the_rankers_scores(tmp_path: Path) -> None:
    ranked = Engine.load(write_tiny_bundle(tmp_path / "ranked", ranker=BY_INDEX))
    first = ask(ranked, history=["i9"], k=20)
    indices = [ranked.catalogue.index[item] for item in ids(first)]
    assert indices == sorted(indices, reverse=True)
    assert {item.category for item in first.items} == {"shoes"}
    answer = ask(ranked, history=["i9"], boosts=Boosts(items={"i10": 0.5, "i11": 200.0}), k=21)
    scores = {item.item_id: item.score for item in answer.items}
    assert ids(answer)[0] == "i11"
    assert (scores["i11"], scores["i10"]) == (211.0, 10.5)
    capped = ask(ranked, history=["i9"], max_per_category=1, k=4)
    assert aisles(capped) == {"shoes", "hats", "books", "garden"}
    filtered = ask(ranked, history=["i9"], allow_categories=["hats"], k=1000)
    assert ids(filtered)[:2] == ["i118", "i114"]
    assert len(filtered.items) == 30


def test_a_ranker_reads_vectors_and_queries(tmp_path: Path) -> None:
    """Twice the inner product of query and candidate, computed anew: twice the score."""
    graph = ranker(
        helper.make_node("Transpose", ["candidate_vectors"], ["columns"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["queries", "columns"], ["products"]),
        helper.make_node("ReduceMax", ["products"], ["best"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["best", "two"], ["scores"]),
        inputs={"queries": ["batch", "h", "d"], "candidate_vectors": ["batch", "count", "d"]},
    )
    path = write_tiny_bundle(tmp_path / "twice", ranker=graph)
    ranked, unranked = Engine.load(path), Engine.load(path, ranked=False)
    one, two = (ask(ranked, user_id="u3", k=9) for _ in range(2))
    plain = ask(unranked, user_id="u3", k=9)
    assert ids(one) == ids(two) == ids(plain)
    doubled = [2 * item.score for item in plain.items]
    assert [item.score for item in one.items] == pytest.approx(doubled, abs=1e-5)


def test_a_ranker_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    odd = ranker(helper.make_node("Neg", ["weather"], ["scores"]), inputs={"weather": BC})
    path = write_tiny_bundle(tmp_path / "odd", ranker=odd)
    with pytest.raises(InputError, match="its ranker reads weather, unknown to this recsys"):
        Engine.load(path)
    mute = ranker(
        helper.make_node("Neg", ["retrieval_scores"], ["logits"]),
        inputs={"retrieval_scores": BC},
        output="logits",
    )
    with pytest.raises(InputError, match="answers with logits, expected scores"):
        Engine.load(write_tiny_bundle(tmp_path / "mute", ranker=mute))
    path = write_tiny_bundle(tmp_path / "none", ranker=REVERSED, candidates=0)
    with pytest.raises(InputError, match=r"expected inputs .* and candidates \(1 or more\)"):
        Engine.load(path)
    path = write_tiny_bundle(tmp_path / "other", ranker=REVERSED)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["ranker"]["inputs"] = ["candidates"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="reads retrieval_scores, its manifest says candidates"):
        Engine.load(path)
    (path / "ranker.onnx").unlink()
    with pytest.raises(InputError, match=r"not a whole bundle: ranker\.onnx missing"):
        Engine.load(path)


def test_a_ranker_that_answers_nonsense_fails(tmp_path: Path) -> None:
    nonsense = ranker(
        helper.make_node("Sqrt", ["reversed"], ["scores"]),
        helper.make_node("Neg", ["retrieval_scores"], ["reversed"]),
        inputs={"retrieval_scores": BC},
    )
    graph = nonsense.graph
    graph.node.extend([graph.node[0]])
    del graph.node[0]
    with pytest.raises(FloatingPointError, match="not finite"):
        Engine.load(write_tiny_bundle(tmp_path / "nonsense", ranker=nonsense))


def test_every_array_that_an_encoder_may_read_reaches_it(tmp_path: Path) -> None:
    engine = Engine.load(write_tiny_bundle(tmp_path / "all", inputs=ALL_INPUTS))
    seen = {}
    run = engine.retrieval.session.run

    class Spy:
        def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            seen.update(feed)
            return run(names, feed)

    engine.retrieval.session = Spy()  # type: ignore[assignment]
    history = [HistoryEvent("i9", "cart", START), HistoryEvent("i10", timestamp=START + 2000)]
    ask(engine, user_id="u2", history=history, now=START + 3_600_000)
    assert {name: array.tolist() for name, array in seen.items()} == {
        "items": [[9, 10]],
        "types": [[3, 1]],
        "gaps": [[0, 3]],
        "lengths": [2],
        "request_gap": [13],
        "request_hour": [23],
        "users": [3],
    }


def test_a_bundle_without_time_counts_places(placed: Engine) -> None:
    request = RecommendRequest(history=["i9", "i10", "i11"])
    reading = read(placed, request)
    assert (reading.path.times.tolist(), reading.now) == ([0, 1, 2], 3)
    stored = read(placed, RecommendRequest(user_id="u8", now=START))
    assert (stored.path.items.tolist(), stored.path.times.tolist(), stored.now) == (
        ([9, 10, 11], [0, 1, 2], 3)
    )


def test_similar_items_are_the_nearest_by_angle(engine: Engine) -> None:
    vectors = np.array(engine.bundle.vectors_ND)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit[8]
    cosines[8] = -1
    answer = engine.similar("i9", 10)
    expected = np.argsort(-cosines)[:10]
    assert [item.item_id for item in answer.items] == [item_ids(120)[i] for i in expected]
    assert answer.items[0].score == pytest.approx(cosines[expected[0]], abs=1e-5)
    assert len(engine.similar("i9", 1000).items) == 119
    with pytest.raises(UnknownItem, match="has no item 'gone'"):
        engine.similar("gone")


def test_an_item_has_its_features_without_vectors(engine: Engine) -> None:
    item = engine.item("i9")
    assert (item.count, item.features) == (
        (1120, {"title": "Title 9", "category": "shoes", "price": pytest.approx(1.5378, abs=1e-3)})
    )


def test_a_bundle_without_users_and_one_with_a_single_item(tmp_path: Path) -> None:
    engine = Engine.load(write_tiny_bundle(tmp_path / "nobody", num_users=0))
    assert ask(engine, user_id="u0").source == "popular"
    single = Engine.load(write_tiny_bundle(tmp_path / "single", num_items=1, num_users=0))
    assert ids(ask(single, history=["a b"])) == []
    assert single.similar("a b").items == []


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "damaged")
    file = path / "item_vectors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"item_vectors\.safetensors: content differs"):
        Engine.load(path)
    (path / "encoder.onnx").unlink()
    with pytest.raises(InputError, match=r"encoder\.onnx"):
        Engine.load(path)


def test_an_encoder_that_reads_something_unknown_is_refused(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "newer", inputs=("items", "lengths", "devices"))
    with pytest.raises(InputError, match="reads devices, unknown to this recsys"):
        Engine.load(path)


def test_serving_starts_without_training_libraries(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "lean")
    program = (
        "import sys, recsys.serving.app; from recsys.serving.engine import Engine;"
        "from recsys.serving.messages import RecommendRequest;"
        f"engine = Engine.load({str(path)!r});"
        "answer = engine.recommend([RecommendRequest(user_id='u1')])[0];"
        "print(answer.source, engine.item('i9').count);"
        f"print(sorted(m for m in sys.modules if m.split('.')[0] in {FORBIDDEN}"
        f" or m.startswith({ROOMS})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "model 1120\n[]\n", "")
