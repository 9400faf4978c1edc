"""Item vectors from co-occurrence: neighbours near, only training events, any width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_datasets import write_dataset

from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset
from recsys.models import Trajectory
from recsys.schema import InputError
from recsys.training.start import cooccurrence_vectors, neighbourhood, start_items

ITEMS = 12


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Half of the users stay among the first six items, the others among the last six."""
    rng = np.random.default_rng(0)
    items = [(rng.integers(1, 7, 10) + 6 * (user % 2)).tolist() for user in range(60)]
    return write_dataset(tmp_path / "halves", items, num_items=ITEMS)


def test_items_that_meet_point_the_same_way(dataset: Dataset) -> None:
    vectors_ND = cooccurrence_vectors(dataset, 4)
    products_NN = vectors_ND @ vectors_ND.T
    same = np.arange(ITEMS)[:, None] // 6 == np.arange(ITEMS) // 6
    assert vectors_ND.dtype == np.float32
    assert products_NN[same].mean() > 10 * abs(products_NN[~same].mean())


def test_the_held_out_events_are_not_read(dataset: Dataset) -> None:
    trained, users = int(dataset.split.train_end.sum()), dataset.num_users
    expected = sum((trained - apart * users) / apart for apart in (1, 2, 3))
    assert neighbourhood(dataset).sum() == pytest.approx(2 * expected)


@pytest.mark.parametrize("dim", [3, ITEMS - 1, 40])
def test_any_width(dataset: Dataset, dim: int) -> None:
    model = Trajectory(Catalogue.of(dataset), 5, dim + dim % 2)
    start_items(model, dataset, "cooccurrence")
    weight = model.items.weight.detach()
    assert torch.equal(weight[0], torch.zeros(len(weight[0])))
    assert weight[1:].std().item() == pytest.approx(0.02, rel=0.05)


def test_an_unknown_start_is_refused(dataset: Dataset) -> None:
    model = Trajectory(Catalogue.of(dataset), 5, 8)
    with pytest.raises(InputError, match="item_start=zeros: expected random or cooccurrence"):
        start_items(model, dataset, "zeros")  # type: ignore[arg-type]
