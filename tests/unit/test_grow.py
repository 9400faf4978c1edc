"""A dataset grown day by day is the one that the whole log makes at once, but for its order."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import Workspace, verify
from recsys.cli import main
from recsys.data import merge as merging
from recsys.data.dataset import Dataset
from recsys.data.grow import Growth, ancestors, grow
from recsys.data.prepare import prepare
from recsys.data.sources.events import Events
from recsys.data.splits import DAY
from recsys.schema import InputError

START = 1_600_000_000_000
COLUMNS = ("user_id", "item_id", "timestamp", "event_type", "value")
NEW = range(20, 40)
TYPES = ("view", "cart", "purchase")
DAYS = {"rule": "temporal", "validation_days": 1, "test_days": 1}
Row = tuple[str, str, int, str, float | None]


def rows_of(days: int, a_day: int = 150, seed: int = 0) -> list[list[Row]]:
    """Each day's log: rare and newly arriving ids, late events, and some of them twice."""
    rng = np.random.default_rng(seed)
    logs: list[list[Row]] = []
    for day in range(days):
        # Moments are all different, so that the order is known without the order of arrival.
        times = START + day * DAY + rng.permutation(DAY // 1000)[:a_day] * 1000 + day
        late = rng.random(a_day) < 0.1
        times = np.where(late, np.maximum(START + day, times - 2 * DAY), times)
        users = rng.integers(0, 20 + 5 * day, a_day)
        items = rng.integers(0, 15 + 5 * day, a_day) ** 2 // (15 + 5 * day)
        log = [
            (f"u{u}", f"i{i}", int(t), TYPES[u % 3], None if i % 4 else float(i))
            for u, i, t in zip(users, items, times, strict=True)
        ]
        log += log[:5] + (logs[-1][:5] if logs else [])
        logs.append([log[i] for i in rng.permutation(len(log))])
    return logs


def written(folder: Path, name: str, log: Sequence[Row], columns: Sequence[str] = COLUMNS) -> Path:
    arrays = {c: [row[i] for row in log] for i, c in enumerate(COLUMNS) if c in columns}
    kinds = {"timestamp": pa.int64(), "value": pa.float64()}
    if not log:
        kinds = dict.fromkeys(COLUMNS, pa.string()) | kinds
    table = pa.table({c: pa.array(v, kinds.get(c)) for c, v in arrays.items()})
    pq.write_table(table, folder / name)
    return folder / name


def settings(path: Path, **more: Any) -> dict[str, Any]:
    return {"name": "shop", "path": str(path), **more}


def first(workspace: Workspace, path: Path, split: Any = None, **more: Any) -> Dataset:
    source = more.pop("source", Events())
    return prepare(settings(path, **more), source, split or DAYS, workspace)


def more(
    workspace: Workspace, old: Dataset, path: Path, keep: float | None = None, **given: Any
) -> Dataset:
    source = given.pop("source", Events())
    return grow(Growth(str(old.path), keep), settings(path, **given), source, workspace)


def content(dataset: Dataset) -> dict[str, list[tuple]]:
    """Each user's events by ids, with the part that each belongs to."""
    users, items = dataset.users["user_id"].to_pylist(), dataset.items["item_id"].to_pylist()
    split = dataset.split
    found = {}
    for row, user in enumerate(users):
        events = slice(*dataset.offsets[row : row + 2])
        names, types, times, values = (
            dataset.events[c][events].tolist() for c in ("items", "types", "times", "values")
        )
        parts = [
            (p < split.train_end[row], p == split.validation[row], p == split.test[row])
            for p in range(len(names))
        ]
        values = [None if np.isnan(v) else v for v in values]
        found[user] = [
            (items[i - 1], *rest)
            for i, *rest in zip(names, types, times, values, parts, strict=True)
        ]
    return {user: events for user, events in found.items() if events}


def popularity(dataset: Dataset) -> dict[str, tuple[int, int]]:
    table = dataset.items.select(["item_id", "count", "train_count"])
    return {i: (c, t) for i, c, t in zip(*table.to_pydict().values(), strict=True) if c}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


SHARES = {"rule": "temporal", "validation_share": 0.2, "test_share": 0.2}


@pytest.mark.parametrize(
    ("split", "least", "chunk"),
    [
        (DAYS, {}, 7),
        (SHARES, {"min_item_events": 4}, 1_000_000),
        ({"rule": "leave_one_out"}, {"min_item_events": 3, "min_user_events": 6}, 500),
    ],
)
def test_growing_day_by_day_is_preparing_at_once(
    split: dict, least: dict, chunk: int, workspace: Workspace, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(merging, "CHUNK", chunk)
    logs = rows_of(5)
    start = [row for log in logs[:3] for row in log]
    grown = first(workspace, written(tmp_path, "0.parquet", start), split, **least)
    for day, log in enumerate(logs[3:], start=3):
        before = grown
        grown = more(workspace, before, written(tmp_path, f"{day}.parquet", log))
        for name in ("items", "users"):
            ids = [getattr(d, name)[f"{name[:-1]}_id"].to_pylist() for d in (before, grown)]
            assert ids[1][: len(ids[0])] == ids[0], "who was there keeps the index"
            assert len(set(ids[1])) == len(ids[1])
    whole = written(tmp_path, "whole.parquet", [row for log in logs for row in log])
    scratch = first(workspace, whole, split, **least)
    assert content(grown) == content(scratch)
    assert popularity(grown) == popularity(scratch)
    assert {k: grown.manifest["split"][k] for k in scratch.manifest["split"]} == scratch.manifest[
        "split"
    ]
    for fact in ("num_users", "num_items", "num_events", "event_types", "source_rows", "dropped"):
        assert grown.manifest[fact] == scratch.manifest[fact], fact
    assert grown.users["count"].to_pylist() == np.diff(grown.offsets).tolist()
    assert grown.manifest["grown"]["late"] > 0, "the log has late events"
    assert len(ancestors(grown)) == 2
    verify(grown.path, grown.manifest)


def test_old_events_expire_and_indices_stay(workspace: Workspace, tmp_path: Path) -> None:
    logs = rows_of(6)
    logs[0].append(("gone", "i0", START, "view", None))
    old = first(workspace, written(tmp_path, "old.parquet", [r for log in logs[:5] for r in log]))
    grown = more(workspace, old, written(tmp_path, "new.parquet", logs[5]), keep=3)
    everything = [row for log in logs for row in log]
    since = max(row[2] for row in everything) + 1 - 3 * DAY
    kept = written(tmp_path, "kept.parquet", [r for r in everything if r[2] >= since])
    scratch = first(workspace, kept)
    assert content(grown) == content(scratch)
    assert popularity(grown) == popularity(scratch)
    assert grown.num_users > scratch.num_users, "who has no events any more keeps the row"
    assert grown.items["item_id"].to_pylist()[: old.num_items] == old.items["item_id"].to_pylist()
    late = {row for row in logs[5] if row[2] < since}
    gone = {row for log in logs[:5] for row in log if row[2] < since}
    assert grown.manifest["grown"]["expired"] == len(late - gone) + len(gone)


def test_an_item_comes_in_after_enough_sightings_with_all_of_them(
    workspace: Workspace, tmp_path: Path
) -> None:
    def seen(user: int, item: str, day: int) -> Row:
        return (f"u{user}", item, START + day * DAY + user * 1000, "view", None)

    base = [seen(user, item, day) for user in range(4) for item, day in (("a", 0), ("b", 1))]
    logs = [[*base, seen(0, "rare", 2)], [seen(1, "rare", 3)], [seen(2, "rare", 4)]]
    dataset = first(
        workspace,
        written(tmp_path, "0.parquet", logs[0]),
        {"rule": "temporal", "validation_days": 0.5, "test_days": 0.5},
        min_item_events=3,
    )
    assert (dataset.path / "pending.parquet").is_file()
    for day, waiting in ((1, 2), (2, 0)):
        dataset = more(workspace, dataset, written(tmp_path, f"{day}.parquet", logs[day]))
        assert dataset.manifest["grown"]["waiting"] == waiting
        assert ("rare" in dataset.items["item_id"].to_pylist()) == (waiting == 0)
    assert [e[0] for e in content(dataset)["u0"]] == ["a", "b", "rare"]
    assert dataset.manifest["grown"]["added"] == 3
    assert not (dataset.path / "pending.parquet").exists()


def test_features_of_new_items_and_newer_ones_of_old_items(
    workspace: Workspace, tmp_path: Path
) -> None:
    def goods(name: str, rows: list[tuple]) -> str:
        arrays = zip(("item_id", "category", "price", "tags"), zip(*rows, strict=True), strict=True)
        pq.write_table(pa.table({k: list(v) for k, v in arrays}), tmp_path / name)
        return str(tmp_path / name)

    logs = rows_of(4)
    old_items = [(f"i{i}", f"c{i % 3}", 1.5, ["x"]) for i in range(20)]
    new_items = [
        ("i0", "new", 2.5, ["y", "z"]),
        *((f"i{i}", "late", None, []) for i in range(20, 40)),
    ]
    old = first(
        workspace,
        written(tmp_path, "0.parquet", [row for log in logs[:3] for row in log]),
        source=Events(items=goods("a.parquet", old_items)),
    )
    source = Events(items=goods("b.parquet", new_items))
    grown = more(workspace, old, written(tmp_path, "1.parquet", logs[3]), source=source)
    table = {row["item_id"]: row for row in grown.items.to_pylist()}
    assert table["i0"]["category"] == "new"
    assert table["i0"]["tags"] == ["y", "z"]
    assert table["i1"] == {**table["i1"], "category": "c1", "price": 1.5, "tags": ["x"]}
    newcomers = grown.items["item_id"].to_pylist()[old.num_items :]
    assert newcomers
    assert all(table[i]["category"] == "late" for i in newcomers if int(i[1:]) >= 20)

    without = more(workspace, old, tmp_path / "1.parquet", source=Events())
    assert (
        without.items["category"].to_pylist()[: old.num_items] == old.items["category"].to_pylist()
    )


def test_the_same_day_twice_is_found_and_not_made_again(
    workspace: Workspace, tmp_path: Path
) -> None:
    logs = rows_of(4)
    old = first(workspace, written(tmp_path, "0.parquet", [row for log in logs[:3] for row in log]))
    day = written(tmp_path, "1.parquet", logs[3])
    grown = more(workspace, old, day)
    made = (grown.path / "manifest.json").stat().st_mtime_ns
    again = more(workspace, old, day)
    assert again.path == grown.path
    assert (again.path / "manifest.json").stat().st_mtime_ns == made
    with pytest.raises(InputError, match=r"all of its 160 events are in shop-\w+ already"):
        more(workspace, grown, day)


@pytest.fixture
def old(workspace: Workspace, tmp_path: Path) -> Dataset:
    logs = rows_of(3)
    return first(workspace, written(tmp_path, "0.parquet", [r for log in logs for r in log]))


def test_a_day_before_the_cut_is_put_in_its_place_and_moves_nothing(
    old: Dataset, workspace: Workspace, tmp_path: Path
) -> None:
    log: list[Row] = [(u, i, START - DAY, "view", None) for u, i in (("u1", "i1"), ("u2", "fresh"))]
    grown = more(workspace, old, written(tmp_path, "early.parquet", log))
    assert grown.manifest["split"] == old.manifest["split"]
    assert grown.manifest["grown"]["late"] == 2
    assert content(grown)["u1"][0][:1] == ("i1",)
    assert content(grown)["u2"][0][0] == "fresh"


MISTAKES = {
    "no events in it": ([], COLUMNS, {}),
    "before .*, from which grow.keep_days=1 keeps": (
        [("u1", "i1", START - DAY, "view", None)],
        COLUMNS,
        {"keep": 1},
    ),
    "everything in shop-.* would expire, .* 2050-": (
        [("u1", "i1", 2_539_000_000_000, "view", None)],
        COLUMNS,
        {"keep": 30},
    ),
    r"day.parquet: column 'event_type' is missing, in shop-\w+ it is text": (
        [("u1", "i1", START, "view", None)],
        COLUMNS[:3],
        {},
    ),
    r"column 'item_id' is number, in shop-\w+ it is text": (
        [("u1", 7, START, "view", 1.0)],
        COLUMNS,
        {},
    ),
    r"grow.keep_days=-1: expected days above 0": ([], COLUMNS, {"keep": -1}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistaken_day_leaves_nothing(
    message: str, old: Dataset, workspace: Workspace, tmp_path: Path
) -> None:
    log, columns, given = MISTAKES[message]
    written(tmp_path, "day.parquet", log, columns)
    before = Counter(workspace.folder("dataset").iterdir())
    with pytest.raises(InputError, match=message):
        more(workspace, old, tmp_path / "day.parquet", **given)
    assert Counter(workspace.folder("dataset").iterdir()) == before


def test_features_of_another_kind_are_refused_naming_both(
    old: Dataset, workspace: Workspace, tmp_path: Path
) -> None:
    goods = tmp_path / "goods.csv"
    goods.write_text("item_id,category\ni1,a\n")
    with pytest.raises(
        InputError, match=r"item feature 'category' is categorical, in shop-\w+ it is missing"
    ):
        more(workspace, old, tmp_path / "0.parquet", source=Events(items=str(goods)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"source": Events(columns={"timestamp": None}), "split": {"rule": "leave_one_out"}},
            "no times",
        ),
        ({"k_core": 2}, "data.k_core=2"),
    ],
)
def test_what_cannot_grow_is_refused(
    how: dict, message: str, workspace: Workspace, tmp_path: Path
) -> None:
    path = written(tmp_path, "0.parquet", rows_of(1, 400)[0])
    dataset = first(workspace, path, **{"split": {"rule": "leave_one_out"}, **how})
    with pytest.raises(InputError, match=message):
        more(workspace, dataset, path)


def test_the_command_grows_and_refuses_what_has_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECSYS_HOME", str(tmp_path / "home"))
    logs = rows_of(4)
    for name, some in (("first.csv", logs[:3]), ("next.csv", logs[3:])):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *(row for log in some for row in log)])
    base = ["prepare", "data=events", f"data.path={tmp_path}/first.csv", "split=days"]
    assert main(base) == 0
    step = ["prepare", "data=events", f"data.path={tmp_path}/next.csv", "grow.onto=latest"]
    assert main([*step, "split=days"]) == 2
    assert "split=days has no effect with grow.onto=latest" in capsys.readouterr().err
    assert main([*step, "data.min_item_events=2"]) == 2
    assert "data.min_item_events=2 has no effect" in capsys.readouterr().err
    assert main(["prepare", *base[1:], "grow.keep_days=3"]) == 2
    assert "grow.keep_days=3 has no effect without" in capsys.readouterr().err
    assert main([*step, "grow.keep_days=3"]) == 0
    assert Dataset(Workspace().find("dataset")).manifest["grown"]["expired"] > 0
