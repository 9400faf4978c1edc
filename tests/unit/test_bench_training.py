"""What the sides of bench_training.py share: split, clock and quality, with known answers."""

from __future__ import annotations

import gzip
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from recsys.config import config_dir

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

from bench.alternating import AlternatingBatches  # noqa: E402
from bench.protocol import Meter, Sequences, Settings, quality  # noqa: E402
from bench.report import cells, ours_beside  # noqa: E402


@pytest.fixture
def sequences(tmp_path: Path) -> Sequences:
    file = tmp_path / "log.txt"
    file.write_text("ann a b c d\nbob b\ncid c a d\n")
    return Sequences.read(file, has_users=True)


def test_leave_one_out(sequences: Sequences) -> None:
    assert sequences.num_items == 4
    assert [part.tolist() for part in sequences.lists(held=2)] == [[1, 2], [2], [3]]
    assert sequences.flat(held=1)["items"].tolist() == [1, 2, 3, 2, 3, 1]
    assert sequences.tested.tolist() == [0, 2]
    assert sequences.targets.tolist() == [4, 4]


def test_positions_are_targets_with_an_earlier_event(sequences: Sequences) -> None:
    assert sequences.positions() == 1
    longer = Sequences(np.arange(9), np.array([0, 9]), np.array(["u"]), np.arange(9).astype(str))
    assert (longer.positions(), longer.positions(longest=4)) == (6, 4)


def test_lines_of_items_only_and_saved_again(tmp_path: Path) -> None:
    file = tmp_path / "log.txt.gz"
    file.write_bytes(gzip.compress(b"7 8\n\n8 9 7\n"))
    read = Sequences.read(file, has_users=False)
    assert read.user_ids.tolist() == ["1", "3"]
    read.save(tmp_path / "log.npz")
    again = Sequences.load(str(tmp_path / "log.npz"))
    assert again.items.tolist() == read.items.tolist() == [1, 2, 2, 3, 1]


def test_quality_by_hand() -> None:
    lists = np.array([[5, 6, 7], [1, 2, 3], [1, 2, 3], [0, 0, 0]])
    found = quality(lists, np.array([5, 3, 9, 4]))
    assert found == pytest.approx({"recall": 2 / 4, "ndcg": (1 + 1 / 2) / 4})


def test_meter_stops_its_clock_while_it_ranks(tmp_path: Path) -> None:
    moment = 0.0

    def rank() -> np.ndarray:
        nonlocal moment
        moment += 100
        return np.zeros((1, 10), np.int64)

    settings = Settings("", str(tmp_path), length=5, dropout=0.0, seconds=4, points=2)
    meter = Meter(settings, rank, now=lambda: moment)
    goes_on = True
    while goes_on:
        moment += 1
        goes_on = meter.step(50)
    result = meter.result(epoch_positions=1000)
    assert [point["seconds"] for point in result["points"]] == [2, 4]
    assert result["positions_per_second"] == 50  # without the first step, which warms up
    assert (result["epochs"], result["epoch_seconds"], result["rank_seconds"]) == (0.2, 20, 100)


def test_ratio_is_ours_over_theirs_in_the_same_round() -> None:
    row = {"dataset": "d", "side": "recsys train", "loss": "full_softmax", "round": 1}
    ours = {**row, "positions_per_second": 30.0, "epoch_seconds": 1.0}
    other = {**ours, "side": "other", "positions_per_second": 10.0}
    again = [{**ours, "round": 2, "positions_per_second": 50.0}, {**other, "round": 2}]
    assert ours_beside(other, [ours, other, *again], "full_softmax") == 3
    assert ours_beside(again[1], [ours, other, *again], "full_softmax") == 5
    assert ours_beside(other, [ours, other], "sampled_softmax") is None
    assert ours_beside(ours, [ours, other], "full_softmax") is None
    failed = {**other, "error": "not installed"}
    assert ours_beside(failed, [ours, failed], "full_softmax") is None
    found = cells([other, again[1]], [ours, other, *again])
    assert found[:3] == ["10", "4.00× (3.0 to 5.0)", ""]
    assert cells([failed], [ours, failed]) == ["none"]


def test_the_batches_that_time_steps_take_all_settings_of_those_that_train() -> None:
    """What a config sets reaches both, so that the bare loop's batches are the same."""
    settings = OmegaConf.load(config_dir() / "batches" / "packed.yaml")
    known = signature(AlternatingBatches.__init__).parameters
    assert {str(name) for name in settings if not str(name).startswith("_")} <= known.keys()
