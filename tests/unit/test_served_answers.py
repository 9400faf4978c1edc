"""The answers of a server's log read back as impressions: what was shown, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import Workspace
from recsys.data.dataset import Dataset
from recsys.data.examples import impressions
from recsys.data.prepare import prepare
from recsys.data.sources import answers as answers_module
from recsys.data.sources import served
from recsys.data.sources.served import Served
from recsys.data.summary import summary
from recsys.schema import InputError
from recsys.serving.log import AnswerJournal, LoggedAnswer, Shipper
from recsys.serving.state import LoggedEvent, open_state

T = 1_700_000_000_000
HOUR = 3_600_000
LABELS = ("view", "favourite", "cart", "purchase", "dwell")


def answer(number: int, items: Sequence[str] = ("a", "b"), **other: Any) -> LoggedAnswer:
    """Return an answer of the moment T + number."""
    said = {"user_id": "u", "source": "model", "now": T + number, **other}
    return LoggedAnswer(
        f"a{number}",
        time=T + 9 * HOUR,
        bundle="shop-1",
        arm="champion",
        k=len(items),
        items=[*items],
        scores=[1.0] * len(items),
        **said,
    )


def event(number: int, item: str, answer_id: str | None = None, **other: Any) -> LoggedEvent:
    said = {"event_type": "view", "timestamp": T + number, "received": T, **other}
    return LoggedEvent(f"e{number}", "u", item, answer_id=answer_id, **said)


LATE = event(2 * HOUR, "a")
"""After it, answers of the first hour have an outcome."""


def logged(
    log_dir: Path, events: Iterable[LoggedEvent], answers: Iterable[LoggedAnswer] = ()
) -> Path:
    """Let a server's own parts write events and answers to a log."""
    state = open_state(f"lmdb:{log_dir.parent / 'state'}", max_events=99, keep_ms=0, sync=False)
    state.append([*events])
    journal = AnswerJournal(log_dir)
    for one in answers:
        journal.record(one)
    journal.close()
    assert Shipper(log_dir, state).round()
    state.close()
    return log_dir


def made(tmp_path: Path, path: Path, settings: dict[str, Any] | None = None, **source: Any) -> Any:
    return prepare(
        {"name": "shop", "path": str(path), **(settings or {})},
        Served(**source),
        {"rule": "leave_one_out"},
        Workspace(tmp_path / "workspace"),
    )


def shown(dataset: Dataset, *names: str) -> list[tuple]:
    """Return (request, item id, position, …) of each row, with the columns named."""
    table = dataset.impressions
    items = [None, *dataset.items["item_id"].to_pylist()]
    columns = [table["request"].to_pylist(), [items[i] for i in table["item"].to_pylist()]]
    more = (table[name].to_pylist() for name in ("position", *names))
    return [*zip(*columns, *more, strict=True)]


def dropped(dataset: Dataset) -> dict[str, int]:
    left = dataset.manifest["dropped"].items()
    return {reason: count for reason, count in left if "answer" in reason or "name" in reason}


def test_what_was_shown_is_labelled_by_the_events_that_name_it(tmp_path: Path) -> None:
    answers = [answer(10, ["c", "a", "b", "e"], propensities=[1.0, 0.25, 0.5, 1.0], explore=0.1)]
    answers += [answer(20, ["b", "c"], user_id=None), answer(5, ["d"], user_id="new")]
    events = [
        event(11, "a", "a10", value=2.5),
        event(12, "a", "a10", value=7.0),
        event(13, "b", "a10", event_type="purchase", value=99.0),
        event(14, "c", "a10", event_type="cart"),
        event(15, "c", "a10", event_type="favourite"),
        event(16, "d", "a10"),  # not of that answer
        event(17, "b", "a0"),  # of no answer here
        event(18, "b"),
        event(21, "c", "a20", value=-1.0),
        LATE,
    ]
    dataset = made(tmp_path, logged(tmp_path / "log", events, answers))
    assert shown(dataset, "propensity", *LABELS) == [
        (0, "d", 0, None, 0, 0, 0, 0, None),
        (1, "c", 0, 1.0, 1, 1, 1, 0, None),
        (1, "a", 1, 0.25, 1, 0, 0, 0, 7.0),
        (1, "b", 2, 0.5, 1, 0, 0, 1, None),
        (1, "e", 3, 1.0, 0, 0, 0, 0, None),
        (2, "b", 0, None, 0, 0, 0, 0, None),
        (2, "c", 1, None, 1, 0, 0, 0, None),
    ]
    assert dataset.impressions["timestamp"].to_pylist() == [T + 5] + [T + 10] * 4 + [T + 20] * 2
    users = [*dataset.users["user_id"].to_pylist(), None]
    named = [users[row] for row in dataset.impressions["user"].to_pylist()]
    assert named == ["new"] + ["u"] * 4 + [None] * 2
    assert dropped(dataset) == {}
    assert dataset.manifest["source_rows"] == dataset.manifest["num_events"] == len(events)


