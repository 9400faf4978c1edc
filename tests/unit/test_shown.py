"""What a ranker reads of each request, against slow loops over the log: nothing of the future."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import Workspace
from recsys.data import examples as made_of
from recsys.data.dataset import Dataset
from recsys.data.examples import Cut
from recsys.data.prepare import prepare
from recsys.data.shown import (
    DistinctItems,
    Shown,
    ShownBatches,
    Tables,
    asked,
    fitted,
    shown,
    unmet,
)
from recsys.data.sources.events import Events
from recsys.features import OTHER
from recsys.history import Histories
from recsys.schema import InputError

START, HOUR, DAY = 1_600_000_000_000, 3_600_000, 86_400_000
LENGTH, ITEMS, REQUESTS = 4, 12, 200
KINDS = ("hats", "coats", "shoes")
COLUMNS: dict[str, dict[str, Any]] = {
    "item_id": {"of": "item", "kind": "categorical"},
    "kind": {"of": "item", "kind": "categorical"},
    "price": {"of": "item", "kind": "numeric", "scale": "none"},
    "region": {"of": "user", "kind": "categorical"},
    "device": {"of": "request", "kind": "categorical", "default": "phone"},
    "budget": {"of": "request", "kind": "numeric", "scale": "none", "default": 3.0},
    "hour": {"of": "request", "kind": "hour"},
    "position": {"of": "shown", "kind": "position"},
    "kind_seen": {"of": "path", "kind": "count", "by": "kind"},
    "item_since": {"of": "path", "kind": "since", "by": "item_id"},
    "kind_next": {"of": "path", "kind": "transition", "by": "kind", "prior": 2},
    "kind_rate": {"of": "log", "kind": "rate", "by": "kind", "task": "view", "prior": 2},
}


def tables() -> dict[str, dict[str, Any]]:
    """A log of 20 users, of whom the last two have no events, and what 21 people were shown."""
    rng = np.random.default_rng(5)
    user, place = np.divmod(np.arange(18 * 9), 9)
    request = np.repeat(np.arange(REQUESTS), rng.integers(1, 5, REQUESTS))
    rows = len(request)
    who = rng.integers(0, 21, REQUESTS)
    return {
        "log": {
            "user_id": [f"u{u}" for u in user],
            "item_id": [f"i{i}" for i in rng.permutation(np.arange(len(user)) % ITEMS)],
            "timestamp": START + place * DAY + user * HOUR,
        },
        "items": {
            "item_id": [f"i{i}" for i in range(ITEMS)],
            "kind": [KINDS[i % 3] for i in range(ITEMS)],
            "price": [float(1 + i) for i in range(ITEMS)],
        },
        "users": {
            "user_id": [f"u{u}" for u in range(20)],
            "region": ["north" if u % 2 else "south" for u in range(20)],
        },
        "impressions": {
            "user_id": [None if who[r] == 20 else f"u{who[r]}" for r in request],
            "item_id": [f"i{i}" for i in rng.integers(0, ITEMS, rows)],
            "timestamp": START + request * HOUR,
            "request_id": [f"r{r}" for r in request],
            "position": np.arange(rows) - np.searchsorted(request, request),
            "view": rng.integers(0, 2, rows).astype(float),
            "device": [("phone", "desk", "tv")[r % 3] for r in request],
            "budget": [float(r % 7) for r in request],
        },
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("shop")
    files = {}
    for name, table in tables().items():
        files[name] = str(folder / f"{name}.parquet")
        pq.write_table(pa.table(table), files[name])
    log = {"name": "shop", "path": files.pop("log"), "deduplicate": False}
    return prepare(log, Events(**files), {"rule": "temporal"}, Workspace(folder / "workspace"))


VECTORS = np.stack([np.arange(ITEMS + 1), np.ones(ITEMS + 1)], axis=1).astype(np.float32)


def queries(users: Any, histories: Histories, now: Any) -> np.ndarray:
    """A retriever of two interests: one likes large items, one items near the last one seen."""
    last_B = np.append(histories.items, 0)[histories.offsets[1:] - 1]
    one, zero = np.ones(len(last_B)), np.zeros(len(last_B))
    return np.stack([[one, -last_B], [-one, zero]]).transpose(2, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def encoded(dataset: Dataset) -> Shown:
    examples = made_of.impressions(dataset, cut=Cut(validation_share=0.2, test_share=0.2))
    features = fitted(dataset, examples, COLUMNS)
    return shown(dataset, examples, features, LENGTH).with_retrieval(queries, VECTORS)


def past(encoded: Shown, request: int) -> list[tuple[int, int]]:
    """(item, time) of the newest events strictly before a request."""
    data, user = encoded.dataset, int(encoded.examples.users[request])
    if user < 0:
        return []
    events = slice(*data.offsets[user : user + 2])
    columns = (data.events[name][events].tolist() for name in ("items", "times"))
    now = encoded.examples.times[request]
    return [(item, time) for item, time in zip(*columns, strict=True) if time < now][-LENGTH:]


def kind_of(data: Dataset, item: int) -> str:
    return str(data.items["kind"][item - 1].as_py())


def rate(encoded: Shown, kind: str, before: int) -> float:
    """Logarithm of the smoothed share of views of a kind among all that was shown before."""
    examples = encoded.examples
    views, counted, everything = 0.0, 0, []
    for request, time in enumerate(examples.times):
        for row in range(*examples.offsets[request : request + 2]):
            if time < before:
                everything.append(examples.labels[row, 0])
                same = kind_of(encoded.dataset, int(examples.items[row])) == kind
                views, counted = views + same * examples.labels[row, 0], counted + same
    if not everything:
        return math.nan
    return math.log((views + 2 * np.mean(everything)) / (counted + 2))


def went_on(encoded: Shown, before: int, item: int, now: int) -> float:
    """Logarithm of how often people went on to an item from another, smoothed; days before now."""
    data, log = encoded.dataset, encoded.dataset.events
    kind, day = kind_of(data, item), now - now % DAY
    first = min((t - t % DAY for t, i in zip(log["times"], log["items"], strict=True) if i == item))
    count = total = met = of_kind = 0
    for user in range(data.num_users):
        events = slice(*data.offsets[user : user + 2])
        both = zip(log["items"][events], log["times"][events], strict=True)
        same = [(i, t) for i, t in both if kind_of(data, i) == kind]
        for (last, _), (this, time) in pairwise(same):
            if first <= time < day:
                of_kind, met = of_kind + 1, met + (this == item)
                total, count = total + (last == before), count + (last == before and this == item)
    share = met / of_kind if of_kind else 0.0
    return math.log(max(1e-6, (count + 2 * share) / (total + 2)))


def one_row(encoded: Shown, request: int, row: int) -> dict[str, list[float]]:
    """What a ranker should read of one shown item, by hand."""
    examples, data = encoded.examples, encoded.dataset
    item, now = int(examples.items[row]), int(examples.times[request])
    path, kind = past(encoded, request), kind_of(data, item)
    ages = [now - time for seen, time in path if seen == item]
    same = [seen for seen, _ in path if kind_of(data, seen) == kind]
    return {
        "item_numbers": [
            data.items["price"][item - 1].as_py(),
            rate(encoded, kind, now - now % DAY),
        ],
        "cross_numbers": [
            math.log1p(examples.positions[row]),
            math.log1p(sum(kind_of(data, seen) == kind for seen, _ in path)),
            math.log1p(min(ages) / 1000) if ages else math.nan,
            went_on(encoded, same[-1], item, int(now)) if same else math.nan,
        ],
        "retrieval_scores": [max(item - path[-1][0], -item) if path else math.nan],
        "candidate_vectors": [item, 1.0],
        "labels": [examples.labels[row, 0]],
    }


def test_every_number_is_what_a_loop_over_the_log_says(encoded: Shown) -> None:
    examples = encoded.examples
    for requests in (np.arange(0, REQUESTS, 9), np.array([0]), np.arange(REQUESTS)[-30:]):
        arrays = encoded.arrays(requests)
        for b, request in enumerate(requests):
            rows = range(*examples.offsets[request : request + 2])
            for c, row in enumerate(rows):
                for name, expected in one_row(encoded, int(request), row).items():
                    met = np.atleast_1d(arrays[name][b, c])
                    np.testing.assert_allclose(met, expected, rtol=1e-5, err_msg=name)
                known = encoded.tables.items.codes[examples.items[row]]
                assert arrays["item_codes"][b, c].tolist() == known.tolist()
            assert np.isnan(arrays["labels"][b, len(rows) :]).all()


def test_a_path_ends_before_the_request(encoded: Shown) -> None:
    requests = np.arange(REQUESTS)
    arrays = encoded.arrays(requests)
    whole = encoded.whole_histories(requests)
    for request in requests:
        path = past(encoded, int(request))
        padding = [0] * (arrays["items"].shape[1] - len(path))
        assert arrays["items"][request].tolist() == [item for item, _ in path] + padding
        assert arrays["lengths"][request] == len(path)
        codes = encoded.tables.items.codes[arrays["items"][request]]
        assert (arrays["path_codes"][request] == codes).all()
        last = path[-1][0] if path else 0
        expected = [[1, -last], [-1, 0]] if path else [[0, 0], [0, 0]]
        assert arrays["queries"][request].tolist() == expected
    assert whole.lengths.max() > LENGTH
    assert (arrays["lengths"] == np.minimum(whole.lengths, LENGTH)).all()
    assert (whole.lengths == 0).any()


def test_what_a_request_says_of_itself(encoded: Shown) -> None:
    arrays, facts = encoded.arrays(np.arange(REQUESTS)), encoded.tables.features.facts
    examples = encoded.examples
    for request, user in enumerate(examples.users):
        region = encoded.dataset.users["region"][int(user)].as_py() if user >= 0 else None
        device = examples.context["device"][request].as_py()
        assert arrays["request_codes"][request].tolist() == [
            2 + facts["region"]["values"].index(region) if region else 0,
            2 + facts["device"]["values"].index(device),
            2 + examples.times[request] // HOUR % 24,
        ]
        budget = examples.context["budget"][request].as_py()
        assert arrays["request_numbers"][request].tolist() == [budget]


def test_what_is_served_is_what_was_trained_on(encoded: Shown) -> None:
    """A request without context, all items in the first place, on the test's first day."""
    examples, data = encoded.examples, encoded.dataset
    begun = examples.times[examples.parts["test"]].min()
    tested = encoded.requests("test")
    requests = tested[(examples.times[tested] // DAY) == begun // DAY]
    at = {int(r): encoded.arrays(np.array([r])) for r in requests}
    batches = ShownBatches(data, 8, 0, encoded, tuple(at[int(requests[0])]), hidden=1.0)
    for request, arrays in at.items():
        one = np.array([request])
        batches._hide(arrays, np.array([True]), one)
        users, now = examples.users[one], examples.times[one]
        items_BC = examples.items[None, slice(*examples.offsets[request : request + 2])]
        path = encoded.whole_histories(one)
        queries_BHD = queries(users, path, now)
        met = asked(encoded.tables, LENGTH, users, path, now, items_BC, queries_BHD, VECTORS)
        position = encoded.tables.features.layout.cross_numbers.index("position")
        arrays["cross_numbers"][..., position] = 0
        rates = len(encoded.tables.features.rates)
        # Rates of the log are as of the day's beginning, those of tables as of the test's.
        for found in (met, arrays):
            found["item_numbers"] = found["item_numbers"][..., :-rates]
        assert met.keys() == arrays.keys() - {"labels"}
        for name, values in met.items():
            np.testing.assert_array_equal(values, arrays[name], err_msg=name)


def test_rates_of_the_tables_are_as_of_the_test(encoded: Shown) -> None:
    begun = int(encoded.examples.times[encoded.examples.parts["test"]].min())
    for item in range(1, ITEMS + 1):
        expected = rate(encoded, kind_of(encoded.dataset, item), begun)
        assert encoded.tables.items.numbers[item, -1] == pytest.approx(expected, rel=1e-5)


def test_batches_hold_training_requests_once_and_hide_some(encoded: Shown) -> None:
    inputs = ("request_codes", "request_numbers", "path_codes", "retrieval_scores")
    shares = []
    for hidden in (0.0, 0.5, 1.0):
        batches = ShownBatches(encoded.dataset, 16, 3, encoded, inputs, hidden)
        epoch = [batches[0, step] for step in range(batches.steps)]
        assert sum(len(batch["path_places"]) for batch in epoch) == len(encoded.requests("train"))
        assert set(epoch[0]) == {*inputs, "path_places", "labels"}
        known = encoded.tables.features.facts["device"]["values"].index("phone")
        default = [(batch["request_codes"][:, 1] == 2 + known).float() for batch in epoch]
        shares.append(float(np.concatenate(default).mean()))
    assert shares[0] == pytest.approx(1 / 3, abs=0.02)
    assert shares[0] < shares[1] < shares[2] == 1.0


def test_items_of_a_batch_of_paths_are_looked_up_once(encoded: Shown) -> None:
    requests = encoded.requests("train")
    distinct = DistinctItems(encoded.tables.items.codes)
    for some in np.array_split(requests, 3):
        once, each = encoded.arrays(some, distinct=distinct), encoded.arrays(some)
        np.testing.assert_array_equal(once["path_codes"][once["path_places"]], each["path_codes"])
        codes_PW = each["path_codes"].reshape(-1, each["path_codes"].shape[-1])
        assert len(once["path_codes"]) == len(np.unique(codes_PW, axis=0))


def test_batches_make_some_items_such_as_no_training_has_met(encoded: Shown) -> None:
    assert (encoded.tables.items.codes[1:, 0] == np.arange(2, ITEMS + 2)).all()
    shares = []
    for hidden in (0.0, 0.3, 1.0):
        batches = ShownBatches(encoded.dataset, 16, 3, encoded, ("item_codes",), hidden)
        epoch = [batches[0, step] for step in range(batches.steps)]
        there = [~batch["labels"].isnan().all(-1) for batch in epoch]
        other = [
            batch["item_codes"][..., 0][real] == OTHER
            for batch, real in zip(epoch, there, strict=True)
        ]
        shares.append(float(np.concatenate(other).mean()))
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.3, abs=0.1)
    assert shares[2] == 1


def test_items_that_no_training_has_met_are_alike(encoded: Shown) -> None:
    data, features = encoded.dataset, encoded.tables.features
    strange = np.zeros(ITEMS + 1, bool)
    strange[[3, 7]] = True
    codes = features.items(data.items, {"kind_rate": np.ones(ITEMS + 1)}, strange).codes
    assert codes[[0, 2, 3, 7], 0].tolist() == [0, 3, OTHER, OTHER]
    assert not unmet(data, encoded.examples, 1).any()
    assert unmet(data, encoded.examples, 10**6)[1:].all()
    late = replace(encoded.examples, items=np.full_like(encoded.examples.items, 5))
    bare = SimpleNamespace(num_items=ITEMS, train_count=np.eye(1, ITEMS + 1, 4).astype(int)[0])
    met = np.flatnonzero(~unmet(cast(Dataset, bare), late, 1))
    assert met.tolist() == [0, 4, 5], "4 by an event, 5 by what was shown"


def test_tables_come_back_as_they_were(encoded: Shown, tmp_path: Path) -> None:
    encoded.tables.save(tmp_path / "ranker")
    again = Tables.load(tmp_path / "ranker")
    assert again.features.as_json() == encoded.tables.features.as_json()
    for name, array in encoded.tables.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
        assert again.arrays[name].dtype == array.dtype


def test_a_rate_of_no_task_is_refused(encoded: Shown) -> None:
    wrong = {**COLUMNS, "kind_rate": {**COLUMNS["kind_rate"], "task": "purchase"}}
    with pytest.raises(InputError, match=r"kind_rate is a rate of 'purchase'.*~features.kind_rate"):
        fitted(encoded.dataset, encoded.examples, wrong)
