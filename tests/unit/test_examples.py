"""Examples of the second stage: time is strict, draws are fair, statistics know no future."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recsys.artifacts import Workspace
from recsys.config import config_dir
from recsys.data import examples as module
from recsys.data.dataset import Dataset
from recsys.data.examples import (
    Cut,
    Examples,
    events_before,
    impressions,
    make,
    rated,
    retrieved,
)
from recsys.data.prepare import prepare
from recsys.data.rates import rates_as_of, snapshot
from recsys.data.sources.events import Events
from recsys.features import declare
from recsys.history import Histories
from recsys.schema import InputError
from recsys.training.leaks import (
    refuse_leaks,
    single_columns,
    telling,
    training_rows,
)

START = 1_600_000_000_000
HOUR = 3_600_000
DAY = 24 * HOUR
TYPES = ("view", "cart", "purchase")


def made(tmp_path: Path, split: str = "temporal", rule: Any = None, **tables: Any) -> Dataset:
    """40 users, 20 events each, half of them at one moment with another; what is shown goes on."""
    rng = np.random.default_rng(7)
    user, place = np.divmod(np.arange(800), 20)
    log = {
        "user_id": [f"u{u}" for u in user],
        "item_id": [f"i{i}" for i in rng.integers(0, 30, 800)],
        "timestamp": START + place // 2 * DAY + user * HOUR,
        "event_type": [TYPES[t] for t in rng.integers(0, 3, 800)],
        "value": np.where(rng.random(800) < 0.1, np.nan, rng.integers(1, 6, 800)),
    }
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    files = {}
    for name, table in tables.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        files[name] = str(tmp_path / f"{name}.parquet")
    return prepare(
        {"name": "shop", "path": str(tmp_path / "log.parquet"), "deduplicate": False},
        Events(**files),
        rule or {"rule": split},
        Workspace(tmp_path / "workspace"),
    )


def shown(requests: int = 300, width: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    request = np.repeat(np.arange(requests), width)
    rows = len(request)
    return {
        "user_id": [f"u{r % 41}" if r % 5 else None for r in request],
        "item_id": [f"i{i}" for i in rng.integers(0, 30, rows)],
        "timestamp": START + request * 48 * 60_000,
        "request_id": [f"r{r}" for r in request],
        "position": np.tile(np.arange(width), requests),
        "view": rng.integers(0, 2, rows),
        "purchase": rng.integers(0, 2, rows),
        "device": [f"d{r % 3}" for r in request],
    }


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """With impressions, cut by time."""
    return made(tmp_path_factory.mktemp("shop"), impressions=shown())


@pytest.fixture(scope="module")
def one_out(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Each user's last event tests."""
    return made(tmp_path_factory.mktemp("one-out"), "leave_one_out")


def check_order(examples: Examples, dataset: Dataset) -> None:
    """Time is strict: parts follow each other, and no history reaches the moment asked."""
    times = examples.times
    assert (np.diff(times) >= 0).all()
    bounds = [examples.parts[name] for name in ("train", "validation", "test")]
    assert bounds[0].start == 0
    assert bounds[2].stop == len(examples)
    for before, after in itertools.pairwise(bounds):
        assert before.stop == after.start
        assert times[before].max() < times[after].min()
    known = examples.users >= 0
    histories = dataset.histories(examples.users[known], examples.places[known])
    owner = np.repeat(times[known], histories.lengths)
    assert (histories.times < owner).all()
    assert examples.offsets[-1] == len(examples.items) == len(examples.labels)


def test_impressions_become_requests(shop: Dataset) -> None:
    dataset = shop
    found = impressions(dataset)
    check_order(found, dataset)
    assert found.tasks == ("view", "purchase")
    assert len(found) == 300
    assert found.offsets.tolist() == list(range(0, 901, 3))
    assert found.positions.tolist() == [0, 1, 2] * 300
    assert np.isnan(found.propensities).all()
    assert found.context["device"].to_pylist() == [f"d{r % 3}" for r in range(300)]
    np.testing.assert_array_equal(found.labels[:, 1], shown()["purchase"])
    ids = np.array(["", *dataset.items["item_id"].to_pylist()])
    assert ids[found.items].tolist() == shown()["item_id"]
    assert impressions(dataset, tasks=["purchase"]).labels.shape == (900, 1)
    np.testing.assert_array_equal(found.label("view"), shown()["view"])
    rows = found.rows("validation")
    assert set(found.request_of_row()[rows]) == set(range(300)[found.parts["validation"]])
    with pytest.raises(InputError, match="did you mean 'purchase'"):
        impressions(dataset, tasks=["purchases"])
    with pytest.raises(InputError, match="no task 'like'"):
        found.label("like")