def test_examples_of_a_ranker_are_what_was_shown(tmp_path: Path) -> None:
    answers = [answer(n, ["a", "b"], context='{"device":"tv"}') for n in range(10, 30)]
    events = [event(n, "b", f"a{n}") for n in range(12, 30)]
    dataset = made(tmp_path, logged(tmp_path / "log", [*events, LATE], answers))
    examples = impressions(dataset)
    assert (examples.tasks, len(examples), len(examples.items)) == (LABELS, 20, 40)
    assert examples.label("view").tolist() == [0] * 5 + [1] + [0, 1] * 17
    assert examples.label("purchase").tolist() == [0] * 40
    assert all(math.isnan(seconds) for seconds in examples.label("dwell"))
    assert examples.positions.tolist() == [0, 1] * 20
    # What is before is known, what follows is not: of the first three requests nothing.
    assert examples.places.tolist() == [0, 0, *range(18)]
    assert examples.context["device"].to_pylist() == ["tv"] * 20
    assert [len(range(*part.indices(20))) for part in examples.parts.values()] == [16, 2, 2]


def test_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    answers = [
        answer(1),
        answer(2, fallback="deadline"),
        answer(3, fallback="ranker"),
        answer(4, source="given"),
        answer(5, source="oracle"),
        answer(6, now=5),
        answer(7, context="[1]"),
        answer(8, context="{half"),
        answer(HOUR),
        answer(HOUR + 1),
        answer(9, items=[]),
        answer(11, source="popular"),
        answer(12, source="retrieval"),
        answer(1),
    ]
    log_dir = logged(tmp_path / "log", [event(2, "a", "a1"), event(3, "b"), LATE], answers)
    dataset = made(tmp_path, log_dir)
    asked = dataset.impressions["timestamp"].to_pylist()
    assert asked == [T + n for n in (1, 1, 11, 11, 12, 12, HOUR, HOUR)]
    assert dropped(dataset) == {
        "answers of a fallback": 3,
        "answers of unknown source": 1,
        "answers at impossible times": 1,
        "answers whose context is no object": 2,
        "answers too new to have an outcome": 1,
        "answers logged twice": 1,
    }
    assert dataset.manifest["source_rows"] == 3
    assert (
        len(set(made(tmp_path, log_dir, wait_minutes=0).impressions["timestamp"].to_pylist())) == 5
    )


def test_context_becomes_columns(tmp_path: Path) -> None:
    said = [
        '{"device":"tv","age":7,"rate":1,"new":true,"tags":["x","y"],"o":{"a":1},"n":null}',
        '{"device":"car","age":-2,"rate":0.5,"new":false,"tags":[]}',
        '{"device":5,"age":"old","rate":1e999,"tags":"x","new":1}',
        '{"device":"tv","age":8,"ids":[1,2],"a/b~\\"c.$":"odd","":1,"Device":"x"}',
        '{"position":9,"View":1,"user_id":"x","rank":2,"asked":1,"start":2,"like":1,"said_0":"s"}',
        None,
    ]
    answers = [answer(n, ["a"], context=text) for n, text in enumerate(said)]
    log_dir = logged(tmp_path / "log", [event(2, "a", "a1"), event(3, "b"), LATE], answers)
    dataset = made(tmp_path, log_dir)
    assert dataset.manifest["impressions"]["context"] == {
        'a/b~"c.$': "categorical",
        "age": "numeric",
        "asked": "numeric",
        "device": "categorical",
        "new": "numeric",
        "rate": "numeric",
        "said_0": "categorical",
        "start": "numeric",
        "tags": "multi",
    }
    assert shown(dataset, "device", "age", "rate", "new", "tags", 'a/b~"c.$', "start") == [
        (0, "a", 0, "tv", 7, 1.0, True, ["x", "y"], None, None),
        (1, "a", 0, "car", -2, 0.5, False, [], None, None),
        (2, "a", 0, None, None, None, None, None, None, None),
        (3, "a", 0, "tv", 8, None, None, None, "odd", None),
        (4, "a", 0, None, None, None, None, None, None, 2),
        (5, "a", 0, None, None, None, None, None, None, None),
    ]
    types = dataset.impressions.schema
    kinds = [str(types.field(name).type) for name in ("age", "rate", "new")]
    assert kinds == ["int64", "double", "bool"]
    # position, View, user_id, rank, like, the empty one, and Device beside device.
    assert dropped(dataset) == {"names of the context": 7}
    settings = {"request_features": {"age": "categorical"}}
    assert shown(made(tmp_path, log_dir, settings), "age")[0] == (0, "a", 0, "7")


def test_of_many_names_the_commonest_become_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "NAMES", 3)
    said = [f'{{"device":"tv","n{n}":1,"n{n + 1}":1}}' for n in range(4)]
    answers = [answer(n, ["a"], context=text) for n, text in enumerate(said)]
    events = [event(2, "a", "a1"), event(3, "b"), LATE]
    dataset = made(tmp_path, logged(tmp_path / "log", events, answers))
    assert [*dataset.manifest["impressions"]["context"]] == ["device", "n1", "n2"]
    assert dropped(dataset) == {"names of the context": 3}


