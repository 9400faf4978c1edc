"""Calibration of known distortions, its graph, permutation importance, and their pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recsys.evaluation.calibration import (
    METHODS,
    MOST_KNOTS,
    Calibration,
    calibrate,
    calibrated,
    fit_isotonic,
    fit_platt,
    fit_temperature,
    put,
    sigmoid,
)
from recsys.evaluation.importance import Drop, Place, importance
from recsys.evaluation.task_plots import importance_plot, reliability_plot
from recsys.models.calibration import Calibration as Graph
from recsys.schema import InputError
from recsys.task_metrics import auc, ece, log_loss

ROWS = 40_000


def shown(scale: float, shift: float, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Give logits whose truth is scale * logit + shift, and labels drawn by that truth."""
    rng = np.random.default_rng(seed)
    logit_R = rng.normal(0, 1.5, ROWS)
    return logit_R, (rng.random(ROWS) < sigmoid(scale * logit_R + shift)).astype(np.float32)


@pytest.fixture
def bent() -> tuple[NDArray, NDArray]:
    """Logits that no line puts right: those above 0 mean half as much."""
    rng = np.random.default_rng(1)
    logit_R = rng.normal(0, 2, ROWS)
    truth_R = np.where(logit_R > 0, logit_R / 2, 2 * logit_R) - 1
    return logit_R, (rng.random(ROWS) < sigmoid(truth_R)).astype(np.float32)


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (0.5, 0), (2.0, -3.0), (0.3, 1.5)])
def test_platt_finds_the_truth(scale: float, shift: float) -> None:
    found = fit_platt(*shown(scale, shift))
    assert found.scale == pytest.approx(scale, abs=0.06)
    assert found.shift == pytest.approx(shift, abs=0.06)


def test_platt_is_at_the_minimum() -> None:
    logit_R, label_R = shown(0.7, -1.0)
    found = fit_platt(logit_R, label_R)
    error_R = sigmoid(found(logit_R)) - label_R
    # The gradient of the log loss, but for the weight of one row.
    assert abs(error_R.sum()) < 2
    assert abs(error_R @ logit_R) < 2


def test_temperature_scales_alone() -> None:
    found = fit_temperature(*shown(0.4, 0.0))
    assert found.scale == pytest.approx(0.4, abs=0.03)
    assert found(np.zeros(1)) == 0


def test_parted_classes_stay_finite() -> None:
    logit_R = np.array([-2.0, -1.0, 1.0, 2.0])
    for fit in METHODS.values():
        found = fit(logit_R, np.array([0, 0, 1, 1]))(np.array([-100.0, 0.0, 100.0]))
        assert np.isfinite(found).all()
        assert (np.diff(found) > 0).all()


def test_a_ranker_worse_than_chance_is_flattened_not_turned() -> None:
    logit_R, label_R = shown(-1.0, 0.5)
    for fit in (fit_platt, fit_temperature, fit_isotonic):
        found = fit(logit_R, label_R)
        assert (np.diff(found(np.linspace(-3, 3, 50))) > 0).all()
    rate = label_R.mean()
    assert sigmoid(fit_platt(logit_R, label_R)(logit_R)).mean() == pytest.approx(rate, abs=0.01)


def test_isotonic_by_hand() -> None:
    # Rates .25, .5 and .75 rise already: each distinct logit is a pool of its own.
    logit_R = np.repeat([-1.0, 1.0, 3.0], 4)
    found = fit_isotonic(logit_R, np.array([0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0]))
    assert found.knots == pytest.approx((0, *sigmoid(np.array([-1, 1, 3])), 1))
    assert found.values == pytest.approx((0, 0.25, 0.5, 0.75, 1))


def test_isotonic_pools_violators() -> None:
    # .5 at -1, then .25 at 1: one pool of 3 in 8 at their mean probability, .5.
    found = fit_isotonic(np.repeat([-1.0, 1.0], 4), np.array([1, 0, 0, 1, 0, 1, 0, 0]))
    assert found.knots == pytest.approx((0, 0.5, 1))
    assert found.values == pytest.approx((0, 3 / 8, 1))