def test_the_dataset_s_own_moments_cut(shop: Dataset) -> None:
    dataset = shop
    found, split = impressions(dataset), dataset.manifest["split"]
    assert found.times[found.parts["validation"]].min() >= split["validation_from"]
    assert found.times[found.parts["test"]].min() >= split["test_from"]
    shares = impressions(dataset, cut=Cut(0.3, 0.2))
    assert [len(shares.times[p]) for p in shares.parts.values()] == [150, 90, 60]
    moments = impressions(dataset, cut=Cut(validation_from=START + DAY, test_from=START + 2 * DAY))
    assert [len(moments.times[p]) for p in moments.parts.values()] == [30, 30, 240]


def test_shares_cut_where_the_split_has_no_moments(tmp_path: Path) -> None:
    table = shown()
    table["timestamp"][270 * 3 - 3 : 270 * 3 + 3] = table["timestamp"][270 * 3]
    found = impressions(made(tmp_path, "leave_one_out", impressions=table))
    sizes = [len(found.times[part]) for part in found.parts.values()]
    assert sizes == [240, 29, 31], "requests at one moment stay together"


def test_the_publisher_s_parts_are_kept(tmp_path: Path) -> None:
    table = shown(requests=6, width=1)
    table["part"] = ["test", "train", "validation", "train", "test", "train"]
    dataset = made(tmp_path, "leave_one_out", impressions=table)
    found = impressions(dataset)
    asked = ((found.times - START) // (48 * 60_000)).tolist()
    assert [asked[part] for part in found.parts.values()] == [[1, 3, 5], [2], [0, 4]]
    np.testing.assert_array_equal(found.labels[:, 0], np.array(table["view"])[asked])
    expected = [slow_rate(found, np.zeros(31, int), 0, t, 1.0) for t in found.times]
    rates = rates_as_of(found, np.zeros(31, int), "view", 1.0, every_ms=1)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    by_time = impressions(dataset, cut=Cut(0.3, 0.2))
    assert (np.diff(by_time.times) > 0).all()


def test_the_test_part_validates_where_there_is_no_other(tmp_path: Path) -> None:
    table = shown(requests=4, width=1) | {"part": ["train", "train", "test", "test"]}
    found = impressions(made(tmp_path, "leave_one_out", impressions=table))
    assert found.parts["validation"] == found.parts["test"] == slice(2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_share": 0.1}, "both validation_share"),
        ({"validation_share": 0.6, "test_share": 0.5}, "less than 1 together"),
        ({"validation_share": 0.0, "test_share": 0.5}, "more than 0"),
        ({"test_from": 5}, "both validation_from"),
    ],
)
def test_a_wrong_cut_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Cut(**settings)


def test_an_empty_part_is_refused(shop: Dataset) -> None:
    dataset = shop
    with pytest.raises(InputError, match=r"nothing in test: requests of 2020-09-13"):
        impressions(dataset, cut=Cut(validation_from=START + DAY, test_from=START + 99 * DAY))


def test_places_are_counted_strictly_before(shop: Dataset) -> None:
    dataset = shop
    rng = np.random.default_rng(0)
    users = rng.integers(-1, dataset.num_users, 500)
    times = START + rng.integers(-2, 300, 500) * HOUR
    slow = [
        0 if u < 0 else int((dataset.events["times"][slice(*dataset.offsets[u : u + 2])] < t).sum())
        for u, t in zip(users, times, strict=True)
    ]
    np.testing.assert_array_equal(events_before(dataset, users, times), slow)


def test_every_rated_event_is_a_request(shop: Dataset) -> None:
    dataset = shop
    found = rated(dataset, task="like", least=4)
    check_order(found, dataset)
    values = dataset.events["values"]
    assert len(found) == (~np.isnan(values)).sum()
    assert found.labels.sum() == (values >= 4).sum()
    assert found.tasks == ("like",)
    # Two events of a user share a moment, and neither is in the other's history.
    assert set(np.unique(found.places) % 2) == {0}


def test_nothing_rated_is_refused(tmp_path: Path) -> None:
    log = {
        "user_id": ["a"] * 4,
        "item_id": ["x", "y", "z", "x"],
        "timestamp": [START + place * DAY for place in range(4)],
    }
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    dataset = prepare(
        {"name": "plain", "path": str(tmp_path / "log.parquet")},
        Events(),
        {"rule": "leave_one_out"},
        Workspace(tmp_path / "workspace"),
    )
    with pytest.raises(InputError, match="examples=retrieved"):
        rated(dataset)


def first_five(histories: Histories, now: np.ndarray) -> np.ndarray:
    """A retriever that finds items 1 to 5, and for every other request only three of them."""
    pool = np.tile(np.arange(1, 6), (len(histories), 1))
    pool[::2, 3:] = 0
    return pool