def test_odd_propensities_are_unknown(tmp_path: Path) -> None:
    chances = [[0.5], [0.0, 1.5], [float("nan"), 1.0]]
    answers = [answer(n, propensities=one) for n, one in enumerate(chances)]
    dataset = made(
        tmp_path, logged(tmp_path / "log", [event(2, "a", "a1"), LATE, event(3, "b")], answers)
    )
    assert dataset.impressions["propensity"].to_pylist() == [None] * 5 + [1.0]


@pytest.mark.parametrize(
    ("answers", "event_", "source", "left"),
    [
        ([], event(2, "a", "a1"), {}, {}),
        ([answer(1)], event(2, "a", "a1"), {"impressions": False}, {}),
        ([answer(1)], event(2, "a"), {}, {"answers, for no event names one": 1}),
        (
            [answer(1)],
            event(2, "a", "a1"),
            {"wait_minutes": 600},
            {"answers too new to have an outcome": 1},
        ),
    ],
)
def test_without_anything_to_learn_there_are_no_impressions(
    tmp_path: Path, answers: list, event_: LoggedEvent, source: dict, left: dict
) -> None:
    log_dir = logged(tmp_path / "log", [event_, event(3, "b"), LATE], answers)
    dataset = made(tmp_path, log_dir, **source)
    assert dataset.manifest["impressions"] is None
    assert dropped(dataset) == left
    assert dataset.manifest["num_events"] == 3


def test_the_events_folder_alone_is_events_alone(tmp_path: Path) -> None:
    log_dir = logged(tmp_path / "log", [event(2, "a", "a1"), event(3, "b"), LATE], [answer(1)])
    assert made(tmp_path, log_dir / "events").manifest["impressions"] is None


def test_an_older_log_of_events_goes_before(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text(f"user_id,item_id,timestamp\nu,x,{T // 1000 - 9}\n")
    log_dir = logged(tmp_path / "log", [event(2, "a", "a1"), event(3, "b"), LATE], [answer(1)])
    dataset = made(tmp_path, log_dir, also=str(tmp_path / "old.csv"))
    assert shown(dataset, "view") == [(0, "a", 0, 1), (0, "b", 1, 0)]
    assert impressions_before(dataset) == 1


def impressions_before(dataset: Dataset) -> int:
    """Return how many events of its user came before the one request."""
    user = dataset.impressions["user"][0].as_py()
    times = dataset.events["times"][dataset.offsets[user] : dataset.offsets[user + 1]]
    return int((times < dataset.impressions["timestamp"][0].as_py()).sum())


def test_logs_of_older_versions_are_read(tmp_path: Path) -> None:
    log_dir = logged(tmp_path / "log", [event(2, "a", "a1"), event(3, "b"), LATE], [answer(1)])
    (file,) = (log_dir / "answers").glob("*.parquet")
    table = pq.read_table(file)
    early = table.set_column(2, "time", pa.array([T + 1])).select(table.column_names[:9])
    pq.write_table(early, file)
    dataset = made(tmp_path, log_dir)
    assert shown(dataset, "view", "propensity") == [(0, "a", 0, 1, None), (0, "b", 1, 0, None)]


def test_what_is_no_log_of_answers_is_refused(tmp_path: Path) -> None:
    log_dir = logged(tmp_path / "log", [event(2, "a", "a1"), LATE])
    pq.write_table(pa.table({"answer_id": ["a1"]}), log_dir / "answers" / "answers-1-x.parquet")
    with pytest.raises(
        InputError, match=r"answers: no column 'user_id', so not the log of a server"
    ):
        made(tmp_path, log_dir)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"impressions": "shown.csv"}, "impressions=shown.csv: expected true or false"),
        ({"wait_minutes": -1}, "wait_minutes=-1: expected minutes, 0 or more"),
        ({"wait_minutes": math.nan}, "wait_minutes=nan: expected minutes"),
        ({"wait_minutes": "long"}, "wait_minutes=long: expected minutes"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Served(**settings)


def test_the_summary_tells_what_was_left_out(tmp_path: Path) -> None:
    from rich.console import Console

    log_dir = logged(
        tmp_path / "log", [event(2, "a", "a1"), event(3, "b"), LATE], [answer(1), answer(HOUR + 1)]
    )
    console = Console(width=300, record=True, quiet=False)
    console.print(summary(made(tmp_path, log_dir)))
    text = console.export_text()
    assert "1 answers too new to have an outcome" in text
    assert "2 in 1 requests; labels view, favourite, cart, purchase, dwell" in text


def test_answers_that_the_server_merges_away_meanwhile_are_read_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_dir = logged(tmp_path / "log", [event(2, "a", "a1"), event(3, "b"), LATE], [answer(1)])
    real = served.parquet

    def merged_away(con: Any, files: list[Path]) -> Any:
        for file in log_dir.rglob("*.parquet"):
            file.unlink()
        return real(con, files)

    monkeypatch.setattr(served, "parquet", merged_away)
    assert len(shown(made(tmp_path, log_dir))) == 2
