"""Feature columns: declarations, encoding by hand, the path as of now, one path for both users."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recsys.config import config_dir
from recsys.data.features import regrouped
from recsys.features import Features, declare, gather
from recsys.history import Histories
from recsys.schema import InputError, type_code

ITEMS = pa.table(
    {
        "category": ["shoes", "bags", "shoes", None, "hats"],
        "title": ["Red red boots", "A bag", None, "", "Hat, red"],
        "genres": pa.array([["x", "y"], ["y"], [], None, ["z", "y", "y", "x"]]),
        "price": [10.0, 20.0, None, 40.0, 0.0],
        "vector": pa.array([[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]),
    }
)
USERS = pa.table({"region": ["north", "south", "north"], "age": pa.array([30, None, 50])})
CONTEXT = {
    "device": pa.array(["phone", "desktop", "phone", None]),
    "speed": pa.array([1.0, 2, 3, 4]),
    "tags": pa.array([["sale", "red"], ["red"], None, []], pa.list_(pa.string())),
    "query": pa.array(["Red boots", None, "", "boots"]),
}
NOW = 1_700_000_000_000


def item(kind: str, **options: Any) -> dict[str, Any]:
    return {"of": "item", "kind": kind, **options}


def fit(**columns: dict[str, Any]) -> Features:
    return Features.fit(columns, ITEMS, USERS, CONTEXT)


def codes(name: str, **options: Any) -> list:
    features = fit(**{name: item(**options)})
    found = features.items(ITEMS, {}).codes
    assert found.max() < features.layout.item_codes[0].size
    return found.squeeze().tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("numeric", r"features.x is 'numeric'; expected what it is of"),
        ({"kind": "numeric"}, r"features.x.of is missing; expected one of item, user"),
        ({"of": "itm", "kind": "numeric"}, r"x.of is 'itm'; .*did you mean 'item'"),
        ({"of": "item", "kind": "nummeric"}, r"x.kind is 'nummeric'; .*did you mean 'numeric'"),
        ({"of": "user", "kind": "vector"}, r"x.kind is 'vector'; expected one of categorical"),
        (item("numeric", sclae="log"), r"x.sclae is no option on kind numeric.*mean 'scale'"),
        (item("categorical", scale="log"), r"x.scale has no effect on kind categorical"),
        (item("numeric", scale="lag"), r"x.scale is 'lag'; expected one of .*mean 'log'"),
        (item("categorical", hash=0), r"x.hash is 0; expected a whole number, 1 or more"),
        (item("categorical", least=True), r"x.least is True; expected a whole number"),
        (item("categorical", hash=9, least=2), r"x.least has no effect beside hash"),
        (item("categorical", default=3), r"x.default is 3; expected text"),
        (item("numeric", default="3"), r"x.default is '3'; expected a finite number"),
        ({"of": "request", "kind": "hour", "most": 2}, r"most has no effect on kind hour.*no opt"),
        ({"of": "path", "kind": "count"}, r"x.by is missing; a count needs it"),
        ({"of": "path", "kind": "count", "event": "cat"}, r"x.event is 'cat'.*mean 'cart'"),
        ({"of": "log", "kind": "rate", "by": "item_id"}, r"x.task is missing"),
        ({"of": "path", "kind": "count", "by": "brnd"}, r"x.by is 'brnd'.*mean 'brand'.*Declare"),
        (
            {"of": "path", "kind": "ratio", "by": "brand"},
            r"x.by is 'brand'.*numeric: there is none",
        ),
        ({"of": "log", "kind": "rate", "by": "item_id", "task": "a", "prior": 0}, r"above 0"),
    ],
)
def test_a_wrong_declaration_names_itself(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        declare({"brand": item("categorical"), "x": options})


def test_a_column_that_is_null_is_left_out() -> None:
    assert [column.name for column in declare({"brand": item("multi"), "x": None})] == ["brand"]
    with pytest.raises(InputError, match=r"x.by is 'brand'.*there is none"):
        declare({"brand": None, "x": {"of": "path", "kind": "ratio", "by": "brand"}})


def test_an_index_has_no_options() -> None:
    with pytest.raises(InputError, match=r"features.item_id.hash has no effect"):
        declare({"item_id": item("categorical", hash=10)})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("catgory", {"kind": "categorical"}, "items have no column 'catgory'.*mean 'category'"),
        ("price", {"kind": "categorical"}, "column 'price' is double; a categorical one is made"),
        ("category", {"kind": "numeric"}, "column 'category' is string; a numeric one is made of"),
        ("category", {"kind": "multi"}, "'category' is string; a multi one is made of lists"),
        ("price", {"kind": "vector"}, "'price' is double; a vector one"),
    ],
)
def test_a_column_that_does_not_fit_names_itself(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(**{name: {"of": "item", **options}})


def test_a_column_of_nothing_is_refused() -> None:
    empty = pa.table({"price": pa.array([None, None], pa.float64()), "brand": pa.nulls(2)})
    for name, kind in (("price", "numeric"), ("brand", "categorical")):
        with pytest.raises(InputError, match="no value is there to learn from"):
            Features.fit({name: item(kind)}, empty, USERS, {})


def test_numbers_must_be_finite_and_vectors_equally_long() -> None:
    for name, kind, values in (
        ("price", "numeric", [1.0, math.inf]),
        ("vector", "vector", [[1.0], [1.0, 2.0]]),
    ):
        with pytest.raises(InputError, match=f"features.{name}"):
            Features.fit({name: item(kind)}, pa.table({name: values}), USERS, {})


def test_codes_go_by_frequency_and_missing_is_not_other() -> None:
    assert codes("category", kind="categorical") == [0, 2, 3, 2, 0, 4]
    assert codes("category", kind="categorical", vocabulary=1) == [0, 2, 1, 2, 0, 1]
    assert codes("category", kind="categorical", least=2) == [0, 2, 1, 2, 0, 1]
    assert codes("category", kind="categorical", default="hats") == [2, 3, 4, 3, 2, 2]


def test_how_hashed_values_collide_is_told_as_counted_by_hand() -> None:
    kinds = {"kind": "categorical", "hash": 3}
    features = fit(
        ids={"of": "item", "column": "category", **kinds},
        tags={"of": "item", "kind": "multi", "column": "genres", "hash": 10_000},
        plain={"of": "item", "kind": "categorical", "column": "category"},
    )
    codes = [crc32(name) % 3 for name in (b"shoes", b"bags", b"hats")]
    shared = sum(codes.count(code) > 1 for code in codes)
    assert features.collisions == {
        "ids": f"3 values share 3 codes; {shared} have another's",
        "tags": "3 values share 10,000 codes; 0 have another's",
    }
    assert Features.of_json(features.as_json()).collisions == features.collisions


def test_hashed_codes_are_the_same_everywhere() -> None:
    found = codes("category", kind="categorical", hash=10)
    assert found[1] == found[3] == 2 + crc32(b"shoes") % 10
    assert found[0] == found[4] == 0


def test_multi_and_text_take_places() -> None:
    # y 4 times, then x and z by count: x 2, z 1.
    assert codes("genres", kind="multi", most=2)[1:] == [[3, 2], [2, 0], [0, 0], [0, 0], [4, 2]]
    assert codes("genres", kind="multi", most=3)[5] == [4, 2, 3]
    words = codes("title", kind="text", most=3)
    assert words[1][0] == words[5][1] == 2, "the commonest word is 'red'"
    assert words[3] == words[4] == [0, 0, 0]


def test_indices_need_no_column() -> None:
    features = fit(item_id=item("categorical"), user_id={"of": "user", "kind": "categorical"})
    assert features.items(ITEMS, {}).codes.ravel().tolist() == [0, 2, 3, 4, 5, 6]
    assert features.layout.item_codes[0].size == 7
    assert features.users(USERS)[0].ravel().tolist() == [1, 2, 3, 4]
    more = pa.concat_tables([ITEMS, ITEMS])
    assert features.items(more, {}).codes.max() == 6, "an item of after training is an unknown one"


def test_columns_can_read_another_one() -> None:
    features = fit(price=item("numeric"), price_log=item("numeric", column="price", scale="log"))
    assert features.layout.item_numbers == ("price", "price_log")


def numbers(**options: Any) -> np.ndarray:
    features = fit(price=item("numeric", **options))
    return features.items(ITEMS, {}).numbers[:, 0]


def test_scales_by_hand() -> None:
    missing = [True, False, False, True, False, False]
    for scale in ("quantile", "log", "standard", "none"):
        np.testing.assert_array_equal(np.isnan(numbers(scale=scale)), missing)
    np.testing.assert_allclose(numbers(scale="none")[[1, 2, 4, 5]], [10, 20, 40, 0])
    known = np.array([10, 20, 40, 0])
    for scale, changed in (("standard", known), ("log", np.log1p(known))):
        expected = (changed - changed.mean()) / changed.std()
        np.testing.assert_allclose(numbers(scale=scale)[[1, 2, 4, 5]], expected, rtol=1e-6)
    np.testing.assert_allclose(numbers()[[1, 2, 4, 5]], [-1 / 3, 1 / 3, 1, -1], atol=0.02)
    assert numbers(scale="none", default=7.0)[[0, 3]].tolist() == [7, 7]


@given(st.lists(st.integers(-3, 3), min_size=1), st.floats(-9, 9))
def test_quantiles_keep_the_order(values: list[int], new: float) -> None:
    table = pa.table({"x": pa.array(values, pa.float64())})
    features = Features.fit({"x": item("numeric")}, table, USERS, {})
    probe = sorted([*map(float, values), new])
    found = features.items(pa.table({"x": probe}), {}).numbers[1:, 0]
    assert (np.diff(found) >= 0).all()
    assert np.abs(found).max() <= 1


def test_vectors_and_rates_stand_beside_the_numbers() -> None:
    features = fit(
        rate={"of": "log", "kind": "rate", "by": "item_id", "task": "view", "prior": 5},
        vector=item("vector"),
        price=item("numeric", scale="none"),
    )
    rate = np.array([np.nan, 0.5, 0, 1, np.nan, 0.25])
    table = features.items(ITEMS, {"rate": rate})
    assert table.vectors.tolist() == [[0, 0], [1, 2], [0, 0], [3, 4], [5, 6], [7, 8]]
    assert features.layout.item_numbers == ("price", "rate")
    assert features.layout.vector_width == 2
    np.testing.assert_allclose(
        table.numbers[:, 1], np.log([np.nan, 0.5, 1e-6, 1, np.nan, 0.25]), rtol=1e-6
    )
    np.testing.assert_array_equal(table.numbers[:, 1:], features.log_numbers({"rate": rate}, 6))
    assert features.rates == (("rate", "item_id", "view", 5.0),)


REQUEST = {
    "device": {"of": "request", "kind": "categorical"},
    "hour": {"of": "request", "kind": "hour"},
    "region": {"of": "user", "kind": "categorical"},
    "weekday": {"of": "request", "kind": "weekday"},
    "speed": {"of": "request", "kind": "numeric", "scale": "none"},
    "age": {"of": "user", "kind": "numeric", "scale": "none"},
}


def asked(context: dict[str, Any], columns: dict[str, Any] = REQUEST, batch: int = 1) -> dict:
    features = Features.fit(columns, ITEMS, USERS, CONTEXT)
    user_codes, user_numbers = features.users(USERS)
    rows = np.ones(batch, int)
    return features.requests(user_codes[rows], user_numbers[rows], context, np.full(batch, NOW))


def test_a_request_by_hand() -> None:
    layout = fit(**REQUEST).layout
    assert [f.name for f in layout.request_codes] == ["region", "device", "hour", "weekday"]
    assert [f.size for f in layout.request_codes] == [4, 4, 26, 9]
    assert layout.request_numbers == ("age", "speed")
    found = asked({"device": ["desktop"], "speed": [2]})
    # 2023-11-14, a Tuesday, 22:13.
    assert found["request_codes"].tolist() == [[2, 3, 2 + 22, 2 + 1]]
    assert found["request_codes"].dtype == np.int64
    assert found["request_numbers"].tolist() == [[30, 2]]
    assert found["request_numbers"].dtype == np.float32


def test_what_a_request_leaves_out_is_missing_or_its_default() -> None:
    for context in ({}, {"device": [None], "speed": [None]}):
        found = asked(context)
        assert found["request_codes"][0, 1] == 0
        assert np.isnan(found["request_numbers"][0, 1])
    filled = REQUEST | {
        "device": {"of": "request", "kind": "categorical", "default": "phone"},
        "speed": {"of": "request", "kind": "numeric", "scale": "none", "default": 9},
    }
    found = asked({}, filled)
    assert found["request_codes"][0, 1] == 2
    assert found["request_numbers"][0, 1] == 9
    for unknown in ("fridge", "", "\ud800"):
        assert asked({"device": [unknown]})["request_codes"][0, 1] == 1
    hashed = REQUEST | {"device": REQUEST["device"] | {"hash": 3}}
    assert asked({"device": ["\ud800"]}, hashed)["request_codes"][0, 1] in (2, 3, 4)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"devise": ["phone"]}, r"context.devise: no such feature; known: device, speed.*'device'"),
        ({"device": [7]}, r"^context.device: 7 is a number, expected text$"),
        ({"device": [True]}, r"context.device: True is a truth value, expected text"),
        ({"device": [["phone"]]}, r"is a list, expected text"),
        ({"device": [{"a": 1}]}, r"is an object, expected text"),
        ({"speed": ["fast"]}, r"^context.speed: 'fast' is text, expected a number$"),
        ({"speed": [True]}, r"context.speed: True is a truth value, expected a number"),
        ({"speed": [math.nan]}, r"context.speed: nan is not finite"),
        ({"speed": [-math.inf]}, r"context.speed: -inf is not finite"),
        ({"speed": [10**400]}, r"context.speed: 1000.*… is not finite"),
        ({"speed": [10**9999]}, r"context.speed: a number of thousands of digits is not finite"),
        ({"device": [[7] * 999]}, r"context.device: .{61} is a list"),
    ],
)
def test_a_wrong_context_names_itself(context: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        asked(context)


@pytest.mark.parametrize("scale", ["quantile", "log", "standard", "none"])
def test_out_of_range_counts_as_the_nearer_end_of_training(scale: str) -> None:
    columns = REQUEST | {"speed": {"of": "request", "kind": "numeric", "scale": scale}}
    found = asked({"speed": [-1e300, 1, 4, 1e300]}, columns, 4)["request_numbers"][:, 1]
    assert np.isfinite(found).all()
    assert found[0] == found[1] < found[2] == found[3]


def test_a_log_may_hold_more_than_is_declared() -> None:
    more = {"device": pa.array(["phone"]), "browser": pa.array(["elinks"])}
    assert asked(more)["request_codes"][0, 1] == 2
    with pytest.raises(InputError, match=r"context.browser: no such feature"):
        asked({"browser": ["elinks"]})


def test_whole_numbers_and_truth_values_can_be_categories() -> None:
    training = {"tab": pa.array([3, 3, 1]), "new": pa.array([True, False, True])}
    columns = {name: {"of": "request", "kind": "categorical"} for name in training}
    features = Features.fit(columns, ITEMS, USERS, training)
    nobody = np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32)

    def ask(**context: Any) -> list[int]:
        return features.requests(*nobody, context, np.array([NOW]))["request_codes"][0].tolist()

    assert ask(tab=[3], new=[False]) == [2, 3]
    assert ask(tab=[4], new=[True]) == [1, 2]
    for wrong in ({"tab": ["3"]}, {"tab": [True]}, {"tab": [10**30]}, {"new": [1]}):
        with pytest.raises(InputError, match=r"^context\."):
            ask(**wrong)


LISTS = REQUEST | {
    "tags": {"of": "request", "kind": "multi", "most": 3},
    "query": {"of": "request", "kind": "text", "most": 2},
}


def listed(context: dict[str, Any]) -> list:
    return asked(context, LISTS)["request_codes"][0, 4:].tolist()


def test_a_request_of_lists_by_hand() -> None:
    layout = fit(**LISTS).layout
    assert [f.name for f in layout.request_codes[:4]] == ["region", "device", "hour", "weekday"]
    assert [(f.name, f.size, f.width) for f in layout.request_codes[4:]] == [
        ("tags", 4, 3),
        ("query", 4, 2),
    ]
    found = asked(
        {"device": ["desktop"], "tags": [["sale", "red"]], "query": ["RED boots!"]}, LISTS
    )
    assert found["request_codes"].tolist() == [[2, 3, 2 + 22, 2 + 1, 3, 2, 0, 3, 2]]
    assert found["request_codes"].dtype == np.int64


def test_places_of_a_list_hold_its_first_distinct_values() -> None:
    tags = ["sale", None, "sale", "blue", "green", "red", "sale"]
    assert listed({"tags": [tags]}) == [3, 1, 2, 0, 0], "blue and green are one: unknown"
    features = fit(tags={"of": "request", "kind": "multi", "most": 2, "hash": 100})
    nobody = np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32)
    found = features.requests(*nobody, {"tags": [["a", "b", "\ud800"]]}, np.array([NOW]))
    assert found["request_codes"].tolist() == [[2 + crc32(b"a") % 100, 2 + crc32(b"b") % 100]]


def test_a_missing_list_is_all_0() -> None:
    empty: list[dict[str, Any]] = [{"tags": [none]} for none in (None, [], [None])]
    for context in ({}, {"query": [None]}, {"query": ["?"]}, *empty):
        assert listed(context) == [0] * 5


def test_lists_of_whole_numbers_come_as_such() -> None:
    training = {"tabs": pa.array([[3, 1], [3]])}
    features = Features.fit({"tabs": {"of": "request", "kind": "multi"}}, ITEMS, USERS, training)
    nobody = np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32)
    found = features.requests(*nobody, {"tabs": [[1, 7, 3]]}, np.array([NOW]))
    assert found["request_codes"].tolist() == [[3, 1, 2, 0, 0]]
    for wrong, message in (
        ("3", r"^context.tabs: '3' is text, expected a list of whole numbers$"),
        ([3, "3"], r"^context.tabs\[1\]: '3' is text, expected a whole number$"),
        ([10**30], r"^context.tabs\[0\]: 10+ is too large, expected 64 bits$"),
    ):
        with pytest.raises(InputError, match=message):
            features.requests(*nobody, {"tabs": [wrong]}, np.array([NOW]))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"tags": ["red"]}, r"^context.tags: 'red' is text, expected a list of text$"),
        ({"tags": [7]}, r"^context.tags: 7 is a number, expected a list of text$"),
        ({"tags": [{"red": 1}]}, r"is an object, expected a list of text"),
        ({"tags": [["red", None, 7]]}, r"^context.tags\[2\]: 7 is a number, expected text$"),
        ({"tags": [[["red"]]]}, r"^context.tags\[0\]: \['red'\] is a list, expected text$"),
        ({"tags": [[True]]}, r"is a truth value, expected text"),
        ({"query": [["red"]]}, r"^context.query: \['red'\] is a list, expected text$"),
        ({"tag": [["red"]]}, r"context.tag: no such feature; known: device, speed, tags, query"),
    ],
)
def test_a_wrong_list_names_itself(context: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        listed(context)


@pytest.mark.parametrize("column", [pa.array(["red"]), pa.array([7]), pa.array([[1.5]])])
def test_a_logged_column_that_is_no_list_of_text_names_itself(column: pa.Array) -> None:
    with pytest.raises(InputError, match=r"features.tags: column 'tags' is .*a multi one is made"):
        Features.fit({"tags": LISTS["tags"]}, ITEMS, USERS, {"tags": column})
    with pytest.raises(InputError, match=r"features.tags: column 'tags' is "):
        listed({"tags": column if column.type == pa.string() else pa.array([[1.5]])})


words = st.none() | st.sampled_from(["phone", "desktop", "", "tv"]) | st.text()
floats = st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(st.tuples(words, floats), min_size=1), st.booleans())
def test_training_and_serving_encode_alike(rows: list[tuple], hashed: bool) -> None:
    device = REQUEST["device"] | ({"hash": 7} if hashed else {})
    columns = REQUEST | {"device": device}
    devices, speeds = map(list, zip(*rows, strict=True))
    plain = asked({"device": devices, "speed": speeds}, columns, len(rows))
    arrow = {"device": pa.array(devices, pa.string()), "speed": pa.array(speeds, pa.float64())}
    coded = [arrow["device"][:1].dictionary_encode(), arrow["device"][1:].dictionary_encode()]
    for kinds in (arrow, arrow | {"device": pa.chunked_array(coded)}):
        for name, values in asked(kinds, columns, len(rows)).items():
            np.testing.assert_array_equal(values, plain[name])


lists = st.none() | st.lists(st.sampled_from(["sale", "red"]) | words, max_size=5)
sentences = words | st.lists(st.sampled_from(["Red", "boots", "İs"])).map(", ".join)


@given(st.lists(st.tuples(words, lists, sentences), min_size=1), st.booleans())
def test_training_and_serving_encode_lists_alike(rows: list[tuple], hashed: bool) -> None:
    more = {"hash": 7} if hashed else {}
    columns = LISTS | {name: LISTS[name] | more for name in ("tags", "query")}
    devices, tags, queries = map(list, zip(*rows, strict=True))
    plain = {"device": devices, "tags": tags, "query": queries}
    batch = asked(plain, columns, len(rows))["request_codes"]
    for wrap in (pa.list_, pa.large_list):
        arrow = {
            name: pa.array(values, pa.string()) for name, values in plain.items() if name != "tags"
        }
        arrow["tags"] = pa.array([["before"], *tags], wrap(pa.string()))[1:]
        cut = {name: pa.chunked_array([array[:1], array[1:]]) for name, array in arrow.items()}
        for logged in (arrow, cut):
            found = asked(logged, columns, len(rows))["request_codes"]
            np.testing.assert_array_equal(found, batch)
    for place in range(len(rows)):
        alone = asked({name: [values[place]] for name, values in plain.items()}, columns)
        np.testing.assert_array_equal(alone["request_codes"][0], batch[place])


PATH = {
    "category": item("categorical", least=2),
    "genres": item("multi", most=3),
    "price": item("numeric"),
    "position": {"of": "shown", "kind": "position"},
    "item_seen": {"of": "path", "kind": "count", "by": "item_id"},
    "genres_since": {"of": "path", "kind": "since", "by": "genres"},
    "category_seen": {"of": "path", "kind": "count", "by": "category"},
    "price_ratio": {"of": "path", "kind": "ratio", "by": "price"},
    "category_since": {"of": "path", "kind": "since", "by": "category"},
    "genres_seen": {"of": "path", "kind": "count", "by": "genres"},
    "item_since": {"of": "path", "kind": "since", "by": "item_id"},
    "carted": {"of": "path", "kind": "count", "by": "category", "event": "cart"},
    "cart_ratio": {"of": "path", "kind": "ratio", "by": "price", "event": "cart"},
}
VIEW, CART = type_code("view"), type_code("cart")
CATEGORY = [None, "shoes", None, "shoes", None, None]  # bags and hats are rare
GENRES = [set(), {"x", "y"}, {"y"}, set(), set(), {"x", "y", "z"}]
PRICE = [math.nan, 10, 20, math.nan, 40, 0]


def reference(events: list[tuple], now: int, candidate: int, position: int) -> dict:
    """One candidate's numbers, event by event."""
    past = [(seen, kind, at) for at, seen, kind in events if at < now]
    shared: dict[str, list[int]] = {"item": [], "category": [], "genres": []}
    carted = 0
    for seen, kind, at in past:
        same = CATEGORY[seen] == CATEGORY[candidate] is not None
        shared["item"] += [at] * (seen == candidate != 0)
        shared["category"] += [at] * same
        shared["genres"] += [at] * len(GENRES[seen] & GENRES[candidate])
        carted += same and kind == CART
    found = {"position": math.log1p(position) if position >= 0 else math.nan}
    for name, times in shared.items():
        found[f"{name}_seen"] = math.log1p(len(times))
        found[f"{name}_since"] = math.log1p((now - max(times)) / 1000) if times else math.nan
    prices = [(PRICE[seen], kind) for seen, kind, _ in past if PRICE[seen] > 0]
    found["price_ratio"] = against([price for price, _ in prices], PRICE[candidate])
    found["cart_ratio"] = against([p for p, kind in prices if kind == CART], PRICE[candidate])
    return found | {"carted": math.log1p(carted)}


