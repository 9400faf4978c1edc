"""Metrics of a ranker's tasks against hand-worked tables and slow, obvious references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from recsys.evaluation.significance import Interval
from recsys.evaluation.task_significance import auc_difference
from recsys.schema import InputError
from recsys.task_metrics import (
    auc,
    ece,
    grouped_auc,
    log_loss,
    mean_absolute_error,
    reliability,
    resampled_aucs,
    slice_metrics,
    task_metrics,
    user_aucs,
)


def slow_auc(score_R: NDArray, label_R: NDArray) -> float:
    """Count every pair, as the definition says."""
    positive, negative = score_R[label_R == 1], score_R[label_R == 0]
    if not len(positive) or not len(negative):
        return math.nan
    wins = positive[:, None] > negative
    ties = positive[:, None] == negative
    return float((wins + ties / 2).mean())


def slow_grouped_auc(score_R: NDArray, label_R: NDArray, users_R: NDArray) -> float:
    total = weight = 0.0
    for user in set(users_R[users_R >= 0].tolist()):
        at = users_R == user
        one = slow_auc(score_R[at], label_R[at])
        if not math.isnan(one):
            total, weight = total + one * at.sum(), weight + at.sum()
    return total / weight


@pytest.fixture
def rows() -> tuple[NDArray, NDArray, NDArray]:
    """Scores with many ties, labels and users, some unknown."""
    rng = np.random.default_rng(0)
    score_R = rng.integers(0, 20, 600) / 20
    label_R = (rng.random(600) < score_R).astype(np.float32)
    return score_R, label_R, rng.integers(-1, 40, 600)


@pytest.mark.parametrize(
    ("score", "label", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 1.0),
        ([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1], 0.0),
        ([0.5, 0.5, 0.5], [0, 1, 0], 0.5),
        # Pairs: (0.4, 0.1) won, (0.4, 0.4) half, (0.8, 0.1) and (0.8, 0.4) won: 3.5 of 4.
        ([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1], 0.875),
        # Pairs: 0.3 beats 0.2 alone; 0.6 beats 0.2 and 0.5, not 0.7: 3 of 6.
        ([0.2, 0.3, 0.5, 0.6, 0.7], [0, 1, 0, 1, 0], 0.5),
    ],
)
def test_auc_by_hand(score: list[float], label: list[int], expected: float) -> None:
    assert auc(np.array(score), np.array(label)) == expected


@pytest.mark.parametrize("label", [[0, 0], [1, 1], []])
def test_auc_of_one_class_is_undefined(label: list[int]) -> None:
    assert math.isnan(auc(np.zeros(len(label)), np.array(label)))


def test_auc_agrees_with_counting_pairs(rows: tuple[NDArray, NDArray, NDArray]) -> None:
    score_R, label_R, users_R = rows
    assert auc(score_R, label_R) == pytest.approx(slow_auc(score_R, label_R), abs=1e-12)
    known_R = users_R >= 0
    slow = [slow_auc(score_R[users_R == u], label_R[users_R == u]) for u in range(40)]
    found = user_aucs(score_R, label_R, users_R)
    np.testing.assert_allclose(found.auc, slow, atol=1e-12)
    assert found.rows.tolist() == np.bincount(users_R[known_R], minlength=40).tolist()


def test_grouped_auc_by_hand() -> None:
    # Ann: 1 won of 1 pair, 2 rows. Bob: 0 won of 2 pairs, 3 rows. Cid: one class, left out.
    users = np.array([0, 0, 1, 1, 1, 2])
    score, label = np.array([0.1, 0.2, 0.9, 0.3, 0.5, 0.7]), np.array([0, 1, 0, 1, 0, 1])
    assert grouped_auc(score, label, users) == pytest.approx((1 * 2 + 0 * 3) / 5)
    assert math.isnan(grouped_auc(score, label, np.arange(6)))
    assert math.isnan(grouped_auc(score, label, np.full(6, -1)))


def test_grouped_auc_agrees_and_does_not_mind_order(
    rows: tuple[NDArray, NDArray, NDArray],
) -> None:
    found = grouped_auc(*rows)
    assert found == pytest.approx(slow_grouped_auc(*rows), abs=1e-12)
    order = np.random.default_rng(1).permutation(600)
    assert grouped_auc(*(column[order] for column in rows)) == pytest.approx(found, abs=1e-12)


def test_log_loss_by_hand() -> None:
    found = log_loss(np.array([0.5, 0.9, 0.25]), np.array([0, 1, 0]))
    assert found == pytest.approx(-(math.log(0.5) + math.log(0.9) + math.log(0.75)) / 3)
    certain_and_wrong = log_loss(np.array([1.0], np.float32), np.array([0]))
    assert certain_and_wrong == pytest.approx(-math.log(1e-7))
    assert math.isnan(log_loss(np.array([]), np.array([])))


def test_ece_by_hand() -> None:
    # Two bins of three: |0.2 - 1/3| and |0.7 - 2/3|, each half the rows.
    probability, label = np.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.8]), np.array([0, 1, 0, 1, 1, 0])
    assert ece(probability, label, bins=2) == pytest.approx((0.4 / 3 + 0.1 / 3) / 2)
    bins = reliability(probability, label, bins=2)
    np.testing.assert_allclose(bins.predicted, [0.2, 0.7])
    np.testing.assert_allclose(bins.observed, [1 / 3, 2 / 3])


def test_ties_share_a_bin_in_any_order_of_rows() -> None:
    # Were the tied rows cut in the order they come, each bin would look certain and wrong.
    assert ece(np.full(100, 0.3), np.repeat([0, 1], [70, 30])) == pytest.approx(0, abs=1e-12)
    assert reliability(np.full(100, 0.3), np.repeat([0, 1], [70, 30])).rows.tolist() == [100]
    assert math.isnan(ece(np.array([]), np.array([])))


def test_bins_hold_equally_many_rows() -> None:
    rng = np.random.default_rng(2)
    probability = rng.beta(1, 20, 1501)
    rows = reliability(probability, rng.random(1501) < probability).rows
    assert len(rows) == 15
    assert rows.min() >= 100
    assert rows.max() <= 101


def test_calibrated_predictions_have_little_error() -> None:
    rng = np.random.default_rng(3)
    probability = rng.random(60_000)
    label = (rng.random(60_000) < probability).astype(float)
    assert ece(probability, label) < 0.01
    assert ece(probability**2, label) == pytest.approx(1 / 2 - 1 / 3, abs=0.01)


def test_mean_absolute_error_by_hand() -> None:
    assert mean_absolute_error(np.array([1.0, 5.0]), np.array([2.0, 3.0])) == 1.5
    assert math.isnan(mean_absolute_error(np.array([]), np.array([])))


def test_each_task_reads_its_own_labels(rows: tuple[NDArray, NDArray, NDArray]) -> None:
    score_R, label_R, users_R = rows
    half_R = np.where(np.arange(600) < 300, label_R, np.nan)
    seconds_R = np.where(np.arange(600) < 10, 7.0, np.nan)
    predicted_RT = np.stack([score_R, score_R, np.full(600, 5.0)], axis=1)
    label_RT = np.stack([label_R, half_R, seconds_R], axis=1)
    found = task_metrics(predicted_RT, label_RT, ["view", "cart", "dwell"], users_R)
    assert found["view/auc"] == auc(score_R, label_R)
    assert found["cart/gauc"] == grouped_auc(score_R[:300], label_R[:300], users_R[:300])
    assert found["cart/log_loss"] == log_loss(score_R[:300], label_R[:300])
    assert found["cart/ece"] == ece(score_R[:300], label_R[:300])
    assert found["dwell/mae"] == 2.0
    assert len(found) == 9


def test_a_task_without_labels_is_undefined_not_wrong() -> None:
    found = task_metrics(np.full((3, 1), 0.5), np.full((3, 1), np.nan), ["view"], np.arange(3))
    assert all(math.isnan(value) for value in found.values())


def test_slices_cut_rows_by_their_bucket(rows: tuple[NDArray, NDArray, NDArray]) -> None:
    score_R, label_R, users_R = rows
    hour_R = np.arange(600) % 3
    slices = {"hour": hour_R, "newcomer": users_R < 5, "device": np.where(hour_R, "phone", "tv")}
    found = slice_metrics(score_R[:, None], label_R[:, None], ["view"], users_R, slices)
    assert list(found["hour"]) == ["0", "1", "2"]
    assert found["hour"]["1"]["view/auc"] == auc(score_R[1::3], label_R[1::3])
    assert found["device"]["tv"]["rows"] == 200
    assert found["newcomer"]["yes"]["rows"] == (users_R < 5).sum()


@pytest.mark.parametrize(
    ("predicted", "label", "tasks", "message"),
    [
        ([[0.5]], [[0], [1]], ["view"], r"predictions have shape \(1, 1\), expected \(2, 1\)"),
        ([[0.5], [1.5]], [[0], [1]], ["view"], "0.5 to 1.5, expected probabilities.*sigmoid"),
        ([[0.5], [math.nan]], [[0], [1]], ["view"], "NaN in 1 of 2 rows.*learning rate"),
        ([[0.5], [0.5]], [[0], [3]], ["view"], "label 3 in 1 rows, expected 0, 1 or NaN"),
        ([[0.5], [0.5]], [[0], [1]], ["a", "b"], "expected .2, 2.*each task of a, b"),
    ],
)
def test_wrong_values_are_named(
    predicted: list, label: list, tasks: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        task_metrics(np.array(predicted), np.array(label, float), tasks, np.arange(2))


def test_wrong_slice_is_named() -> None:
    arrays = np.full((2, 1), 0.5), np.zeros((2, 1)), ["view"], np.arange(2)
    with pytest.raises(InputError, match=r"slice 'hour' has shape \(3,\), expected \(2,\)"):
        slice_metrics(*arrays, slices={"hour": np.arange(3)})


def test_resampled_auc_is_that_of_the_repeated_rows(
    rows: tuple[NDArray, NDArray, NDArray],
) -> None:
    score_R, label_R, users_R = rows
    group_R = users_R + 1
    times_SU = np.random.default_rng(4).integers(0, 3, (3, 41))
    found = resampled_aucs(score_R, label_R, group_R, times_SU)
    for times_U, one in zip(times_SU, found, strict=True):
        repeated = np.repeat(np.arange(600), times_U[group_R])
        assert one == pytest.approx(slow_auc(score_R[repeated], label_R[repeated]), abs=1e-12)


def two_rankers(gain: float, seed: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Give scores of a ranker and of one with more signal, with labels and users."""
    rng = np.random.default_rng(seed)
    users_R = np.repeat(np.arange(100), 20)
    label_R = (rng.random(2000) < 0.4).astype(float)
    noise_R = rng.normal(size=2000)
    return label_R + noise_R, (1 + gain) * label_R + noise_R, label_R, users_R


