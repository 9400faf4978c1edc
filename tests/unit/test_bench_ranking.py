"""What the sides of bench_ranking.py share: codes, parts and the clock, with known answers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

from bench.ctr_rows import Clock, CtrRows, coded  # noqa: E402


def test_codes_are_of_training_rows() -> None:
    values, training = np.array([30, 10, 20, 10]), np.array([True, True, False, True])
    assert coded(values, training).tolist() == [3, 2, 1, 2]


def test_columns_of_a_part_and_saved_again(tmp_path: Path) -> None:
    ones = np.ones(3, np.int64)
    rows = CtrRows(
        part=np.array([0, 2, 2], np.int8),
        users=ones,
        items=np.array([2, 1, 2]),
        hours=ones,
        weekdays=ones,
        histories=np.zeros((3, 4), np.int32),
        lengths=0 * ones,
        ratings=np.array([[0, 0], [3, 0], [1, 2]], np.int32),
        labels=np.array([0, 1, 0], np.float32),
        item_genres=np.array([[0, 0], [0, 0], [2, 3]], np.int32),
    )
    rows.save(tmp_path / "rows.npz")
    test = CtrRows.load(str(tmp_path / "rows.npz")).columns("test")
    assert test["genres"].tolist() == [[0, 0], [2, 3]]
    assert test["ratings"].tolist() == [[3, 0], [1, 2]]
    assert test["label"].tolist() == [1, 0]
    sizes = {"user": 2, "item": 3, "genres": 4, "ratings": 4, "hour": 24, "weekday": 7}
    assert rows.sizes == sizes


def test_evaluation_is_left_out_of_the_clock() -> None:
    clock = Clock(now=iter([0.0, 5.0, 7.0, 12.0, 13.0, 20.0]).__next__)
    evaluate = clock.evaluation(lambda answer: answer)
    with clock.training():
        assert [evaluate("a"), evaluate("b")] == ["a", "b"]
    assert clock.seconds - clock.aside == pytest.approx(20 - 3)
    assert clock.epochs == 2
