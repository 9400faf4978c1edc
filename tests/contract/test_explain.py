"""Why an item: effects are what scores lose without events, asked of the model itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.cli import main
from recsys.schema import InputError
from recsys.serving.engine import Engine
from recsys.serving.explain_messages import ExplainAnswer, ExplainedItem, ExplainRequest
from recsys.serving.messages import HistoryEvent, RecommendRequest, Weights
from recsys.serving.state import UserPath
from tiny_bundles import DAY, MAX_LENGTH, START, tasks_ranker, write_tiny_bundle

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_explanations.py"
NOW = START + 50 * DAY
ITEMS = ["i40", "i9", "i31"]
PATH = [
    HistoryEvent(item, kind, START + day * DAY)  # type: ignore[arg-type]
    for day, (item, kind) in enumerate(
        [
            ("i9", "view"),
            ("i10", "cart"),
            ("i20", "view"),
            ("i9", "purchase"),
            ("i33", "view"),
            ("i12", "favourite"),
            ("i9", "view"),
        ]
    )
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    folder = tmp_path_factory.mktemp("bundles")
    ranked = write_tiny_bundle(folder / "ranked", ranker=tasks_ranker(), featured=True)
    plain = write_tiny_bundle(folder / "plain")
    placed = write_tiny_bundle(folder / "placed", has_time=False)
    return {path.name: Engine.load(path) for path in (ranked, plain, placed)}


def why(engine: Engine, path: UserPath | None = None, **asked: Any) -> ExplainAnswer:
    return engine.explain(ExplainRequest(**{"items": ITEMS, "now": NOW} | asked), path)


def scores(engine: Engine, **asked: Any) -> np.ndarray:
    return np.array(engine.scores(RecommendRequest(now=NOW, **asked), ITEMS))


def effects(item: ExplainedItem) -> dict[str, float | None]:
    return {reason.name: reason.effect for reason in item.reasons}


@pytest.mark.parametrize("name", ["ranked", "plain", "placed"])
@pytest.mark.parametrize("by", ["item", "category"])
def test_an_effect_is_what_the_score_loses_without_these_events(
    engines: dict[str, Engine], name: str, by: str
) -> None:
    engine = engines[name]

    def of(event: HistoryEvent) -> str:
        return event.item_id if by == "item" else engine.item(event.item_id).features["category"]

    answer = why(engine, history=PATH, by=by, reasons=50)
    assert [item.item_id for item in answer.items] == ITEMS
    whole = scores(engine, history=PATH)
    assert [item.score for item in answer.items] == pytest.approx(whole)
    for left_out in {of(event) for event in PATH}:
        less = whole - scores(engine, history=[e for e in PATH if of(e) != left_out])
        told = [effects(item)[left_out] for item in answer.items]
        assert told == pytest.approx(less, abs=1e-5), left_out
    assert {len(item.reasons) for item in answer.items} == {len({of(e) for e in PATH})}
    assert (answer.source, answer.history_used) == (
        "model" if name == "ranked" else "retrieval",
        len(PATH),
    )


def test_the_reasons_that_raise_a_score_most_come_first(engines: dict[str, Engine]) -> None:
    """The tiny encoder reads the last item alone: all is owed to that, and nothing to others."""
    (item,) = why(engines["plain"], history=PATH, items=["i9"], reasons=2).items
    assert [reason.name for reason in item.reasons] == ["i9", "i12"]
    owed, nothing = item.reasons
    assert owed.effect is not None
    assert (owed.effect > 0.5, nothing.effect) == (True, 0.0)
    assert (owed.events, owed.event_types) == (3, ["view", "purchase"])
    assert owed.last == START + 6 * DAY
    assert nothing.event_types == ["favourite"]


def test_only_what_the_models_read_is_a_reason(engines: dict[str, Engine]) -> None:
    engine = engines["plain"]
    long = ["i50", *["i9", "i10"] * MAX_LENGTH]
    (item,) = why(engine, history=long, items=["i40"], reasons=9).items
    assert {reason.name: reason.events for reason in item.reasons} == {
        "i9": MAX_LENGTH // 2,
        "i10": MAX_LENGTH // 2,
    }


def test_what_was_posted_and_what_is_stored_are_reasons(engines: dict[str, Engine]) -> None:
    live = UserPath(["i9", "gone"], [2, 1], [START + 9 * DAY, START + 10 * DAY], [None, None], 0)
    (item,) = why(engines["plain"], live, user_id="u0", items=["i40"], reasons=9).items
    assert item.reasons[0].name == "i9"
    assert len(item.reasons) == 4
    erased = live._replace(erased_before=START + 20 * DAY, items=[], types=[], times=[], values=[])
    (item,) = why(engines["plain"], erased, user_id="u0", items=["i40"]).items
    assert item.reasons == []


def test_without_the_only_events_there_is_nothing_to_compare_with(
    engines: dict[str, Engine],
) -> None:
    (item,) = why(engines["plain"], history=["i9", "i9"], items=["i40"]).items
    assert effects(item) == {"i9": None}
    # A ranker with features scores those without a history too.
    (item,) = why(engines["ranked"], history=["i9"], items=["i40"]).items
    assert item.reasons[0].effect is not None


def test_each_value_of_the_context_has_its_effect(engines: dict[str, Engine]) -> None:
    context = {"device": "phone", "budget": 9.0}
    answer = why(engines["ranked"], history=PATH, context=context)
    whole = scores(engines["ranked"], history=PATH, context=context)
    for name in context:
        left = {other: value for other, value in context.items() if other != name}
        less = whole - scores(engines["ranked"], history=PATH, context=left)
        assert [item.context[name] for item in answer.items] == pytest.approx(less, abs=1e-6)
    assert any(abs(effect or 0) > 1e-6 for item in answer.items for effect in item.context.values())


def test_task_weights_count(engines: dict[str, Engine]) -> None:
    weights = Weights(tasks={"purchase": 1.0})
    answer = why(engines["ranked"], history=PATH, weights=weights)
    assert [item.score for item in answer.items] == pytest.approx(
        scores(engines["ranked"], history=PATH, weights=weights)
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"items": ["gone", "away"]}, "knows none of the 2 given, such as 'gone'"),
        ({"context": {"device": "phone"}}, "context: device has no effect"),
    ],
)
def test_what_cannot_be_explained_is_said(
    engines: dict[str, Engine], asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        why(engines["plain"], history=PATH, **asked)


def test_it_is_told_in_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = str(write_tiny_bundle(tmp_path / "tiny"))
    asked = ["recommend", path, "--history", "i10", "i9", "-k", "3", "--why"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "because of" in said
    assert said.count("i9 (view) ") == 3
    assert main([*asked, "category"]) == 0
    assert "hats (view)" in capsys.readouterr().out
    assert main(["recommend", path, "--all-users", "--why"]) == 2
    assert "--why has no effect with --all-users" in capsys.readouterr().err
    assert main(["recommend", path, "--history", "i9", "-k", "101", "--why"]) == 2
    assert "--why explains 100 items at most, not 101; lower --top-k" in capsys.readouterr().err


def test_the_measure_of_explanations_runs(tmp_path: Path) -> None:
    """The tiny encoder reads the last item alone, which so is the first reason."""
    path = write_tiny_bundle(tmp_path / "tiny")
    script = [
        sys.executable,
        str(SCRIPT),
        "--bundle",
        str(path),
        "--people",
        "10",
        "--reasons",
        "2",
    ]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=True)
    falls = json.loads(done.stdout.splitlines()[-1])["falls"]
    assert falls["the reasons"][0] == falls["the newest"][0] > 0.1
    assert "at random" in done.stdout