@pytest.mark.parametrize("grouped", [False, True])
def test_the_better_ranker_is_told(grouped: bool) -> None:
    left_R, right_R, label_R, users_R = two_rankers(0.3, seed=5)
    found = auc_difference(left_R, right_R, label_R, users_R, grouped=grouped)
    metric = (lambda s: grouped_auc(s, label_R, users_R)) if grouped else lambda s: auc(s, label_R)
    assert found.mean == pytest.approx(metric(right_R) - metric(left_R), abs=1e-12)
    assert 0 < found.low < found.mean < found.high
    other_way = auc_difference(right_R, left_R, label_R, users_R, grouped=grouped)
    assert other_way.low == pytest.approx(-found.high)


@pytest.mark.parametrize("grouped", [False, True])
def test_equal_rankers_differ_in_few_of_many_samples(grouped: bool) -> None:
    said = 0
    for seed in range(60):
        left_R, _, label_R, users_R = two_rankers(0.0, seed)
        right_R = label_R + np.random.default_rng(1000 + seed).normal(size=2000)
        arrays = left_R, right_R, label_R, users_R
        said += auc_difference(*arrays, grouped=grouped, resamples=100).p_value < 0.05
    assert said <= 9  # 5 % of 60 are 3; ten or more come once in a thousand.


