"""The engine on a bundle whose answers are known: the aisle of the last item."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from recsys.artifacts import Workspace
from recsys.cli import main
from recsys.history import OWN_RECENCY
from recsys.schema import InputError
from recsys.serving.engine import Engine, UnknownItem, event_times
from recsys.serving.messages import Answer, HistoryEvent, RecommendRequest, Weights
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
    readings = [blended._read(RecommendRequest(weights=w)).recency for w in shares[:3]]
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
    requests = [
        RecommendRequest(user_id="u3", k=7),
        RecommendRequest(),
        RecommendRequest(history=[f"i{i}" for i in range(10, 40)], k=3),
        RecommendRequest(history=["i10"], allow_categories=["books"]),
        RecommendRequest(user_id="u4", deny_categories=["hats"], exclude_items=["i20"]),
        RecommendRequest(user_id="u3", k=7, exclude_seen=False),
        RecommendRequest(history=["gone"], allow_categories=["hats"], k=2),
    ]
    together = engine.recommend(requests)
    for request, answer in zip(requests, together, strict=True):
        alone = engine.recommend([request])[0]
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


def test_every_array_that_an_encoder_may_read_reaches_it(tmp_path: Path) -> None:
    engine = Engine.load(write_tiny_bundle(tmp_path / "all", inputs=ALL_INPUTS))
    seen = {}
    run = engine.session.run

    class Spy:
        def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            seen.update(feed)
            return run(names, feed)

    engine.session = Spy()  # type: ignore[assignment]
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
    reading = placed._read(request)
    assert (reading.path.times.tolist(), reading.now) == ([0, 1, 2], 3)
    stored = placed._read(RecommendRequest(user_id="u8", now=START))
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
        "import sys; from recsys.serving.http import create_app, Engine;"
        "from recsys.serving.messages import RecommendRequest;"
        f"engine = Engine.load({str(path)!r}); create_app(engine);"
        "answer = engine.recommend([RecommendRequest(user_id='u1')])[0];"
        "print(answer.source, engine.item('i9').count);"
        f"print(sorted(m for m in sys.modules if m.split('.')[0] in {FORBIDDEN}"
        f" or m.startswith({ROOMS})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "model 1120\n[]\n", "")