def against(prices: list[float], price: float) -> float:
    return math.log(price / (sum(prices) / len(prices))) if prices and price > 0 else math.nan


moments = st.integers(NOW - 9000, NOW + 9000)
event = st.tuples(moments, st.integers(0, 5), st.sampled_from([VIEW, CART]))
requests = st.lists(
    st.tuples(st.lists(event, max_size=12), st.integers(NOW - 5000, NOW + 10000)), max_size=4
)
shown = st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 9)), max_size=8)


def paths(requests: list) -> tuple[Histories, np.ndarray]:
    parts = []
    for path, _ in requests:
        times, items, types = np.array(sorted(path), np.int64).reshape(-1, 3).T
        parts.append((items, types, times))
    return Histories.of(parts), np.array([now for _, now in requests], np.int64)


FITTED = fit(**PATH)
TABLE = FITTED.items(ITEMS, {})


@given(requests, shown)
def test_crossed_numbers_equal_a_slow_reference(requests: list, shown: list) -> None:
    histories, now_B = paths(requests)
    grid = np.broadcast_to(np.array(shown, np.int64).reshape(-1, 2), (len(now_B), len(shown), 2))
    candidates, positions = grid[..., 0], grid[..., 1]
    found = FITTED.crossed(histories, now_B, candidates, TABLE, positions)["cross_numbers"]
    names = FITTED.layout.cross_numbers
    assert found.shape == (*candidates.shape, 10)
    assert found.dtype == np.float32
    for b, (path, now) in enumerate(requests):
        for c, (candidate, position) in enumerate(shown):
            expected = reference(path, now, candidate, position)
            np.testing.assert_allclose(
                found[b, c], [expected[name] for name in names], rtol=1e-5, atol=1e-6
            )