def test_isotonic_has_few_knots_and_straightens(bent: tuple[NDArray, NDArray]) -> None:
    logit_R, label_R = bent
    train, test = slice(0, ROWS // 2), slice(ROWS // 2, ROWS)
    found = fit_isotonic(logit_R[train], label_R[train])
    platt = fit_platt(logit_R[train], label_R[train])
    assert 10 < len(found.knots) <= MOST_KNOTS
    by_isotonic, by_platt = (ece(sigmoid(c(logit_R[test])), label_R[test]) for c in (found, platt))
    assert by_isotonic < by_platt / 2, (by_isotonic, by_platt)


def test_order_of_items_is_kept(bent: tuple[NDArray, NDArray]) -> None:
    logit_R, label_R = bent
    for method, fit in METHODS.items():
        after_R = fit(logit_R, label_R)(logit_R)
        assert auc(after_R, label_R) == pytest.approx(auc(logit_R, label_R), abs=1e-9), method
        assert (np.diff(after_R[np.argsort(logit_R)]) > 0).all()


def test_rare_positives_get_knots_too() -> None:
    rng = np.random.default_rng(2)
    logit_R = rng.normal(-6, 1.5, 200_000)
    label_R = (rng.random(len(logit_R)) < sigmoid(1.5 * logit_R + 1)).astype(float)
    found = fit_isotonic(logit_R, label_R)
    probability_R = sigmoid(found(logit_R))
    assert probability_R.mean() == pytest.approx(label_R.mean(), rel=0.03)
    high_R = logit_R > np.quantile(logit_R, 0.999)
    assert probability_R[high_R].mean() == pytest.approx(label_R[high_R].mean(), rel=0.15)


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_calibration_holds_on_other_rows(method: str) -> None:
    logit_R, label_R = shown(0.5, 0.0, seed=3)
    other_R, truth_R = shown(0.5, 0.0, seed=4)
    found = METHODS[method](logit_R, label_R)
    before, after = sigmoid(other_R), sigmoid(found(other_R))
    assert ece(before, truth_R) > 0.08
    assert ece(after, truth_R) < 0.015
    assert log_loss(after, truth_R) < log_loss(before, truth_R)


def test_each_task_has_its_own_method_and_labels() -> None:
    logit_R, label_R = shown(0.5, 0.0)
    unknown_R = np.where(np.arange(ROWS) % 2, label_R, np.nan)
    tasks = ["view", "cart", "dwell", "like", "purchase"]
    label_RT = np.stack([label_R, unknown_R, 9 * label_R, 0 * label_R, 0 * label_R + np.nan], 1)
    logit_RT = np.stack([logit_R] * 5, axis=1)
    found = calibrate(logit_RT, label_RT, tasks, {"view": "isotonic", "cart": "platt"})
    assert [fit.method for fit in found.values()] == ["isotonic", "platt", "none", "none", "none"]
    assert found["cart"] == fit_platt(logit_R[1::2], label_R[1::2])
    same = calibrate(logit_RT, label_RT, tasks, "temperature")
    methods = [fit.method for fit in same.values()]
    assert methods == ["temperature", "temperature", "none", "none", "none"]


def test_wrong_settings_are_named() -> None:
    rows = np.zeros((2, 1)), np.array([[0.0], [1.0]]), ["view"]
    with pytest.raises(InputError, match=r"'plat' of view; expected one of none, .*mean 'platt'"):
        calibrate(*rows, "plat")
    with pytest.raises(InputError, match=r"unknown task 'veiw'; the ranker has view.*mean 'view'"):
        calibrate(*rows, {"veiw": "platt"})
    with pytest.raises(InputError, match="1 of 2 logits are not finite"):
        calibrate(np.array([[0.0], [np.inf]]), *rows[1:])
    with pytest.raises(InputError, match="2 knots and 2 values, expected as many rising"):
        Calibration("isotonic", knots=(1.0, 1.0), values=(0.0, 1.0))


def test_json_round_trip() -> None:
    for fit in METHODS.values():
        found = fit(*shown(0.5, 0.2))
        values = json.loads(json.dumps(found.as_json()))
        assert Calibration.of_json(values) == found


def test_graph_answers_with_the_same(bent: tuple[NDArray, NDArray]) -> None:
    fits = {name: fit(*bent) for name, fit in METHODS.items()}
    graph = Graph(list(fits))
    put(fits, graph)
    logit_BCT = np.random.default_rng(5).normal(0, 4, (50, 7, len(fits))).astype(np.float32)
    found = graph(torch.from_numpy(logit_BCT)).numpy()
    np.testing.assert_allclose(found, sigmoid(calibrated(logit_BCT, fits)), atol=2e-6)
    assert graph.has_lines


def test_graph_without_lines_needs_none(bent: tuple[NDArray, NDArray]) -> None:
    graph = Graph(["view"])
    put({"view": fit_platt(*bent)}, graph)
    assert not graph.has_lines


@pytest.fixture
def requests() -> tuple[dict[str, NDArray], NDArray]:
    """300 requests with up to 4 items shown: `genres` and `hour` matter, the rest do not."""
    rng = np.random.default_rng(6)
    arrays = {
        "request_codes": rng.integers(0, 5, (300, 2)),
        "item_codes": rng.integers(0, 5, (300, 4, 3)),
        "lengths": rng.integers(0, 5, 300),
    }
    score_BC = arrays["item_codes"][..., 1:].sum(-1) + arrays["request_codes"][:, :1]
    label_BC = (score_BC + rng.normal(size=(300, 4)) > 6).astype(float)
    label_BC[rng.random((300, 4)) < 0.2] = np.nan
    return arrays, label_BC[..., None]


def score(arrays: dict[str, NDArray]) -> NDArray:
    of_item = arrays["item_codes"][..., 1:].sum(-1)
    return (of_item + arrays["request_codes"][:, :1])[..., None] / 12.0


COLUMNS = {
    "item_id": [Place("item_codes", 0, 1, shown=True)],
    "genres": [Place("item_codes", 1, 2, shown=True)],
    "hour": [Place("request_codes", 0, 1)],
    "region": [Place("request_codes", 1, 1), Place("lengths")],
}


def test_importance_is_of_what_the_ranker_reads(requests: tuple[dict, NDArray]) -> None:
    arrays, label_BCT = requests
    before = {name: array.copy() for name, array in arrays.items()}
    found = importance(score, arrays, label_BCT, ["view"], COLUMNS, seed=1)["view"]
    assert list(found)[:2] == ["genres", "hour"]
    assert found["genres"].mean > 0.2 > found["hour"].mean > 0.05
    assert found["item_id"] == found["region"] == Drop(0, 0)
    assert 0 < found["genres"].sd < 0.05
    assert found == importance(score, arrays, label_BCT, ["view"], COLUMNS, seed=1)["view"]
    for name, array in arrays.items():
        assert (array == before[name]).all(), "arrays given are left as they are"


def test_padding_is_not_dealt_out(requests: tuple[dict, NDArray]) -> None:
    arrays, label_BCT = requests
    padded_BC = np.isnan(label_BCT[..., 0])
    arrays["item_codes"][padded_BC] = -1

    def seen(given: dict[str, NDArray]) -> NDArray:
        assert (given["item_codes"][padded_BC] == -1).all()
        assert (given["item_codes"][~padded_BC] >= 0).all()
        return score(given)

    importance(seen, arrays, label_BCT, ["view"], COLUMNS, repeats=2)


def test_importance_of_seconds_is_a_rise_of_error(requests: tuple[dict, NDArray]) -> None:
    arrays, _ = requests
    label_BCT = score(arrays)
    found = importance(score, arrays, label_BCT, ["dwell"], COLUMNS)["dwell"]
    assert found["genres"].mean > 0.1
    assert found["item_id"].mean == 0


def test_wrong_place_is_named(requests: tuple[dict, NDArray]) -> None:
    arrays, label_BCT = requests
    rest = arrays, label_BCT, ["view"]
    with pytest.raises(
        InputError, match=r"'hour' .*'request_code'; .*did you mean 'request_codes'"
    ):
        importance(score, *rest, {"hour": [Place("request_code")]})
    with pytest.raises(
        InputError, match=r"'hour' .* end at place 3 of 'request_codes', which has 2"
    ):
        importance(score, *rest, {"hour": [Place("request_codes", 2, 1)]})
    with pytest.raises(InputError, match="repeats=0"):
        importance(score, *rest, COLUMNS, repeats=0)


def test_pictures_are_written(tmp_path: Path) -> None:
    logit_R, label_R = shown(0.5, -2.0)
    logit_RT, label_RT = np.stack([logit_R] * 2, 1), np.stack([label_R, 9 * label_R], 1)
    fits = calibrate(logit_RT, label_RT, ["view", "dwell"])
    given = {"before": sigmoid(logit_RT), "after": sigmoid(calibrated(logit_RT, fits))}
    drawn = reliability_plot(given, label_RT, ["view", "dwell"], tmp_path / "a" / "reliability.png")
    bars = importance_plot({"view": {"hour": Drop(0.1, 0.02)}}, tmp_path / "importance.png")
    for file in (drawn, bars):
        assert file.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="no binary task"):
        reliability_plot(given, label_RT * np.nan, ["view", "dwell"], tmp_path / "none.png")
    with pytest.raises(InputError, match="no column"):
        importance_plot({"view": {}}, tmp_path / "none.png")
