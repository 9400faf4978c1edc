"""Impressions through prepare: what was shown in, checked and sorted rows out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import Workspace
from recsys.data.dataset import Dataset
from recsys.data.prepare import prepare
from recsys.data.sources.events import Events
from recsys.data.summary import summary
from recsys.schema import InputError

HOUR = 3_600_000
START = 1_600_000_000_000

EVENTS = [
    ("ann", "x", START),
    ("ann", "y", START + HOUR),
    ("ann", "x", START + 2 * HOUR),
    ("bob", "y", START),
]
SHOWN: dict[str, list] = {
    "user_id": ["bob", "ann", "ann", "new", None],
    "item_id": ["x", "y", "x", "z", "x"],
    "timestamp": [START + 3 * HOUR, START + HOUR, START + HOUR, START + 3 * HOUR, START],
    "request_id": ["r2", "r1", "r1", "r3", None],
    "position": [0, 1, 0, 0, None],
    "propensity": [0.5, 0.25, 1.0, None, None],
    "click": [1, 0, 1, None, 0],
    "dwell": [2.5, None, 10.0, None, None],
    "device": ["phone", "tv", "tv", "phone", None],
    "battery": [0.5, 1.0, 1.0, None, 0.0],
}


def events_file(tmp_path: Path) -> Path:
    columns = dict(zip(("user_id", "item_id", "timestamp"), zip(*EVENTS, strict=True), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    return tmp_path / "events.parquet"


def shown_file(tmp_path: Path, **changed: Any) -> Path:
    columns = {name: values for name, values in (SHOWN | changed).items() if values is not None}
    pq.write_table(pa.table(columns), tmp_path / "shown.parquet")
    return tmp_path / "shown.parquet"


def made(
    tmp_path: Path,
    shown: Path,
    events: bool = True,
    settings: dict[str, Any] | None = None,
    split: str = "leave_one_out",
    **source: Any,
) -> Dataset:
    path = str(events_file(tmp_path)) if events else None
    return prepare(
        {"name": "shop", "path": path, **(settings or {})},
        Events(impressions=str(shown), **source),
        {"rule": split},
        Workspace(tmp_path / "workspace"),
    )


def column(dataset: Dataset, name: str) -> list:
    return dataset.impressions[name].to_pylist()


def test_rows_are_sorted_by_time_request_and_position(tmp_path: Path) -> None:
    dataset = made(tmp_path, shown_file(tmp_path))
    users = dataset.users["user_id"].to_pylist()
    items = dataset.items["item_id"].to_pylist()
    assert users == ["ann", "bob", "new"]
    assert sorted(items) == ["x", "y", "z"]
    assert items[2] == "z", "only shown: behind those of events"
    assert dataset.items["count"].to_pylist()[2] == 0
    assert [users[u] if u >= 0 else None for u in column(dataset, "user")] == [
        None,
        "ann",
        "ann",
        "bob",
        "new",
    ]
    assert [items[i - 1] for i in column(dataset, "item")] == ["x", "x", "y", "x", "z"]
    assert column(dataset, "request") == [0, 1, 1, 2, 3]
    assert column(dataset, "position") == [None, 0, 1, 0, 0]
    assert column(dataset, "propensity") == [None, 1.0, 0.25, 0.5, None]
    assert column(dataset, "click") == [0, 1, 0, 1, None]
    assert column(dataset, "dwell") == [None, 10.0, None, 2.5, None]
    assert column(dataset, "device") == [None, "tv", "tv", "phone", "phone"]
    assert dataset.manifest["impressions"] == {
        "rows": 5,
        "requests": 4,
        "parts": False,
        "labels": ["click", "dwell"],
        "context": {"device": "categorical", "battery": "numeric"},
    }
    types = {field.name: str(field.type) for field in dataset.impressions.schema}
    assert list(types)[:6] == ["user", "item", "timestamp", "request", "position", "propensity"]
    assert types["user"] == types["item"] == types["position"] == "int32"
    assert types["click"] == types["propensity"] == "float"


def test_a_request_has_the_time_of_its_first_row(tmp_path: Path) -> None:
    times = [*SHOWN["timestamp"]]
    times[2] += 7
    dataset = made(tmp_path, shown_file(tmp_path, timestamp=times))
    assert column(dataset, "timestamp")[1:3] == [START + HOUR] * 2


def test_without_request_ids_each_row_is_a_request(tmp_path: Path) -> None:
    dataset = made(tmp_path, shown_file(tmp_path, request_id=None))
    assert column(dataset, "request") == [0, 1, 2, 3, 4]


def test_rare_ids_stay_unknown_where_rare_ones_are_left_out(tmp_path: Path) -> None:
    dataset = made(tmp_path, shown_file(tmp_path), settings={"min_user_events": 2})
    assert dataset.users["user_id"].to_pylist() == ["ann"]
    assert column(dataset, "user") == [-1, 0, 0, -1, -1]
    dataset = made(tmp_path, shown_file(tmp_path), settings={"min_item_events": 2})
    assert sorted(dataset.items["item_id"].to_pylist()) == ["x", "y"]
    assert column(dataset, "item")[-1] == 0


def test_features_of_items_only_shown_are_kept(tmp_path: Path) -> None:
    items = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": ["x", "y", "z"], "price": [1.0, 2.0, 3.0]}), items)
    dataset = made(tmp_path, shown_file(tmp_path), items=str(items))
    assert dataset.items["price"].to_pylist()[2] == 3.0


def test_no_users_items_or_events_at_all(tmp_path: Path) -> None:
    """A public click log: labels, and fields that mean nothing."""
    file = tmp_path / "ctr.csv"
    rows = [(place % 2, place / 4, f"c{place % 3}") for place in range(20)]
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("label", "I1", "C1"), *rows])
    unknown = {"user_id": None, "item_id": None, "timestamp": None, "click": "label"}
    dataset = made(
        tmp_path, file, False, {"request_features": {"I1": "numeric"}}, impression_columns=unknown
    )
    assert (dataset.num_users, dataset.num_items, dataset.manifest["num_events"]) == (0, 0, 0)
    assert len(dataset.items) == len(dataset.users) == 0
    assert dataset.manifest["event_types"] == []
    assert column(dataset, "click") == [row[0] for row in rows]
    assert column(dataset, "I1") == [row[1] for row in rows]
    assert column(dataset, "timestamp") == list(range(20))
    assert set(column(dataset, "user")) == {-1}
    assert set(column(dataset, "item")) == {0}
    assert len(dataset.split.test) == 0
    assert any("20 in 20" in str(c) for column in summary(dataset).columns for c in column.cells)


def test_impressions_alone_know_their_users_and_items(tmp_path: Path) -> None:
    dataset = made(tmp_path, shown_file(tmp_path), events=False)
    assert dataset.users["user_id"].to_pylist() == ["ann", "bob", "new"]
    assert dataset.items["item_id"].to_pylist() == ["x", "y", "z"]
    assert dataset.offsets.tolist() == [0, 0, 0, 0]
    assert any("2020-09-13" in str(c) for column in summary(dataset).columns for c in column.cells)


def test_a_moment_cuts_impressions_alone(tmp_path: Path) -> None:
    many = {"item_id": ["x"] * 20, "timestamp": [START + i * HOUR for i in range(20)]}
    table = {"user_id": ["u"] * 20, "click": [1] * 20} | many
    pq.write_table(pa.table(table), tmp_path / "many.parquet")
    dataset = made(tmp_path, tmp_path / "many.parquet", events=False, split="temporal")
    assert dataset.manifest["split"]["validation_from"] == START + 16 * HOUR
    assert dataset.manifest["split"]["test_from"] == START + 18 * HOUR


def test_text_seconds_and_own_names(tmp_path: Path) -> None:
    file = tmp_path / "shown.tsv"
    file.write_text("uid\titem_id\tt\tis_click\n7\t007\t1600000000\t1\n7\t8\t1600000001\tnan\n")
    names = {"user_id": "uid", "timestamp": "t", "click": "is_click"}
    dataset = made(tmp_path, file, events=False, impression_columns=names, delimiter="\t")
    assert dataset.items["item_id"].to_pylist() == ["007", "8"]
    assert column(dataset, "timestamp") == [START, START + 1000]
    assert column(dataset, "click") == [1.0, None]


def with_value(name: str, value: Any) -> dict[str, list]:
    return {name: [value, *SHOWN[name][1:]]}


WRONG: list[tuple[dict[str, list | None], Sequence[str]]] = [
    ({"click": None, "dwell": None}, ("no label column", "data.source.labels=[COLUMN]")),
    (with_value("click", 3), ("row 1: click is 3", "0 or 1")),
    (with_value("dwell", -2.0), ("row 1: dwell is -2.0", "0 or more")),
    (with_value("dwell", float("inf")), ("row 1: dwell is inf", "0 or more")),
    (with_value("propensity", 0.0), ("row 1: propensity is 0.0", "above 0 and up to 1")),
    (with_value("propensity", 1.5), ("row 1: propensity is 1.5", "above 0 and up to 1")),
    (with_value("position", -1), ("row 1: position is -1", "whole number")),
    (with_value("battery", float("inf")), ("row 1: battery is inf", "finite")),
    ({"device": ["phone", "tv", "car", None, None]}, ("request 'r1' differ in 'device'",)),
    ({"user_id": ["bob", "ann", "bob", "new", None]}, ("request 'r1' differ in 'user_id'",)),
    ({"user_id": [1.5] * 5}, ("'user_id' is float64", "whole numbers")),
    ({"part": ["train", "valid", "test", "test", "test"]}, ("row 2: part is 'valid'",)),
    ({"item": ["a"] * 5}, ("'item'", "rename it")),
    ({"timestamp": None}, ("no column 'timestamp'", "data.source.impression_columns.timestamp")),
]


@pytest.mark.parametrize(("changed", "expected"), WRONG, ids=lambda one: str(one)[:40])
def test_what_is_wrong_is_named(
    tmp_path: Path, changed: dict[str, list | None], expected: Sequence[str]
) -> None:
    with pytest.raises(InputError) as error:
        made(tmp_path, shown_file(tmp_path, **changed))
    for part in expected:
        assert part in str(error.value), str(error.value)


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"request_features\.devise.*'device'"):
        made(tmp_path, shown_file(tmp_path), settings={"request_features": {"devise": "text"}})
    with pytest.raises(InputError, match=r"label column 'klick'.*'click'"):
        made(tmp_path, shown_file(tmp_path), labels=["klick"])
    with pytest.raises(InputError, match=r"data\.source\.impressions=FILE"):
        prepare(
            {"name": "shop", "path": str(events_file(tmp_path))},
            Events(labels=["click"]),
            {"rule": "leave_one_out"},
            Workspace(tmp_path / "workspace"),
        )


def test_a_dataset_without_impressions_says_so(tmp_path: Path) -> None:
    dataset = prepare(
        {"name": "shop", "path": str(events_file(tmp_path))},
        Events(),
        {"rule": "leave_one_out"},
        Workspace(tmp_path / "workspace"),
    )
    assert dataset.manifest["impressions"] is None
    with pytest.raises(InputError, match="examples=rated"):
        _ = dataset.impressions


def test_requests_are_numbered_across_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.data.engines.CHUNK", 2048)
    rows = 9_000
    request = np.arange(rows) // 3
    table = {
        "user_id": pa.array([f"u{r % 7}" for r in request]),
        "item_id": pa.array([f"i{row % 5}" for row in range(rows)]),
        "timestamp": pa.array(START + request * 10),
        "request_id": pa.array([f"r{r}" for r in request]),
        "click": pa.array(np.arange(rows) % 2),
    }
    pq.write_table(pa.table(table), tmp_path / "shown.parquet")
    dataset = made(tmp_path, tmp_path / "shown.parquet", events=False)
    np.testing.assert_array_equal(dataset.impressions["request"], request)
    assert dataset.manifest["impressions"]["requests"] == 3_000