@given(requests, shown)
def test_crossed_batch_equals_single(requests: list, shown: list) -> None:
    candidates = np.array([c for c, _ in shown], np.int64)[None]
    histories, now_B = paths(requests)
    batch = candidates.repeat(len(requests), axis=0)
    together = FITTED.crossed(histories, now_B, batch, TABLE)["cross_numbers"]
    for b, request in enumerate(requests):
        alone = FITTED.crossed(*paths([request]), candidates, TABLE)["cross_numbers"]
        np.testing.assert_array_equal(alone[0], together[b])


def test_an_event_at_or_after_now_does_not_count() -> None:
    before = [(NOW - 1000, 1, VIEW), (NOW - 500, 2, CART)]
    planted = [*before, (NOW, 5, VIEW), (NOW + 1, 5, CART), (NOW + 10**9, 1, CART)]
    candidates = np.array([[1, 2, 5]])
    clean, dirty = (
        FITTED.crossed(*paths([(path, NOW)]), candidates, TABLE)["cross_numbers"]
        for path in (before, planted)
    )
    np.testing.assert_array_equal(clean, dirty)
    seen = FITTED.layout.cross_numbers.index("item_seen")
    np.testing.assert_allclose(clean[0, :, seen], np.log1p([1, 1, 0]), rtol=1e-6)


