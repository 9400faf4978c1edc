"""What came next in the log: against an obvious reference, as of any day, and kept whole."""

from __future__ import annotations

from dataclasses import replace
from math import isnan, log, nan
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.dataset import Dataset
from recsys.data.rates import DAY
from recsys.data.transitions import TransitionLog
from recsys.features import Features, declare
from recsys.features.against_path import Compared, Past, Shared, transition
from recsys.features.transitions import Transition, after_code, followed, kept
from recsys.history import Histories
from recsys.schema import InputError

CODES = np.array([0, 2, 2, 3, 3, 1, 2])
"""Values of items 0 to 6: 1 to 6 are of two aisles, but 5, whose value is rare."""
ITEMS = pa.table({"aisle": ["a", "a", "b", "b", "c", "a"]})
Event = tuple[int, int, int]


def dataset(paths: list[list[Event]]) -> Dataset:
    """Return all that a log of transitions reads of a dataset: (time, item, type) by user."""
    sorted_paths = [sorted(path, key=lambda event: event[0]) for path in paths]
    rows = np.array([event for path in sorted_paths for event in path], np.int64).reshape(-1, 3)
    events = {"times": rows[:, 0], "items": rows[:, 1], "types": rows[:, 2]}
    offsets = np.cumsum([0] + [len(path) for path in paths])
    return cast(Dataset, SimpleNamespace(events=events, offsets=offsets))


def slow_chance(log: Dataset, after: Event, candidate: int, before: int, prior: float) -> float:
    """Look at every event, one after the other; `after`: an event of which item and type count."""
    count = total = met = of_value = 0
    times_met = log.events["times"][log.events["items"] == candidate]
    first_day = min(times_met, default=before) // DAY * DAY
    for first, last in zip(log.offsets[:-1], log.offsets[1:], strict=True):
        newest: dict[int, tuple[int, int]] = {}
        for at in range(first, last):
            item, kind = int(log.events["items"][at]), int(log.events["types"][at])
            code = int(CODES[item])
            if code in newest and code >= 2 and first_day <= log.events["times"][at] < before:
                came_after = newest[code] == after[1:]
                total, count = total + came_after, count + (came_after and item == candidate)
                of_value += code == CODES[candidate]
                met += item == candidate
            newest[code] = (item, kind)
    share = met / of_value if of_value else 0.0
    return (count + prior * share) / (total + prior)


EVENT = st.tuples(st.integers(0, 6 * DAY), st.integers(1, 6), st.integers(1, 4))
PATHS = st.lists(st.lists(EVENT, max_size=12), min_size=1, max_size=4)


@settings(max_examples=80)
@given(paths=PATHS, after=EVENT, candidate=st.integers(1, 6), now=st.integers(0, 7 * DAY))
def test_chances_equal_the_slow_reference(
    paths: list[list[Event]], after: Event, candidate: int, now: int
) -> None:
    data, prior = dataset(paths), 3.0
    made = TransitionLog(data, CODES, prior)
    midnight = now // DAY * DAY
    code = after_code(np.array([[after[1]]]), np.array([[after[2]]]))
    asked = code, np.array([[candidate]]), np.array([now])
    expected = slow_chance(data, after, candidate, midnight, prior)
    assert made.chances(*asked).item() == pytest.approx(expected)
    # What a bundle keeps says at any time what the log said at its moment.
    assert made.before(midnight).chances(*asked).item() == pytest.approx(expected)
    whole = slow_chance(data, after, candidate, 10**15, prior)
    assert made.before(None).chances(*asked).item() == pytest.approx(whole)


@settings(max_examples=40)
@given(paths=PATHS, later=st.lists(EVENT, min_size=1, max_size=9), day=st.integers(0, 6))
def test_chances_do_not_move_with_the_future(
    paths: list[list[Event]], later: list[Event], day: int
) -> None:
    grid = np.meshgrid(np.arange(7), np.arange(1, 5), np.arange(1, 7), indexing="ij")
    after = after_code(grid[0].reshape(1, -1), grid[1].reshape(1, -1))
    asked = after, grid[2].reshape(1, -1), np.array([day * DAY + 5])
    future = [(time % DAY + (7 + day) * DAY, item, kind) for time, item, kind in later]
    before = TransitionLog(dataset(paths), CODES, 2.0).chances(*asked)
    again = TransitionLog(dataset([*paths[:-1], paths[-1] + future]), CODES, 2.0).chances(*asked)
    np.testing.assert_array_equal(again, before)


def test_what_came_before_an_item_was_there_is_not_held_against_it() -> None:
    # Four went from 1 to 2 on the first day; 6 came on the next one, and took half of what came.
    old = [[(0, 1, 1), (1, 2, 1)] for _ in range(4)]
    new = [[(DAY, 1, 1), (DAY + 1, item, 1)] for item in (2, 6)]
    known = TransitionLog(dataset(old + new), CODES, prior=1).before(None)
    after = after_code(np.array([[1, 1]]), np.array([[1, 1]]))
    found = known.chances(after, np.array([[2, 6]]), np.zeros(1, np.int64))
    np.testing.assert_allclose(found, [[(5 + 5 / 6) / (6 + 1), (1 + 1 / 2) / (2 + 1)]], rtol=1e-6)


