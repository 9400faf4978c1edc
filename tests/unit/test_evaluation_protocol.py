"""The protocol: who is asked what, what is removed, what is kept from a scorer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_datasets import FixedScores, write_dataset
from torch import nn

from recsys.data.dataset import Dataset
from recsys.evaluation.baselines import ItemKNN, Popularity
from recsys.evaluation.protocol import Evaluation, evaluate, popularity_buckets, requests
from recsys.evaluation.report import report_table, slices_table
from recsys.evaluation.scorers import ModelScorer
from recsys.schema import InputError

TEMPORAL = {"rule": "temporal", "validation_from": 100, "test_from": 200}


def random_items(seed: int, users: int = 60, items: int = 25) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, items + 1, rng.integers(3, 20)).tolist() for _ in range(users)]


def reference(
    dataset: Dataset, scores_UN: np.ndarray, part: str, exclude_seen: bool
) -> dict[str, float]:
    """Loop over users and items, one at a time."""
    found: list[float] = []
    tops = set()
    for user in range(dataset.num_users):
        place = getattr(dataset.split, part)[user]
        if place < 0:
            continue
        start = dataset.offsets[user]
        history = dataset.events["items"][start : start + place].tolist()
        target = int(dataset.events["items"][start + place])
        removed = set(history) - {target} if exclude_seen else set()
        candidates = [i for i in range(1, dataset.num_items + 1) if i not in removed]
        mine = scores_UN[user, target]
        above = sum(scores_UN[user, i] > mine for i in candidates)
        tied = sum(scores_UN[user, i] == mine for i in candidates) - 1
        found.append(1 + above + tied / 2)
        tops |= set(sorted(candidates, key=lambda i: -scores_UN[user, i])[:5])
    gains = [1 / np.log2(rank + 1) if rank <= 5 else 0 for rank in found]
    return {
        "recall@5": float(np.mean([rank <= 5 for rank in found])),
        "ndcg@5": float(np.mean(gains)),
        "mrr@5": float(np.mean([1 / rank if rank <= 5 else 0 for rank in found])),
        "coverage@5": len(tops) / dataset.num_items,
    }


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("batch_size", [7, 512])
def test_equals_an_obvious_loop(
    tmp_path: Path, exclude_seen: bool, part: str, batch_size: int
) -> None:
    dataset = write_dataset(tmp_path / "random", random_items(0), num_items=25)
    scores_UN = np.random.default_rng(1).permuted(np.tile(np.arange(26), (60, 1)), axis=1)
    evaluation = evaluate(
        dataset, FixedScores(scores_UN), part, exclude_seen=exclude_seen, batch_size=batch_size
    )
    for name, value in reference(dataset, scores_UN, part, exclude_seen).items():
        assert evaluation.metrics[name] == pytest.approx(value), name
    prefix = "with_seen" if exclude_seen else "without_seen"
    other = reference(dataset, scores_UN, part, not exclude_seen)
    assert evaluation.metrics[f"{prefix}/ndcg@5"] == pytest.approx(other["ndcg@5"])


def test_ties_equal_the_loop(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "ties", random_items(2), num_items=25)
    scores_UN = np.random.default_rng(3).integers(0, 4, (60, 26))
    metrics = evaluate(dataset, FixedScores(scores_UN), "test").metrics
    expected = reference(dataset, scores_UN, "test", True)
    assert metrics["mrr@5"] == pytest.approx(expected["mrr@5"])


def test_fast_path_gives_the_same_ranks(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "fast", random_items(4), num_items=25)
    scorer = FixedScores(np.random.default_rng(5).normal(size=(60, 26)))
    fast, whole = (evaluate(dataset, scorer, "test", details=d) for d in (False, True))
    assert fast.per_user is None
    assert not fast.slices
    assert fast.metrics.items() <= whole.metrics.items()
    assert set(whole.metrics) - set(fast.metrics) == {
        f"{name}@{k}" for name in ("coverage", "popularity") for k in (1, 5, 10, 20, 50, 100)
    }


def test_a_repeated_target_stays_a_candidate(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "repeat", [[1, 2, 2, 3, 1]], num_items=4)
    scores = FixedScores(np.array([[9, 2, 8, 7, 1]]))
    evaluation = evaluate(dataset, scores, "test")
    assert evaluation.per_user["rank"].to_pylist() == [1.0]
    assert evaluation.per_user["rank_with_seen"].to_pylist() == [3.0]
    # What is left to recommend: the target and item 4, of 4 items.
    assert evaluation.metrics["coverage@10"] == 0.5


def test_popularity_of_recommended_items(tmp_path: Path) -> None:
    # Training: item 1 twice, item 2 once, item 5 once; each user's last two are held out.
    dataset = write_dataset(tmp_path / "share", [[1, 2, 3, 4], [1, 5, 3, 4]], num_items=5)
    scores = FixedScores(np.array([[0, 5, 1, 2, 3, 4], [0, 5, 4, 2, 3, 1]]))
    metrics = evaluate(dataset, scores, "test", exclude_seen=False, ks=(1, 2)).metrics
    assert metrics["popularity@1"] == pytest.approx(2 / 4)
    assert metrics["popularity@2"] == pytest.approx((2 + 1 + 2 + 1) / 4 / 4)
    assert metrics["coverage@2"] == pytest.approx(3 / 5)


def test_a_scorer_sees_only_the_past(tmp_path: Path) -> None:
    items = [[1, 2, 3, 4, 5], [5, 4, 3, 2]]
    times = [[10, 20, 110, 210, 220], [30, 120, 130, 240]]
    dataset = write_dataset(tmp_path / "past", items, times, TEMPORAL)
    scorer = FixedScores(np.zeros((2, 6)))
    evaluate(dataset, scorer, "test")
    (batch,) = scorer.batches
    assert batch.users.tolist() == [1, 0]  # short histories first
    assert batch.histories.items.tolist() == [5, 4, 3, 1, 2, 3, 4]
    assert batch.now.tolist() == [240, 220]
    assert (batch.histories.times < np.repeat(batch.now, batch.histories.lengths)).all()
    assert not hasattr(batch, "targets")


@pytest.mark.parametrize("part", ["validation", "test"])
def test_changing_the_future_changes_no_score(tmp_path: Path, part: str) -> None:
    rng = np.random.default_rng(6)
    items = random_items(7)
    times = [np.sort(rng.choice(300, len(one), replace=False)).tolist() for one in items]
    dataset = write_dataset(tmp_path / "before", items, times, TEMPORAL, num_items=25)
    asked = requests(dataset, part)
    ends = dict(zip(asked.users.tolist(), asked.places.tolist(), strict=True))
    # From the target on, everything differs; the target itself is given to no scorer.
    changed = [
        one[:end] + rng.permutation(25)[: len(one) - end].tolist()
        for one, end in ((one, ends.get(u, len(one))) for u, one in enumerate(items))
    ]
    changed = [[max(1, i) for i in one] for one in changed]
    altered = write_dataset(tmp_path / "after", changed, times, TEMPORAL, num_items=25)
    for scorer in (Popularity, lambda d: Popularity(d, recent_days=1e-6), ItemKNN):
        seen = [_all_scores(d, scorer(d), part) for d in (dataset, altered)]
        assert torch.equal(*seen)


def _all_scores(dataset: Dataset, scorer: object, part: str) -> torch.Tensor:
    kept, users = [], []

    class Recorder:
        name = "recorder"

        def score(self, batch: object) -> torch.Tensor:
            kept.append(scorer.score(batch).clone())
            users.append(torch.from_numpy(batch.users))
            return kept[-1]

    evaluate(dataset, Recorder(), part)
    return torch.cat(kept)[torch.cat(users).argsort()]


def test_slices_are_a_partition_of_the_users(tmp_path: Path) -> None:
    items = [[1, 1, 1, 2], [1, 2, 3, 4], [3, 1, 2]]
    times = [[1, 2, 3, 210], [4, 5, 110, 220], [110, 120, 230]]
    dataset = write_dataset(tmp_path / "slices", items, times, TEMPORAL)
    scores = FixedScores(np.tile([0, 4, 3, 2, 1], (3, 1)))
    evaluation = evaluate(dataset, scores, "test", exclude_seen=False)
    users = {
        group: {bucket: values["users"] for bucket, values in buckets.items()}
        for group, buckets in evaluation.slices.items()
    }
    # Training: item 1 four times, item 2 once, items 3 and 4 never. User 2 has no training event.
    assert users == {
        "history": {"0-4": 3},
        "item": {"tail": 2, "newcomer": 1},
        "user": {"known": 2, "newcomer": 1},
    }
    assert evaluation.slices["item"]["newcomer"]["mrr@10"] == pytest.approx(1 / 4)
    assert evaluation.slices["item"]["tail"]["mrr@10"] == pytest.approx(1 / 2)
    assert evaluation.per_user["user_bucket"].to_pylist() == ["known", "known", "newcomer"]


def test_popularity_buckets_hold_a_third_each() -> None:
    counts_N = np.array([4, 4, 4, 1, 1, 1, 1, 0])
    labels = popularity_buckets(counts_N).tolist()
    assert labels == ["head", "head", "middle", *["tail"] * 4, "newcomer"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "saved", random_items(8), num_items=25)
    evaluation = evaluate(dataset, Popularity(dataset), "test")
    evaluation.save(tmp_path / "ranks.parquet")
    loaded = Evaluation.load(tmp_path / "ranks.parquet")
    assert loaded.per_user.equals(evaluation.per_user)
    assert loaded.protocol == evaluation.protocol
    assert (loaded.metrics, loaded.slices) == (evaluation.metrics, evaluation.slices)
    assert loaded.per_user["user_id"][3].as_py() == "user 3"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ranks.parquet", "saved"]


def test_loading_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Evaluation.load(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(InputError, match="not Parquet"):
        Evaluation.load(tmp_path / "text.parquet")
    dataset = write_dataset(tmp_path / "other", [[1, 2, 3]])
    pq.write_table(dataset.items, tmp_path / "items.parquet")
    with pytest.raises(InputError, match="no per-user ranks"):
        Evaluation.load(tmp_path / "items.parquet")


def test_what_a_user_can_get_wrong(tmp_path: Path) -> None:
    short = write_dataset(tmp_path / "short", [[1, 2], [2]])
    with pytest.raises(InputError, match="no user has a test event"):
        evaluate(short, Popularity(short), "test")
    dataset = write_dataset(tmp_path / "fine", [[1, 2, 3]])
    with pytest.raises(InputError, match="cannot evaluate on 'train'"):
        evaluate(dataset, Popularity(dataset), "train")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ks="):
        evaluate(dataset, Popularity(dataset), "test", ks=(0,))
    with pytest.raises(InputError, match="batch_size=0"):
        evaluate(dataset, Popularity(dataset), "test", batch_size=0)
    with pytest.raises(InputError, match=r"scores of shape \(1, 9\), expected \(1, 4\)"):
        evaluate(dataset, FixedScores(np.zeros((1, 9))), "test")
    with pytest.raises(InputError, match="NaN"):
        evaluate(dataset, FixedScores(np.full((1, 4), np.nan)), "test")


class LastItems(nn.Module):
    """Two interests: the newest item's vector and a vector of the user."""

    inputs = ("items", "lengths", "users")
    max_length = 3

    def __init__(self, users: int, items: int, dim: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items + 1, dim)
        self.users = nn.Embedding(users + 1, dim)

    def forward(
        self, items_BL: torch.Tensor, lengths_B: torch.Tensor, users_B: torch.Tensor
    ) -> torch.Tensor:
        last_B = items_BL.gather(1, lengths_B[:, None] - 1)[:, 0]
        return torch.stack([self.items(last_B), self.users(users_B)], 1)

    def item_vectors(self) -> torch.Tensor:
        return self.items.weight