def test_without_path_columns_nothing_is_crossed() -> None:
    features = fit(position={"of": "shown", "kind": "position"})
    table = features.items(ITEMS, {})
    found = features.crossed(*paths([([], NOW)]), np.array([[1, 2]]), table)["cross_numbers"]
    assert found.tolist() == [[[0], [0]]], "0 is the top: what serving says of all"
    nothing = fit(category=item("categorical"))
    found = nothing.crossed(*paths([([], NOW)]), np.array([[1]]), nothing.items(ITEMS, {}))
    assert found["cross_numbers"].shape == (1, 1, 0)


def test_gather_leaves_out_what_is_not_there() -> None:
    found = gather(TABLE, np.array([[5, 0]]), np.array([[1, 2, 3]]))
    assert sorted(found) == ["item_codes", "item_numbers", "path_codes"]
    assert found["item_codes"].dtype == found["path_codes"].dtype == np.int64
    np.testing.assert_array_equal(found["item_codes"][0], TABLE.codes[[5, 0]])
    np.testing.assert_array_equal(found["path_codes"][0], TABLE.codes[1:4])
    assert "path_codes" not in gather(TABLE, np.array([[5, 0]]))


def test_everything_goes_through_json() -> None:
    columns = PATH | LISTS | {"title": item("text", hash=50), "vector": item("vector")}
    columns |= {"item_id": item("categorical")}
    features = fit(**columns)
    again = Features.of_json(json.loads(json.dumps(features.as_json(), allow_nan=False)))
    assert again.columns == features.columns
    assert again.layout == features.layout
    assert again.as_json() == features.as_json()
    for name in ("codes", "numbers", "vectors", "raw"):
        first, second = (getattr(f.items(ITEMS, {}), name) for f in (features, again))
        np.testing.assert_array_equal(first, second)
    nobody = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
    context = {"tags": [["red", "new"]], "query": ["boots"], "speed": [2]}
    first, second = (f.requests(*nobody, context, np.array([NOW])) for f in (features, again))
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    with pytest.raises(InputError, match=r"features.json is of version 9, expected 1"):
        Features.of_json(features.as_json() | {"version": 9})