@pytest.mark.parametrize("split", ["shop", "one_out"])
def test_retrieved_examples_hold_the_event_and_negatives(
    split: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    dataset = request.getfixturevalue(split)
    found = retrieved(dataset, first_five, hard=4, easy=0, seed=1)
    check_order(found, dataset)
    assert found.tasks == TYPES
    assert (found.places > 0).all()
    for q in range(len(found)):
        items = found.items[found.offsets[q] : found.offsets[q + 1]]
        labels = found.labels[found.offsets[q] : found.offsets[q + 1]]
        assert len(set(items)) == len(items), "no item twice"
        assert labels[:, 0].sum() == 1, "one event a request"
        negatives = items[labels[:, 0] == 0]
        assert set(negatives) <= set(range(1, 6)), "hard ones come from the retriever"
    at_event = found.labels[found.labels[:, 0] == 1]
    assert (np.diff(at_event, axis=1) <= 0).all(), "a purchase was in the cart"
    assert at_event[:, 2].mean() == pytest.approx(1 / 3, abs=0.1)
    again = retrieved(dataset, first_five, hard=4, easy=0, seed=1)
    np.testing.assert_array_equal(found.items, again.items)


def test_training_requests_are_training_events(one_out: Dataset) -> None:
    dataset = one_out
    found = retrieved(dataset, first_five, hard=2, easy=2)
    train = found.parts["train"]
    ends = dataset.split.train_end[found.users[train]]
    assert (found.places[train] < ends).all()
    last = dataset.offsets[1:] - 1
    assert set(found.times[found.parts["test"]]) <= set(dataset.events["times"][last])
    few = retrieved(dataset, first_five, hard=2, easy=2, most=7)
    newest = [found.times[part][-7:].tolist() for part in found.parts.values()]
    assert [few.times[part].tolist() for part in few.parts.values()] == newest


def test_easy_negatives_follow_popularity(shop: Dataset) -> None:
    dataset = shop
    found = retrieved(dataset, first_five, hard=0, easy=20)
    negatives = found.items[found.labels[:, 0] == 0]
    counts = np.bincount(negatives, minlength=dataset.num_items + 1)
    assert counts[0] == 0
    assert np.corrcoef(counts[1:], dataset.train_count[1:])[0, 1] > 0.9


def test_the_event_s_place_tells_nothing(shop: Dataset) -> None:
    found = retrieved(shop, first_five, hard=3, easy=3)
    place = np.arange(len(found.items)) - found.offsets[found.request_of_row()]
    assert place[found.labels[:, 0] == 1].mean() == pytest.approx(2.5, abs=0.6)


def test_wrong_shares_are_refused(shop: Dataset) -> None:
    dataset = shop
    with pytest.raises(InputError, match="hard=0, easy=0"):
        retrieved(dataset, first_five, hard=0, easy=0)


@pytest.mark.parametrize("name", ["impressions", "rated", "retrieved"])
def test_the_configs_make_examples(shop: Dataset, name: str) -> None:
    settings = OmegaConf.load(config_dir() / "examples" / f"{name}.yaml")
    if "seed" in settings:
        settings.seed = 1
    check_order(make(instantiate(settings), shop, lambda: first_five), shop)


# The statistics of the log.


def some(times: list[int], items: list[int], labels: list[float]) -> Examples:
    order = np.argsort(times, kind="stable")
    rows = len(order)
    return Examples(
        tasks=("view",),
        users=np.full(rows, -1),
        places=np.zeros(rows, np.int64),
        times=np.array(times, np.int64)[order],
        context={},
        offsets=np.arange(rows + 1),
        items=np.array(items, np.int64)[order],
        labels=np.array(labels, np.float32)[order, None],
        positions=np.zeros(rows, np.int64),
        propensities=np.full(rows, np.nan, np.float32),
        parts={"train": slice(0, rows)},
    )


def slow_rate(examples: Examples, codes: np.ndarray, code: int, moment: int, prior: float) -> float:
    """The obvious reference: look at every row, one after the other."""
    positives = rows = all_positives = all_rows = 0.0
    columns = (examples.times, examples.items, examples.labels[:, 0])
    for time, item, label in zip(*columns, strict=True):
        if time < moment and not np.isnan(label):
            all_positives, all_rows = all_positives + label, all_rows + 1
            if codes[item] == code:
                positives, rows = positives + label, rows + 1
    if not all_rows or rows + prior == 0:
        return float("nan")
    return (positives + prior * all_positives / all_rows) / (rows + prior)


ROW = st.tuples(
    st.integers(0, 60), st.integers(0, 6), st.sampled_from([0.0, 1.0, 1.0, float("nan")])
)


@settings(max_examples=60)
@given(
    rows=st.lists(ROW, min_size=1, max_size=30),
    codes=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    every=st.integers(1, 25),
    prior=st.sampled_from([0.0, 1.0, 20.0]),
)
def test_statistics_equal_the_slow_reference(
    rows: list[tuple[int, int, float]], codes: list[int], every: int, prior: float
) -> None:
    examples = some(*map(list, zip(*rows, strict=True)))
    by = np.array(codes)
    expected = [
        slow_rate(examples, by, by[item], int(time) // every * every, prior)
        for time, item in zip(examples.times, examples.items, strict=True)
    ]
    found = rates_as_of(examples, by, "view", prior, every)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    moment = int(examples.times[-1]) // every * every
    for before in (moment, None):
        end = 10**9 if before is None else before
        items = [slow_rate(examples, by, code, end, prior) for code in by]
        np.testing.assert_allclose(snapshot(examples, by, "view", prior, before), items, rtol=1e-6)


@settings(max_examples=40)
@given(rows=st.lists(ROW, min_size=2, max_size=30), data=st.data())
def test_a_statistic_does_not_move_with_the_future(
    rows: list[tuple[int, int, float]], data: st.DataObject
) -> None:
    examples = some(*map(list, zip(*rows, strict=True)))
    by, every = np.arange(7), 10
    before = rates_as_of(examples, by, "view", 5.0, every)
    place = data.draw(st.integers(0, len(rows) - 1))
    start = int(examples.times[place]) // every * every
    later = examples.times >= start
    examples.labels[later] = 1 - examples.labels[later]
    after = rates_as_of(examples, by, "view", 5.0, every)
    same = examples.times < start + every
    np.testing.assert_array_equal(before[same], after[same])


def test_a_wrong_statistic_is_refused() -> None:
    examples = some([1], [1], [1.0])
    with pytest.raises(InputError, match="prior=-1"):
        rates_as_of(examples, np.arange(2), "view", -1)
    with pytest.raises(InputError, match="did you mean 'view'"):
        snapshot(examples, np.arange(2), "views")


# Leaks.

COLUMNS = {
    "item_id": {"of": "item", "kind": "categorical"},
    "user_id": {"of": "user", "kind": "categorical"},
    "price": {"of": "item", "kind": "numeric"},
    "device": {"of": "request", "kind": "categorical"},
    "session": {"of": "request", "kind": "categorical"},
    "paid": {"of": "request", "kind": "numeric"},
    "state": {"of": "request", "kind": "categorical"},
}


def planted(tmp_path: Path) -> tuple[Dataset, Examples]:
    """One item a request; `paid` and `state` are columns that were written after the answer."""
    table = shown(requests=600, width=1)
    bought = np.array(table["purchase"])
    table["paid"] = pa.array(np.where(bought, 9.5, np.nan), from_pandas=True)
    table["state"] = np.where(bought, "posted", "none").tolist()
    table["session"] = [f"s{row}" for row in range(600)]
    items = {"item_id": [f"i{i}" for i in range(30)], "price": np.arange(30) / 7}
    dataset = made(tmp_path, impressions=table, items=items)
    return dataset, impressions(dataset)


def test_a_column_from_the_future_is_refused(tmp_path: Path) -> None:
    dataset, examples = planted(tmp_path)
    columns = single_columns(dataset, examples, declare(COLUMNS))
    assert set(columns) == set(COLUMNS)
    labels = examples.labels[training_rows(examples)]
    for name in ("paid", "state"):
        with pytest.raises(InputError, match=rf"'{name}' alone tells 'purchase' .* 1\.0000") as met:
            refuse_leaks({name: columns[name]}, labels, examples.tasks)
        assert f"features_allow=[{name}]" in str(met.value)
    honest = {name: columns[name] for name in columns if name not in ("paid", "state")}
    refuse_leaks(honest, labels, examples.tasks)
    refuse_leaks(columns, labels, examples.tasks, allow=["paid", "state"])
    with pytest.raises(InputError, match="'paid'"):
        refuse_leaks(columns, labels, examples.tasks, allow=["state"])


def test_ids_and_chance_are_no_leak() -> None:
    rng = np.random.default_rng(5)
    rare = (rng.random(20_000) < 0.001).astype(np.float32)
    assert telling(np.arange(20_000), rare) == 0.5, "each value once"
    assert telling(np.arange(20_000) // 3, rare) < 0.9
    assert telling(rng.random(20_000), rare) < 0.9
    few = np.zeros(50, np.float32)
    few[-3:] = 1
    assert telling(np.arange(50.0), few) == 0.5, "three rows say nothing"


def test_a_column_may_tell_by_being_missing_or_backwards() -> None:
    labels = np.tile([0, 1, np.nan], 40).astype(np.float32)
    assert telling(np.where(labels == 1, np.nan, 3.0), labels) == 1.0
    assert telling(-labels.astype(float), labels) == 1.0