def test_model_scorer_takes_the_best_interest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    items = random_items(9)
    dataset = write_dataset(tmp_path / "model", items, num_items=25)
    model = LastItems(60, 25, 8).eval()
    scores_UN = _all_scores(dataset, ModelScorer(model), "test")
    vectors = model.items.weight.detach()
    for user in (0, 7, 59):
        query_HD = torch.stack([vectors[items[user][-2]], model.users.weight[user + 1].detach()])
        expected_N = (query_HD @ vectors.T).amax(0)
        assert torch.allclose(scores_UN[user], expected_N, atol=1e-5)


def test_model_scorer_gives_the_same_in_any_batch_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dataset = write_dataset(tmp_path / "batches", random_items(10), num_items=25)
    scorer = ModelScorer(LastItems(60, 25, 8).eval())
    small, large = (evaluate(dataset, scorer, "test", batch_size=b) for b in (7, 100))
    assert small.per_user.equals(large.per_user)
    assert small.metrics == pytest.approx(large.metrics)


def test_model_scorer_ignores_mixed_precision(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "mixed", random_items(11), num_items=25)
    scorer = ModelScorer(LastItems(60, 25, 8).eval())
    plain = _all_scores(dataset, scorer, "test")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_all_scores(dataset, scorer, "test"), plain)


def test_model_in_training_mode_is_refused() -> None:
    with pytest.raises(AssertionError, match="dropout"):
        ModelScorer(LastItems(1, 2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dataset = write_dataset(tmp_path / "cuda", random_items(12), num_items=25)
    model = LastItems(60, 25, 8).eval()
    here = evaluate(dataset, ModelScorer(model), "test").metrics
    assert evaluate(dataset, ModelScorer(model, "cuda"), "test").metrics == pytest.approx(here)


def test_tables_name_every_row(tmp_path: Path) -> None:
    from rich.console import Console

    dataset = write_dataset(tmp_path / "tables", random_items(13), num_items=25)
    rows = {s.name: evaluate(dataset, s, "test") for s in (Popularity(dataset), ItemKNN(dataset))}
    console = Console(width=100, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(report_table(rows))
    console.print(slices_table(rows["item-kNN"]))
    text = console.export_text()
    assert f"{rows['popularity'].metrics['ndcg@10']:.4f}" in text
    for expected in ("item-kNN", "recall", "coverage", "item head", "user known", "with seen"):
        assert expected in text