def test_new_values_of_a_later_table_are_other() -> None:
    features = fit(category=item("categorical"))
    later = pa.table({"category": ["gloves", "shoes"]})
    assert features.items(later, {}).codes.ravel().tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="items have no column 'category'"):
        features.items(pa.table({"categories": ["shoes"]}), {})


@pytest.mark.parametrize("path", sorted(config_dir().glob("features/*.yaml")), ids=lambda p: p.stem)
def test_shipped_columns_are_well_declared(path: Any) -> None:
    declared = yaml.safe_load(path.read_text())
    assert [column.name for column in declare(declared)] == list(declared)


def test_serving_features_needs_no_training_library() -> None:
    code = "import sys, recsys.features; print({'torch', 'ibis', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("sizes", [[0], [4], [5], [1, 0, 7, 3], [23], [2] * 11])
def test_the_same_rows_make_the_same_groups(sizes: list[int]) -> None:
    whole = pa.record_batch({"n": pa.array(range(sum(sizes)), pa.int64())})
    starts = np.cumsum([0, *sizes])
    cut = [whole.slice(start, size) for start, size in zip(starts, sizes, strict=False)]
    groups = list(regrouped(cut, 4))
    assert [group["n"].to_pylist() for group in groups] == [
        list(range(start, min(start + 4, sum(sizes)))) for start in range(0, max(sum(sizes), 1), 4)
    ]
