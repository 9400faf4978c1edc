"""Off-policy estimates: worked by hand, right on average, and clear where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from recsys.evaluation.policy import (
    Estimate,
    Logged,
    doubly_robust,
    expected_rewards,
    ips,
    shown_chances,
    snips,
)
from recsys.schema import InputError

# Two answers of two places each, over a pool of three.
LOG = Logged(
    offsets=np.array([0, 2, 4]),
    positions=np.array([0, 1, 0, 1]),
    propensities=np.array([0.5, 0.25, 0.5, 0.5]),
    rewards=np.array([1.0, 0.0, 0.0, 1.0]),
)
TARGET_R = np.array([1.0, 0.5, 0.25, 0.5])  # weights 2, 2, 0.5, 1


def test_ips_by_hand() -> None:
    found = ips(LOG, TARGET_R)
    # Answers earn 2 and 1: their mean, and 1.96 times 0.7071 / sqrt(2) on either side.
    assert found.value == pytest.approx(1.5)
    assert (found.low, found.high) == pytest.approx((1.5 - 0.98, 1.5 + 0.98), abs=1e-4)
    assert found.effective == pytest.approx(5.5**2 / 9.25)


def test_snips_by_hand() -> None:
    found = snips(LOG, TARGET_R)
    # Place 0: 2 / 2.5; place 1: 1 / 3.
    assert found.value == pytest.approx(0.8 + 1 / 3)
    # Residuals 0.2, -1/3, -0.8, 2/3 by weights, over the places' mean weights 1.25 and 1.5.
    left_B = np.array([2 * 0.2 / 1.25 - 2 / 3 / 1.5, -0.5 * 0.8 / 1.25 + 2 / 3 / 1.5])
    half = 1.959964 * left_B.std(ddof=1) / 2**0.5
    assert found.high - found.value == pytest.approx(half, rel=1e-5)


def test_doubly_robust_by_hand() -> None:
    predicted_R, expected_B = np.array([0.5, 0.5, 0.5, 0.5]), np.array([1.0, 1.2])
    found = doubly_robust(LOG, TARGET_R, predicted_R, expected_B)
    # 1 + 2 * 0.5 - 2 * 0.5 and 1.2 - 0.5 * 0.5 + 1 * 0.5
    assert found.value == pytest.approx((1.0 + 1.45) / 2)


def test_without_a_model_doubly_robust_is_ips() -> None:
    assert doubly_robust(LOG, TARGET_R, np.zeros(4), np.zeros(2)) == ips(LOG, TARGET_R)


def test_log_of_the_policy_itself_is_its_mean() -> None:
    plain = Estimate(1.0, 1.0, 1.0, 4.0)
    assert ips(LOG, LOG.propensities) == plain
    assert snips(LOG, LOG.propensities) == plain


def test_answers_of_different_lengths() -> None:
    """A place that only some answers have counts in those alone."""
    log = Logged(np.array([0, 2, 3]), np.array([0, 1, 0]), np.full(3, 0.5), np.ones(3))
    assert snips(log, np.full(3, 0.5)).value == pytest.approx(1.5)
    assert ips(log, np.full(3, 0.5)).value == pytest.approx(1.5)


def test_answer_with_nothing_shown_earns_nothing() -> None:
    log = Logged(np.array([0, 1, 1]), np.array([0]), np.array([0.5]), np.ones(1))
    assert ips(log, np.array([0.5])).value == pytest.approx(0.5)
    assert snips(log, np.array([0.5])).value == pytest.approx(0.5)


def test_one_answer_has_no_interval() -> None:
    log = Logged(np.array([0, 1]), np.array([0]), np.array([0.5]), np.ones(1))
    assert (ips(log, np.array([0.5])).low, ips(log, np.array([0.5])).high) == (-np.inf, np.inf)


def test_policy_over_a_pool() -> None:
    target_BKM = np.array([[[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]])
    np.testing.assert_allclose(shown_chances(target_BKM, np.array([[2, 1]])), [0.1, 0.8])
    reward_BKM = np.array([[[1.0, 0.0, 0.5], [0.5, 0.5, 0.5]]])
    np.testing.assert_allclose(expected_rewards(target_BKM, reward_BKM), [0.85 + 0.5])


Way = Callable[[Logged, NDArray, NDArray, NDArray], Estimate]
WAYS: dict[str, Way] = {
    "ips": lambda log, target_R, *_: ips(log, target_R),
    "snips": lambda log, target_R, *_: snips(log, target_R),
    "doubly_robust": doubly_robust,
}
PLACES, POOL = 2, 4


def experiment(seed: int, answers: int = 600) -> tuple[Logged, NDArray, NDArray, NDArray, float]:
    """Draw a log of places filled on their own; return it, the target's chances and the truth."""
    rng = np.random.default_rng(seed)
    reward_KM = np.array([[0.1, 0.3, 0.5, 0.7], [0.05, 0.1, 0.3, 0.4]])
    logging_KM = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    target_KM = logging_KM[:, ::-1]
    shown_BK = np.stack([rng.choice(POOL, size=answers, p=p) for p in logging_KM], axis=1)
    places = np.arange(PLACES)
    target_BKM = np.broadcast_to(target_KM, (answers, PLACES, POOL))
    # A model that is wrong everywhere.
    model_BKM = np.broadcast_to(reward_KM / 2 + 0.1, target_BKM.shape)
    log = Logged(
        np.arange(answers + 1) * PLACES,
        np.tile(places, answers),
        logging_KM[places, shown_BK].ravel(),
        (rng.random(shown_BK.shape) < reward_KM[places, shown_BK]).astype(float).ravel(),
    )
    target_R, predicted_R = (shown_chances(one, shown_BK) for one in (target_BKM, model_BKM))
    truth = float((target_KM * reward_KM).sum())
    return log, target_R, predicted_R, expected_rewards(target_BKM, model_BKM), truth


