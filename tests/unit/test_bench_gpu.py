"""What the GPU benchmark counts, makes and times, with known answers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path += [str(SCRIPTS), str(SCRIPTS / "bench")]

import step_clock  # noqa: E402

from bench import made  # noqa: E402
from bench_gpu import SMALL, Sizes, derived, flops  # noqa: E402


def test_flops_by_hand() -> None:
    # Weights 4·2·2 + 2·2·3 = 28, attention 2·6 = 12, then 7 candidates of 2 numbers.
    sizes = Sizes(dim=2, layers=1, feedforward=3, length=5, items=7, negatives=6)
    assert flops(sizes, "full_softmax, bf16") == 6 * (28 + 12 + 14) == 324
    assert flops(sizes, "sampled_softmax") == 324
    assert flops(replace(sizes, layers=2, negatives=1), "sampled_softmax") == 6 * (80 + 4)


def test_every_item_occurs_and_few_occur_often() -> None:
    data = made.sequences(users=200, items=500, length=20)
    counts = np.bincount(data.items, minlength=501)[1:]
    assert counts.min() >= 1
    assert counts[:50].sum() > 0.4 * len(data.items)
    assert data.positions(longest=20) == 200 * 20
    with pytest.raises(ValueError, match="cannot hold 500 items"):
        made.sequences(users=2, items=500, length=20)


def test_lines_are_the_sequences(tmp_path: Path) -> None:
    data = made.sequences(users=3, items=5, length=4)
    made.write(data, tmp_path / "made.txt")
    first = (tmp_path / "made.txt").read_text().splitlines()[0].split()
    assert first == ["1", *map(str, data.items[:7])]


def test_the_clock_times_a_block_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(step_clock, "perf_counter", lambda: now)
    file = tmp_path / "block.json"
    watch = step_clock.StepClock(str(file), warm=1, steps=2)

    def fetch(wait: float) -> None:
        nonlocal now
        now += 3.0
        watch.start("something else")
        watch.start(step_clock.FETCH)
        now += wait
        watch.stop(step_clock.FETCH)

    for wait in (9.0, 9.0, 0.5):
        fetch(wait)
    with pytest.raises(KeyboardInterrupt):
        fetch(0.25)
    block = json.loads(file.read_text())
    assert (block["steps"], block["seconds"], block["waited"]) == (2, 6.75, 0.75)
    row = derived(block, SMALL, "full_softmax")
    assert row["positions_per_second"] == pytest.approx(2 * SMALL.positions / 6.75)
    assert row["waited_share"] == pytest.approx(1 / 9)