def test_a_user_comes_and_goes_with_all_rows() -> None:
    # Ten users of 200 identical rows tell as much as ten rows, not as 2,000.
    left_R, right_R, label_R, users_R = two_rankers(0.3, seed=6)
    alike = np.repeat(np.arange(100), 20)
    few = [np.repeat(column[:100], 20) for column in (left_R, right_R, label_R)]
    wide = auc_difference(*few, alike)
    narrow = auc_difference(left_R, right_R, label_R, users_R)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_unknown_users_and_labels() -> None:
    left_R, right_R, label_R, users_R = two_rankers(0.3, seed=7)
    nobody = auc_difference(left_R, right_R, label_R, np.full(2000, -1))
    each = auc_difference(left_R, right_R, label_R, np.arange(2000))
    assert nobody.mean == each.mean
    unknown = np.where(users_R < 50, np.nan, label_R)
    half = auc_difference(left_R, right_R, unknown, users_R)
    assert half == auc_difference(*(c[1000:] for c in (left_R, right_R, label_R, users_R)))
    assert isinstance(half, Interval)


@pytest.mark.parametrize("grouped", [False, True])
def test_one_class_cannot_be_compared(grouped: bool) -> None:
    score, users = np.arange(4.0), np.arange(4)
    with pytest.raises(InputError, match="one class only, expected both"):
        auc_difference(score, score, np.zeros(4), users, grouped=grouped)