@pytest.mark.parametrize("name", WAYS)
def test_intervals_hold_the_truth(name: str) -> None:
    found, held = [], 0
    for seed in range(400):
        log, target_R, predicted_R, expected_B, truth = experiment(seed)
        estimate = WAYS[name](log, target_R, predicted_R, expected_B)
        found.append(estimate.value)
        held += estimate.low <= truth <= estimate.high
    assert np.mean(found) == pytest.approx(truth, abs=4 * float(np.std(found)) / 20)
    assert 0.92 <= held / 400 <= 0.98


def test_few_large_weights_widen_the_interval_upwards() -> None:
    """Where the log holds what the policy shows in few answers: the normal one is too low."""
    held = {"normal": 0, "ours": 0}
    rng, answers, rare, chance = np.random.default_rng(0), 1_000, 0.01, 0.8
    for _ in range(400):
        shown = rng.random(answers) < rare
        rewards = (rng.random(answers) < chance).astype(float)
        log = Logged(
            np.arange(answers + 1),
            np.zeros(answers, np.int64),
            np.where(shown, rare, 1 - rare),
            rewards,
        )
        found = ips(log, np.where(shown, 1.0, 0.0))
        half = 1.96 * (shown * rewards / rare).std(ddof=1) / answers**0.5
        held["normal"] += abs(found.value - chance) <= half
        held["ours"] += found.low <= chance <= found.high
    assert held["normal"] / 400 < 0.93
    assert 0.93 < held["ours"] / 400 < 0.99


def test_a_good_model_narrows_the_interval() -> None:
    log, target_R, predicted_R, expected_B, _ = experiment(0)
    wide, narrow = ips(log, target_R), doubly_robust(log, target_R, predicted_R, expected_B)
    assert narrow.high - narrow.low < wide.high - wide.low


@pytest.mark.parametrize(
    ("propensities", "message"),
    [
        ([0.5, np.nan, 0.5, np.nan], "2 of 4 shown items have no propensity"),
        ([0.5, 0.0, 0.5, 0.5], "1 of 4 shown items have a propensity of 0 or less"),
        ([0.5, -0.1, 0.5, 0.5], "1 of 4 shown items have a propensity of 0 or less"),
        ([0.5, 1.5, 0.5, 0.5], "1 of 4 shown items have a propensity above 1"),
    ],
)
def test_wrong_propensities_are_refused(propensities: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(LOG, propensities=np.array(propensities))


def test_other_wrong_inputs_are_refused() -> None:
    nothing = np.zeros(0)
    with pytest.raises(InputError, match="no logged answers"):
        Logged(np.array([0]), nothing.astype(int), nothing, nothing)
    with pytest.raises(InputError, match="1 of 4 shown items have no reward"):
        replace(LOG, rewards=np.array([1.0, np.nan, 0.0, 0.0]))
    with pytest.raises(InputError, match="2 of 4 shown items have no position"):
        replace(LOG, positions=np.array([0, -1, 0, -1]))
    with pytest.raises(InputError, match="not between 0 and 1"):
        ips(LOG, np.array([1.0, 2.0, 0.5, 0.5]))
    with pytest.raises(InputError, match="not between 0 and 1"):
        snips(LOG, np.array([1.0, np.nan, 0.5, 0.5]))
    with pytest.raises(InputError, match="no predicted reward"):
        doubly_robust(LOG, TARGET_R, np.full(4, np.nan), np.ones(2))


def test_nothing_in_common_with_the_log_is_said() -> None:
    with pytest.raises(InputError, match="1 of 2 places show only items that the target"):
        snips(LOG, np.array([0.0, 0.5, 0.0, 0.5]))