def two_of_an_aisle() -> TransitionLog:
    """After a view of 1 came 2, after a cart of 4 came 3: nothing else is known."""
    return TransitionLog(dataset([[(0, 1, 1), (0, 2, 1)], [(0, 4, 3), (0, 3, 1)]]), CODES, 1)


def newest(past: Past, candidates: np.ndarray) -> np.ndarray:
    compared = Compared.of([("aisle", None)], {"aisle": (slice(0, 1), 4)})
    return Shared.of(past, candidates, CODES[:, None], compared).last(("aisle", None))


def test_a_candidate_is_looked_up_after_its_values_newest_event() -> None:
    events = np.array([1, 4, 5]), np.array([1, 3, 1]), np.array([10, 20, 30])
    past = Past.of(Histories.of([events, events]), np.array([40, 20]))
    candidates = np.array([[2, 3, 5, 1], [2, 3, 0, 6]])
    asked = two_of_an_aisle().before(None), np.array([40, 20])
    # 2 and 3 alone came next in their aisles, once each: (1 + 1 × 1) / (1 + 1).
    # The second request is asked at the moment of the cart, which is not known yet.
    expected = [[0.0, 0.0, nan, log(1e-6)], [0.0, nan, nan, log(1e-6)]]
    found = transition(past, candidates, newest(past, candidates), *asked)
    np.testing.assert_allclose(found, expected, atol=1e-7)
    nobody = Past.of(Histories.of([(np.zeros(0, int),) * 3]), np.array([40]))
    first = candidates[:1]
    assert np.isnan(transition(nobody, first, newest(nobody, first), *asked)).all()


def test_several_are_kept_side_by_side_and_come_back() -> None:
    arrays = kept([two_of_an_aisle().before(None), two_of_an_aisle().before(-DAY)])
    declared = [Transition("next", "aisle", 5.0), Transition("then", "aisle", 5.0)]
    again = followed(declared, arrays.__getitem__)
    assert [*kept(again)] == [*arrays]
    assert len(arrays) == 14
    asked = after_code(np.array([[1]]), np.array([[1]])), np.array([[2]]), np.zeros(1, np.int64)
    assert [one.chances(*asked).item() for one in again] == [(1 + 5) / (1 + 5), 0.0]


def test_an_encoder_reads_transitions_where_they_are_declared() -> None:
    columns: dict[str, dict[str, Any]] = {
        "aisle": {"of": "item", "kind": "categorical"},
        "seen": {"of": "path", "kind": "count", "by": "aisle"},
        "next": {"of": "path", "kind": "transition", "by": "aisle", "prior": 1},
    }
    features = Features.fit(columns, ITEMS, pa.table({}), {})
    assert features.layout.cross_numbers == ("seen", "next")
    assert features.transitions == (Transition("next", "aisle", 1),)
    table = features.items(ITEMS, {})
    seen = TransitionLog(dataset([[(0, 1, 1), (0, 2, 1)]]), features.codes_of("aisle", table), 1)
    held = replace(table, transitions=(seen.before(None),))
    path = Histories.of([(np.array([1]), np.array([1]), np.array([10]))])
    found = features.crossed(path, np.array([20]), np.array([[2, 3]]), held)["cross_numbers"]
    assert found[0, 0].tolist() == pytest.approx([log(2), 0.0])
    assert found[0, 1, 0] == 0
    assert isnan(found[0, 1, 1])


def test_without_a_field_it_is_whatever_came_next() -> None:
    columns = {"next": {"of": "path", "kind": "transition", "prior": 1}}
    features = Features.fit(columns, ITEMS, pa.table({}), {})
    table = features.items(ITEMS, {})
    seen = TransitionLog(dataset([[(0, 1, 1), (0, 3, 1)]]), features.codes_of(None, table), 1)
    held = replace(table, transitions=(seen.before(None),))
    path = Histories.of([(np.array([1]), np.array([1]), np.array([10]))])
    found = features.crossed(path, np.array([20]), np.array([[3, 2, 0]]), held)["cross_numbers"]
    assert found[0, :, 0].tolist() == pytest.approx([0.0, log(1e-6), nan], nan_ok=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "item_id"}, "features.next.by is 'item_id'; expected a declared item column"),
        ({"by": "price"}, "did you mean"),
        ({"by": "aisle", "event": "cart"}, "event has no effect on kind transition"),
        ({"by": "aisle", "prior": 0}, "prior is 0; expected a finite number above 0"),
    ],
)
def test_a_wrong_declaration_is_refused(options: dict[str, Any], message: str) -> None:
    columns = {
        "aisle": {"of": "item", "kind": "categorical"},
        "prices": {"of": "item", "kind": "categorical"},
        "next": {"of": "path", "kind": "transition", **options},
    }
    with pytest.raises(InputError) as caught:
        declare(columns)
    assert message in str(caught.value)
