"""Cutting, padding and packing: one path for training and serving."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.history import Histories, encode, pack, request_context

lengths = st.lists(st.integers(0, 30), min_size=1, max_size=20)


def histories(lengths: list[int], seed: int = 0) -> Histories:
    rng = np.random.default_rng(seed)
    return Histories.of(
        [
            (
                rng.integers(1, 99, n),
                rng.integers(1, 5, n),
                np.sort(rng.integers(0, 10**12, n)),
                np.where(rng.random(n) < 0.3, np.nan, rng.uniform(0, 100, n)),
            )
            for n in lengths
        ]
    )


@given(lengths, st.integers(1, 12))
def test_batch_equals_single(lengths: list[int], max_length: int) -> None:
    batch = histories(lengths)
    now = np.full(len(lengths), 2 * 10**12)
    together = encode(batch, max_length, now)
    for index in range(len(lengths)):
        first, end = batch.offsets[index], batch.offsets[index + 1]
        one = batch.taking(slice(first, end), np.array([0, end - first]))
        alone = encode(one, max_length, now[:1])
        width = alone["items"].shape[1]
        for name, values in alone.items():
            expected = together[name][index]
            np.testing.assert_array_equal(
                values[0], expected[:width] if values.ndim == 2 else expected
            )


@given(lengths, st.integers(1, 12))
def test_only_the_newest_events_matter(lengths: list[int], max_length: int) -> None:
    batch = histories(lengths)
    now = np.full(len(lengths), 2 * 10**12)
    whole, cut = encode(batch, max_length, now), encode(batch.last(max_length), max_length, now)
    for name in whole:
        np.testing.assert_array_equal(whole[name], cut[name])


@given(lengths, st.integers(1, 12))
def test_packing_loses_and_invents_nothing(lengths: list[int], row: int) -> None:
    batch = histories(lengths)
    packed = pack(batch, row)
    pairs = {(i, t) for i, t in zip(packed["items"].flat, packed["targets"].flat, strict=True) if t}
    expected = set()
    for b in range(len(batch)):
        events = batch.items[batch.offsets[b] : batch.offsets[b + 1]][-(row + 1) :]
        expected |= set(pairwise(events))
    assert pairs == expected
    assert (packed["targets"] > 0).sum() == sum(max(0, min(n - 1, row)) for n in lengths)
    assert ((packed["segments"] > 0) == (packed["targets"] > 0)).all()


def test_packed_positions_equal_encoded_ones() -> None:
    batch = histories([9, 4, 7])
    packed = pack(batch, 8)
    for b in range(3):
        first, end = batch.offsets[b], batch.offsets[b + 1] - 1
        inputs = batch.taking(slice(first, end), np.array([0, end - first]))
        alone = encode(inputs, 8, batch.times[batch.offsets[b + 1] - 1 :][:1])
        places = np.argwhere(packed["targets"] == batch.items[batch.offsets[b + 1] - 1])
        row, end = next(p for p in places if packed["positions"][tuple(p)] == len(inputs.items) - 1)
        span = slice(end - len(inputs.items) + 1, end + 1)
        for name in ("items", "types", "gaps", "values"):
            np.testing.assert_array_equal(packed[name][row, span], alone[name][0])
        for name in ("request_gap", "request_hour", "request_weekday"):
            assert packed[name][row, end] == alone[name][0]


def test_joined_histories_keep_their_values() -> None:
    one = (np.array([3]), np.array([1]), np.array([0]), np.array([60.0]))
    two = (np.array([4, 5]), np.array([1, 1]), np.array([0, 9]), np.array([np.nan, 3600.0]))
    arrays = encode(Histories.of([one, two]), 5, np.array([10, 10]))
    assert arrays["values"].tolist() == [[48, 0], [0, 95]]
    none = encode(Histories.of([one[:3], two[:3]]), 5, np.array([10, 10]))
    assert none["values"].tolist() == [[0, 0], [0, 0]]


def test_request_context_of_a_known_moment() -> None:
    # 2023-11-14 22:13:20 UTC was a Tuesday.
    now = np.array([1_700_000_000_000])
    context = request_context(now - 5_000, now)
    assert [int(context[f"request_{n}"][0]) for n in ("gap", "hour", "weekday")] == [4, 22, 1]


def test_empty_history_is_one_padded_place() -> None:
    arrays = encode(Histories.of([]).last(3), 5, np.zeros(0, np.int64))
    assert arrays["items"].shape == (0, 1)
    one = Histories(*(np.zeros(0, np.int64),) * 3, offsets=np.array([0, 0]))
    arrays = encode(one, 5, np.array([10**12]))
    assert arrays["items"].tolist() == [[0]]
    assert arrays["lengths"].tolist() == [0]
    assert arrays["request_gap"].tolist() == [0]


@pytest.mark.parametrize("gap", [-5_000, 0])
def test_a_clock_set_back_is_a_gap_of_nothing(gap: int) -> None:
    now = np.array([10**12])
    assert request_context(now - gap, now)["request_gap"].tolist() == [1]


def test_a_horizon_draws_each_target_from_the_events_to_come() -> None:
    items = np.arange(1, 8)
    history = Histories.of([(items, np.ones(7, int), np.arange(7) * 1000)] * 50)
    packed = pack(history, 60, 3, np.random.default_rng(0))
    ahead = (packed["targets"] - packed["items"])[packed["segments"] > 0]
    left = (7 - packed["items"])[packed["segments"] > 0]
    assert set(ahead[left >= 3].tolist()) == {1, 2, 3}
    assert (ahead <= np.minimum(left, 3)).all()
    assert (ahead >= 1).all()
    assert np.array_equal(packed["request_gap"], pack(history, 60)["request_gap"])
