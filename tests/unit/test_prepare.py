"""Prepare: known logs in, known datasets out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import Workspace, verify
from recsys.data import prepare as module
from recsys.data.dataset import Dataset
from recsys.data.prepare import PrepareSettings, prepare
from recsys.data.sources.events import Events
from recsys.data.sources.movielens import MovieLens
from recsys.data.sources.sequences import Sequences
from recsys.data.splits import moment_at, split_rule
from recsys.data.summary import summary
from recsys.schema import InputError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
DAY = 86_400_000
START = 1_600_000_000_000


def log(tmp_path: Path, rows: list[tuple], name: str = "log.parquet") -> Path:
    columns = ("user_id", "item_id", "timestamp", "event_type", "value")
    pq.write_table(
        pa.table({c: [row[i] for row in rows] for i, c in enumerate(columns[: len(rows[0])])}),
        tmp_path / name,
    )
    return tmp_path / name


def made(
    tmp_path: Path, path: Path, source: Any = None, split: Any = None, **settings: Any
) -> Dataset:
    return prepare(
        {"name": "shop", "path": str(path), **settings},
        source or Events(),
        split or {"rule": "leave_one_out"},
        Workspace(tmp_path / "workspace"),
    )


def trajectories(dataset: Dataset) -> dict[str, list[str]]:
    names = ["", *dataset.items["item_id"].to_pylist()]
    ends = zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)
    users = dataset.users["user_id"].to_pylist()
    return {
        user: [names[i] for i in dataset.events["items"][a:b]]
        for user, (a, b) in zip(users, ends, strict=True)
    }


SMALL = [
    ("ann", "x", START + 3 * DAY, "purchase", 5.0),
    ("ann", "y", START + 1 * DAY, "view", 1.0),
    ("ann", "z", START + 2 * DAY, "view", None),
    ("bob", "y", START + 1 * DAY, "view", None),
    ("bob", "x", START + 1 * DAY, "cart", 2.0),
]


def test_columns_are_sorted_by_user_time_and_source_order(tmp_path: Path) -> None:
    dataset = made(tmp_path, log(tmp_path, SMALL))
    assert trajectories(dataset) == {"ann": ["y", "z", "x"], "bob": ["y", "x"]}
    assert dataset.events["types"].tolist() == [1, 1, 4, 1, 3]
    assert [int(t - START) // DAY for t in dataset.events["times"]] == [1, 2, 3, 1, 1]
    np.testing.assert_array_equal(dataset.events["values"], [1, np.nan, 5, np.nan, 2])
    assert dataset.users["count"].to_pylist() == [3, 2]
    assert dataset.manifest["event_types"] == ["view", "cart", "purchase"]
    assert {name: array.dtype for name, array in dataset.events.items()} == {
        "items": np.int32,
        "types": np.int8,
        "times": np.int64,
        "values": np.float32,
    }
    verify(dataset.path, dataset.manifest)


def test_train_count_excludes_the_last_two_events_of_users_with_three(tmp_path: Path) -> None:
    dataset = made(tmp_path, log(tmp_path, SMALL))
    assert dataset.items.select(["item_id", "count", "train_count"]).to_pylist() == [
        {"item_id": "y", "count": 2, "train_count": 2},
        {"item_id": "x", "count": 2, "train_count": 1},
        {"item_id": "z", "count": 1, "train_count": 0},
    ]


@pytest.mark.parametrize(
    "split",
    [{"rule": "leave_one_out"}, {"rule": "temporal", "validation_share": 0.2, "test_share": 0.3}],
)
def test_train_count_agrees_with_the_split(tmp_path: Path, split: dict) -> None:
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"i{i}", START + int(t))
        for u, i, t in zip(
            rng.integers(0, 60, 900),
            rng.integers(0, 40, 900) ** 2 // 40,
            rng.integers(0, 10**9, 900),
            strict=True,
        )
    ]
    dataset = made(tmp_path, log(tmp_path, rows), split=split)
    users = np.repeat(np.arange(dataset.num_users), np.diff(dataset.offsets))
    places = np.arange(len(users)) - dataset.offsets[users]
    trains = places < dataset.split.train_end[users]
    counts = np.bincount(dataset.events["items"][trains], minlength=dataset.num_items + 1)
    np.testing.assert_array_equal(dataset.train_count, counts)
    totals = np.bincount(dataset.events["items"], minlength=dataset.num_items + 1)[1:]
    np.testing.assert_array_equal(dataset.items["count"], totals)
    ids = dataset.items["item_id"].to_pylist()
    order = [(-t, -c, i) for t, c, i in zip(counts[1:], totals, ids, strict=True)]
    assert order == sorted(order)


def test_temporal_boundaries_are_moments_of_the_log(tmp_path: Path) -> None:
    rows = [("ab"[i % 2], f"i{i % 3}", START + i * DAY) for i in range(10)]
    split = {"rule": "temporal", "validation_share": 0.2, "test_share": 0.1}
    manifest = made(tmp_path, log(tmp_path, rows), split=split).manifest["split"]
    assert manifest["validation_from"] == START + 7 * DAY
    assert manifest["test_from"] == START + 9 * DAY


def test_moment_at_is_the_sorted_value() -> None:
    times = np.random.default_rng(1).integers(-50, 50, 301)
    assert [moment_at(times, p) for p in range(301)] == np.sort(times).tolist()


def test_duplicates_are_counted_and_the_first_is_kept(tmp_path: Path) -> None:
    rows = [*SMALL, ("ann", "x", START + 3 * DAY, "purchase", 9.0), SMALL[1], SMALL[1]]
    path = log(tmp_path, rows)
    dataset = made(tmp_path, path)
    assert dataset.manifest["dropped"] == {"duplicates": 3, "rare": 0}
    assert dataset.manifest["source_rows"] == 8
    np.testing.assert_array_equal(dataset.events["values"], [1, np.nan, 5, np.nan, 2])
    assert made(tmp_path, path, deduplicate=False).manifest["num_events"] == 8


CHAIN = [("a", "123"), ("b", "123"), ("c", "124"), ("d", "45"), ("e", "5")]


def chain(tmp_path: Path) -> Path:
    """Item 5 is rare; without it user d is; without d item 4 is; without 4 user c has two."""
    events = [(user, item) for user, items in CHAIN for item in items]
    return log(tmp_path, [(u, i, START + n) for n, (u, i) in enumerate(events)])


def test_minimum_counts_go_once_over_items_then_users(tmp_path: Path) -> None:
    dataset = made(tmp_path, chain(tmp_path), min_user_events=2, min_item_events=2)
    assert set(trajectories(dataset)) == {"a", "b", "c", "d"}
    assert dataset.manifest["dropped"]["rare"] == 1
    dataset = made(tmp_path, chain(tmp_path), min_user_events=3, min_item_events=2)
    assert {u: "".join(t) for u, t in trajectories(dataset).items()} == dict(CHAIN[:3])


def test_k_core_goes_on_until_nothing_changes(tmp_path: Path) -> None:
    dataset = made(tmp_path, chain(tmp_path), k_core=2, min_user_events=3)
    assert {u: "".join(t) for u, t in trajectories(dataset).items()} == dict(CHAIN[:2])
    assert dataset.items["item_id"].to_pylist() == ["1", "2", "3"]


def test_a_user_with_one_event_only_trains(tmp_path: Path) -> None:
    dataset = made(tmp_path, log(tmp_path, [*SMALL, ("eve", "x", START, "view", None)]))
    assert dataset.split.test.tolist() == [2, -1, -1]
    assert dataset.split.train_end.tolist() == [1, 2, 1]


def test_one_user_is_enough(tmp_path: Path) -> None:
    assert made(tmp_path, log(tmp_path, SMALL[:3])).num_users == 1


ODD_IDS = [
    " a b ",
    "q\"uo'te",
    "😀🛒",
    "商品一号",
    "007",
    "a,b|c",
    "tab\there",
    "NULL",
    "é",
    "e\u0301",
]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_ids_survive_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    rows = [(user, item, START + i) for user in ODD_IDS for i, item in enumerate(ODD_IDS)]
    path = tmp_path / f"log.{suffix}"
    if suffix == "parquet":
        log(tmp_path, rows)
    else:
        import csv
        import gzip

        opened = gzip.open if suffix.endswith("gz") else open
        with opened(path, "wt", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("user_id", "item_id", "timestamp"), *rows])
    dataset = made(tmp_path, path)
    assert trajectories(dataset) == dict.fromkeys(sorted(ODD_IDS), ODD_IDS)


def test_the_same_again_is_reused_and_a_changed_file_is_not(tmp_path: Path) -> None:
    path = log(tmp_path, SMALL)
    first = made(tmp_path, path)
    assert made(tmp_path, path, memory_limit="1GB", threads=1).path == first.path
    assert made(tmp_path, path, min_user_events=2).path != first.path
    log(tmp_path, [*SMALL, ("eve", "x", START, "view", None)])
    again = made(tmp_path, path)
    assert again.path != first.path
    assert Workspace(tmp_path / "workspace").find("dataset") == again.path


def test_making_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = [(f"u{u}", f"i{i}", START) for u, i in rng.integers(0, 30, (3000, 2))]
    path = log(tmp_path, rows)
    prints = set()
    for turn in range(2):
        dataset = prepare(
            {"name": "x", "path": str(path), "threads": turn + 1, "deduplicate": False},
            Events(),
            {"rule": "leave_one_out"},
            Workspace(tmp_path / str(turn)),
        )
        prints.add(dataset.fingerprint)
    assert len(prints) == 1


def test_features_follow_the_index_order(tmp_path: Path) -> None:
    pq.write_table(
        pa.table(
            {
                "sku": ["z", "y", "unsold"],
                "title": ["Zed", "Why", "Never"],
                "brand": ["A", None, "B"],
                "price": [1.5, 2.5, None],
                "tags": [["p", "q"], [], None],
                "vector": [[1.0, 2.0], [3.0, 4.0], None],
                "colours": ["red|blue", "red", ""],
            }
        ),
        tmp_path / "items.parquet",
    )
    (tmp_path / "users.csv").write_text("user_id,age\nbob,30\nann,20\n")
    source = Events(
        items=str(tmp_path / "items.parquet"), item_id="sku", users=str(tmp_path / "users.csv")
    )
    path = log(tmp_path, SMALL)
    dataset = made(tmp_path, path, source, item_features={"colours": "multi"})
    assert dataset.manifest["item_features"] == {
        "title": "text",
        "brand": "categorical",
        "price": "numeric",
        "tags": "multi",
        "vector": "vector",
        "colours": "multi",
    }
    assert dataset.items["title"].to_pylist() == ["Why", None, "Zed"]
    assert dataset.items["vector"].to_pylist() == [[3.0, 4.0], None, [1.0, 2.0]]
    assert dataset.items["colours"].to_pylist() == [["red"], None, ["red", "blue"]]
    assert dataset.users.to_pylist() == [
        {"user_id": "ann", "count": 3, "age": 20},
        {"user_id": "bob", "count": 2, "age": 30},
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"item_id": ["x", "x"], "brand": ["a", "b"]}, "item_id 'x' in 2 rows"),
        ({"item_id": ["x", None], "brand": ["a", "b"]}, "item_id empty in 1 rows"),
        ({"item_id": ["x", "y"], "price": [1.0, np.inf]}, "'price' of item_id 'y' is inf"),
        ({"item_id": ["x", "y"], "price": [np.nan, 1.0]}, "'price' of item_id 'x' is nan"),
        ({"item_id": ["x", "y"], "v": [[1.0], [1.0, 2.0]]}, "'v' of item_id .* expected 2 numbers"),
        ({"item_id": ["x", "y"], "v": [[1.0], [np.nan]]}, "'v' of item_id 'y' .*finite"),
        ({"item_id": ["x", "y"], "count": [1, 2]}, "'count' is a name of recsys's own"),
        ({"id": ["x"]}, "no column 'item_id'; found id"),
    ],
)
def test_bad_features_are_refused(tmp_path: Path, table: dict, message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "items.parquet")
    source = Events(items=str(tmp_path / "items.parquet"))
    with pytest.raises(InputError, match=message):
        made(tmp_path, log(tmp_path, SMALL), source)
    assert leftovers(tmp_path) == []


def leftovers(tmp_path: Path) -> list[str]:
    return [str(path) for path in (tmp_path / "workspace").rglob("*")]


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [
        ({"min_user_event": 3}, None, "data.min_user_event: .*did you mean 'min_user_events'"),
        ({"k_core": 0}, None, "data.k_core=0: expected a whole number, at least 1"),
        ({"min_user_events": 9}, None, "nothing is left of 5 events: min_user_events=9"),
        ({"name": "a/b"}, None, "data.name='a/b'"),
        ({"memory_limit": "lots"}, None, "data.memory_limit=lots: expected a size such as 2GB"),
        ({"item_features": {"x": "text"}}, None, "there is no item table"),
        ({}, {"rule": "temporl"}, "split.rule=temporl.*did you mean 'temporal'"),
        ({}, {"rule": "leave_one_out", "test_share": 0.1}, "leave_one_out has no such setting"),
        ({}, {"rule": "temporal", "test_share": 1.5}, "split.test_share=1.5"),
        (
            {},
            {"rule": "temporal", "test_share": 0.5, "validation_share": 0.5},
            "leave nothing to train on",
        ),
    ],
)
def test_bad_settings_are_refused(
    tmp_path: Path, settings: dict, split: dict | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        made(tmp_path, log(tmp_path, SMALL), split=split, **settings)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("rows", "split", "message"),
    [
        ([("a", "x", START + i) for i in range(3)], "leave_one_out", "only one item is left"),
        ([("a", "x", START), ("b", "y", START)], "leave_one_out", "nothing to test on"),
        ([("a", i, START) for i in "xyz"], "temporal", "too many share one moment"),
    ],
)
def test_logs_without_a_task_are_refused(
    tmp_path: Path, rows: list, split: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        made(tmp_path, log(tmp_path, rows), split={"rule": split})
    assert leftovers(tmp_path) == []


def test_temporal_split_needs_times(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("u a b c\n")
    with pytest.raises(InputError, match=r"split=temporal needs times.*split=leave_one_out"):
        made(tmp_path, tmp_path / "s.txt", Sequences(), {"rule": "temporal"})
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("broken", ["write_events", "write_users", "write_manifest"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, broken, full)
    with pytest.raises(InputError, match=r"no space left in .*datasets .*needs about .* MB"):
        made(tmp_path, log(tmp_path, SMALL))
    assert leftovers(tmp_path) == []


def test_a_full_device_is_noticed_while_streaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr("recsys.data.flat.npy", lambda *_: io.FileIO("/dev/full", "w"))
    with pytest.raises(InputError, match=r"no space left"):
        made(tmp_path, log(tmp_path, SMALL))
    assert leftovers(tmp_path) == []


def test_too_little_memory_says_so(tmp_path: Path) -> None:
    rows = [(f"u{i % 50_000}", f"i{i % 997}", START + i) for i in range(400_000)]
    with pytest.raises(InputError, match=r"data.memory_limit=1MB"):
        made(tmp_path, log(tmp_path, rows), memory_limit="1MB")
    assert leftovers(tmp_path) == []


def test_spilling_gives_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    users, items = rng.integers(0, 20_000, 300_000), rng.integers(0, 999, 300_000)
    rows = pa.table(
        {
            "user_id": [f"user-{u}" for u in users],
            "item_id": [f"item-{i}" for i in items],
            "timestamp": START + rng.integers(0, 10**9, 300_000),
        }
    )
    pq.write_table(rows, tmp_path / "log.parquet")
    path = tmp_path / "log.parquet"
    prints = {
        prepare(
            {"name": "x", "path": str(path), "memory_limit": limit},
            Events(),
            {"rule": "leave_one_out"},
            Workspace(tmp_path / limit),
        ).fingerprint
        for limit in ("64MB", "2GB")
    }
    assert len(prints) == 1


def test_summary_names_the_counts(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(summary(made(tmp_path, log(tmp_path, SMALL))))
    text = captured.get()
    assert "5 of 5 read" in text
    assert "2020-09-14 to 2020-09-16" in text


def test_settings_of_a_group_ignore_its_source() -> None:
    assert PrepareSettings.of({"name": "a", "source": {"_target_": "x"}}).name == "a"
    assert split_rule({"rule": "temporal"}).test_share == 0.1


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("amazon_beauty.txt", Sequences(), (22_363, 12_101, 198_502)),
        ("ml-1m-sequences.txt.gz", Sequences(has_users=False), (6_040, 3_416, 987_019)),
        ("ml-latest-small", MovieLens(), (610, 9_724, 100_836)),
    ],
)
def test_real_data_have_their_known_counts(
    tmp_path: Path, file: str, source: Any, expected: tuple
) -> None:
    if not (SHARED / file).exists():
        pytest.skip(f"{SHARED / file} is not here")
    dataset = made(tmp_path, SHARED / file, source)
    assert (dataset.num_users, dataset.num_items, int(dataset.offsets[-1])) == expected
    assert dataset.manifest["num_events"] == expected[2]
    assert dataset.manifest["dropped"] == {"duplicates": 0, "rare": 0}
