"""The made-up catalogue: every item occurs, people stay in an aisle, and vectors tell it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from bench import aisles


def test_every_item_occurs_and_people_stay(tmp_path: Path) -> None:
    events = aisles.write_events(1_001, tmp_path / "events.parquet")
    table = pq.read_table(tmp_path / "events.parquet")
    items = np.array(table["item_id"].to_pylist()).astype(int)
    assert len(items) == events
    assert np.unique(items).tolist() == list(range(1, 1_002))
    users = np.array(table["user_id"].to_pylist()).astype(int)
    spread = [np.ptp(items[users == user]) for user in range(users.max() + 1)]
    assert max(spread) <= aisles.AISLE + aisles.OWN


def test_vectors_of_an_aisle_are_near() -> None:
    vectors_ND = aisles.vectors(np.arange(1, 2_001), 32)
    assert vectors_ND.std() == pytest.approx(0.02, rel=0.01)
    nearest = np.argsort(-vectors_ND @ vectors_ND[600])[:20]
    assert np.mean(nearest // aisles.AISLE == 600 // aisles.AISLE) > 0.8
    some = aisles.vectors(np.array([3, 1]), 8)
    assert some.shape == (2, 8)
