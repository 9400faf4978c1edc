"""Baselines on datasets small enough to work the answer out by hand."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
from evaluation_datasets import write_dataset

from recsys.data.dataset import Dataset
from recsys.evaluation.baselines import (
    DAY,
    RECENT,
    ItemKNN,
    Popularity,
    baselines,
    neighbours,
    training_events,
)
from recsys.evaluation.protocol import evaluate
from recsys.evaluation.scorers import EvaluationBatch
from recsys.schema import InputError

# Training is all but each user's last two: 1 and 2 go together, as do 3 and 4.
AISLES = [[1, 2, 5, 6], [1, 2, 5, 6], [3, 4, 5, 6], [2, 5, 6], [3, 5, 6]]


@pytest.fixture
def aisles(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "aisles", AISLES, num_items=6)


def batch(dataset: Dataset, user: int, events: int) -> EvaluationBatch:
    users = np.array([user])
    return EvaluationBatch(users, dataset.histories(users, np.array([events])), np.array([99]))


def test_training_events_end_where_the_split_says(aisles: Dataset) -> None:
    events = training_events(aisles)
    assert events.users.tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
    assert events.items.tolist() == [1, 2, 1, 2, 3, 4, 2, 3]


def test_popularity_counts_training_events(aisles: Dataset) -> None:
    assert Popularity(aisles).score(batch(aisles, 0, 2)).tolist() == [[0, 2, 3, 2, 1, 0, 0]]


def test_recent_popularity(tmp_path: Path) -> None:
    times = [[0, 8 * DAY, 11 * DAY, 12 * DAY], [9 * DAY, 10 * DAY, 11 * DAY, 12 * DAY]]
    dataset = write_dataset(tmp_path / "recent", [[1, 2, 3, 3], [2, 1, 3, 3]], times)
    scorer = Popularity(dataset, recent_days=3)
    assert scorer.scores_N.tolist() == [0, 1, 2, 0]
    assert scorer.name == "popularity, 3 days"


def test_item_knn_by_hand(aisles: Dataset) -> None:
    # Users of 1: {0, 1}, of 2: {0, 1, 3}; two in common.
    scorer = ItemKNN(aisles, shrink=0)
    scores_N = scorer.score(batch(aisles, 0, 1))[0]
    assert scores_N[2].item() == pytest.approx(2 / np.sqrt(2 * 3), abs=1e-5)
    assert scores_N[[3, 4, 5, 6]].max().item() <= 1e-6
    shrunk = ItemKNN(aisles, shrink=2).score(batch(aisles, 0, 1))[0, 2].item()
    assert shrunk == pytest.approx(2 / (np.sqrt(2 * 3) + 2), abs=1e-5)


def test_item_knn_breaks_ties_by_popularity(aisles: Dataset) -> None:
    scores_N = ItemKNN(aisles).score(batch(aisles, 2, 1))[0]
    order = torch.argsort(scores_N, descending=True)[:3].tolist()
    assert order == [4, 2, 1] or order == [4, 2, 3]


def test_item_knn_decay_prefers_the_newest(tmp_path: Path) -> None:
    pairs = [[1, 3, 9, 9], [1, 3, 9, 9], [2, 4, 9, 9], [2, 4, 9, 9], [1, 2, 9, 9]]
    dataset = write_dataset(tmp_path / "decay", pairs)
    plain = ItemKNN(dataset)
    decayed = plain.with_decay(0.5)
    asked = batch(dataset, 4, 2)
    even, tilted = plain.score(asked)[0], decayed.score(asked)[0]
    assert even[3].item() == pytest.approx(even[4].item())
    assert tilted[4].item() == pytest.approx(even[4].item(), abs=1e-5)
    assert tilted[3].item() == pytest.approx(even[3].item() / 2, abs=1e-5)
    assert (plain.name, decayed.name) == ("item-kNN", "item-kNN, decay 0.5")


def test_neighbours_equal_dense_cosines() -> None:
    from scipy import sparse

    taken_UN = np.random.default_rng(0).integers(0, 2, (40, 2500)).astype(np.float32)
    taken_UN[:, 5] = 0
    found = neighbours(sparse.csr_array(taken_UN), k=7, shrink=3).toarray()
    common = taken_UN.T @ taken_UN
    norms = np.sqrt(np.diag(common))
    dense = common / (np.outer(norms, norms) + 3)
    np.fill_diagonal(dense, 0)
    assert ((found > 0).sum(1)[:5] == 7).all()
    assert not found[5].any()
    best = np.sort(dense, axis=1)[:, ::-1][:, :7]
    assert np.allclose(np.sort(found, axis=1)[:, ::-1][:, :7], best, atol=1e-6)


def test_withheld_items_of_aisles_rank_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    aisle = [np.arange(1, 11), np.arange(11, 21)]
    users = [rng.permutation(aisle[u % 2]).tolist() for u in range(60)]
    dataset = write_dataset(tmp_path / "two", users)
    knn = evaluate(dataset, ItemKNN(dataset), "test")
    # The only item of the aisle that is not in the history.
    assert knn.metrics["recall@1"] == 1
    assert evaluate(dataset, Popularity(dataset), "test").metrics["recall@1"] < 0.9


def test_one_item_and_empty_training(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "one", [[1, 1, 1]])
    for scorer in baselines(dataset):
        assert evaluate(dataset, scorer, "test").metrics["recall@1"] == 1
    assert [s.name for s in baselines(dataset)][-1] == f"item-kNN, decay {RECENT}"


def test_bad_settings(aisles: Dataset) -> None:
    with pytest.raises(InputError, match="has no times"):
        Popularity(aisles, recent_days=3)
    for name, value in (("k_neighbours", 0), ("shrink", -1.0), ("decay", 0.0), ("decay", 1.5)):
        with pytest.raises(InputError, match=name):
            ItemKNN(aisles, **{name: value})


def test_beauty_is_evaluated_in_seconds(tmp_path: Path) -> None:
    file = Path(__file__).parents[2].parent / "shared" / "data" / "amazon_beauty.txt"
    if not file.is_file():
        pytest.skip(f"real data absent: {file}")
    users = [line.split()[1:] for line in file.read_text().splitlines()]
    index = {item: n + 1 for n, item in enumerate(sorted({i for one in users for i in one}))}
    dataset = write_dataset(tmp_path / "beauty", [[index[i] for i in one] for one in users])
    started = perf_counter()
    metrics = evaluate(dataset, ItemKNN(dataset, shrink=0), "test", details=False).metrics
    assert perf_counter() - started < 60
    assert metrics["ndcg@10"] == pytest.approx(0.0316, abs=0.0005)
