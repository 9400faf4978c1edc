"""Paired bootstrap, comparison of runs, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_datasets import FixedScores, write_dataset

from recsys.artifacts import write_manifest
from recsys.data.dataset import Dataset
from recsys.evaluation import significance
from recsys.evaluation.plots import learning_curves, scorer_bars, slice_bars
from recsys.evaluation.protocol import Evaluation, evaluate
from recsys.evaluation.significance import bootstrap, compare, compare_evaluations
from recsys.schema import InputError


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    rng = np.random.default_rng(0)
    items = [rng.permutation(30)[: rng.integers(3, 12)] + 1 for _ in range(200)]
    return write_dataset(tmp_path / "shop", [one.tolist() for one in items], num_items=30)


def scorer(dataset: Dataset, strength: float, name: str) -> FixedScores:
    """Give noise, and the target a head start."""
    scores_UN = np.random.default_rng(1).normal(size=(dataset.num_users, dataset.num_items + 1))
    targets = np.asarray(dataset.events["items"])[dataset.offsets[1:] - 1]
    scores_UN[np.arange(dataset.num_users), targets] += strength
    return FixedScores(scores_UN, name)


def test_interval_of_a_known_distribution() -> None:
    # Half the users gain 1: the mean's standard error is 0.5 / sqrt(400) = 0.025.
    found = bootstrap(np.repeat([0.0, 1.0], 200))
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)
    assert found.p_value < 0.001


def test_both_ways_of_drawing_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).integers(-3, 5, 500) / 7
    by_value = bootstrap(values)
    monkeypatch.setattr(significance, "_by_value", significance._by_user)
    by_user = bootstrap(values)
    assert by_value != by_user
    assert by_value == pytest.approx(by_user, abs=0.004)


def test_seeded_and_symmetric() -> None:
    values = np.random.default_rng(3).normal(0.05, 1, 300)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)
    ours, theirs = bootstrap(values), bootstrap(-values)
    assert ours.low == pytest.approx(-theirs.high)
    assert ours.p_value == pytest.approx(theirs.p_value)


def test_no_difference_is_not_significant() -> None:
    assert bootstrap(np.zeros(50)) == (0, 0, 0, 1)


def test_p_is_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(4)
    found = [bootstrap(rng.normal(size=200), 400).p_value for _ in range(300)]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09


def test_the_better_scorer_is_told(dataset: Dataset) -> None:
    weak, strong = (
        evaluate(dataset, scorer(dataset, s, n), "test")
        for s, n in ((0.5, "weak"), (2.0, "strong"))
    )
    comparison = compare_evaluations(weak, strong, metrics=["ndcg@10"], resamples=1000)
    (row,) = comparison.rows
    assert row.right == pytest.approx(strong.metrics["ndcg@10"])
    assert row.difference.mean == pytest.approx(row.right - row.left)
    assert 0 < row.difference.low < row.difference.mean < row.difference.high
    assert comparison.as_dict()["rows"]["ndcg@10"]["difference"]["low"] == row.difference.low


def test_different_protocols_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    ours = scorer(dataset, 1, "ours")
    base = evaluate(dataset, ours, "test")
    with pytest.raises(InputError, match="differ in exclude_seen True and False"):
        compare_evaluations(base, evaluate(dataset, ours, "test", exclude_seen=False))
    with pytest.raises(InputError, match="part test and validation"):
        compare_evaluations(base, evaluate(dataset, ours, "validation"))
    other = write_dataset(tmp_path / "other", [[1, 2, 30]])
    with pytest.raises(InputError, match="dataset shop"):
        compare_evaluations(base, evaluate(other, scorer(other, 1, "theirs"), "test"))
    with pytest.raises(InputError, match="unknown metric"):
        compare_evaluations(base, base, metrics=["ndgc@10"])
    with pytest.raises(InputError, match="resamples=0"):
        compare_evaluations(base, base, resamples=0)


def run(path: Path, evaluation: Evaluation | None) -> Path:
    path.mkdir()
    if evaluation is not None:
        evaluation.save(path / "ranks-test.parquet")
    write_manifest(path, "run", name=path.name, model="trajectory")
    return path


def test_runs_on_disk(dataset: Dataset, tmp_path: Path) -> None:
    left = run(tmp_path / "first", evaluate(dataset, scorer(dataset, 0.5, "model"), "test"))
    right = run(tmp_path / "second", evaluate(dataset, scorer(dataset, 2.0, "model"), "test"))
    comparison = compare(left, right, metrics=["recall@10"], resamples=500)
    assert (comparison.left, comparison.right) == ("first", "second")
    assert _text(comparison.table()).count("better") == 1
    same = compare(left, left, metrics=["recall@10"], resamples=500)
    assert "unclear" in _text(same.table())
    with pytest.raises(InputError, match=r"no ranks-test.parquet.*recsys evaluate third"):
        compare(left, run(tmp_path / "third", None))
    with pytest.raises(InputError, match="not a run"):
        compare(left, tmp_path / "nowhere")


def _text(table: object) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(width=140, file=StringIO())
    console.print(table)
    return console.file.getvalue()


def is_picture(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_pictures(dataset: Dataset, tmp_path: Path) -> None:
    rows = {
        name: evaluate(dataset, scorer(dataset, strength, name), "test")
        for name, strength in (("popularity", 0.3), ("trajectory", 2.0))
    }
    history = [
        {"epoch": e, "train/loss": 5 / (e + 1), "validation/ndcg@10": e / 50} for e in range(9)
    ]
    draws: list[Callable[[Path], Path]] = [
        lambda path: learning_curves(history, path),
        lambda path: slice_bars(rows, path),
        lambda path: scorer_bars(rows, path),
    ]
    for place, draw in enumerate(draws):
        path = draw(tmp_path / "pictures" / f"{place}.png")
        assert is_picture(path)
    assert len(list((tmp_path / "pictures").iterdir())) == 3


def test_pictures_of_nothing(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metric to draw; met \['epoch'\]"):
        learning_curves([{"epoch": 0}], tmp_path / "none.png")
    fast = evaluate(dataset, scorer(dataset, 1, "fast"), "test", details=False)
    with pytest.raises(InputError, match="no slices"):
        slice_bars({"fast": fast}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
