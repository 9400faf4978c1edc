"""Seeded trainings on tiny data keep their losses: each layer with the full softmax, each loss.

After a change that is meant to move them: python tests/unit/test_golden_losses.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys import losses
from recsys.data.catalogue import Catalogue
from recsys.history import Histories, pack
from recsys.losses import ItemSide
from recsys.models import Trajectory
from recsys.models.layers import Attention, Filtered, Gated, Hstu, Recurrent

GOLDEN = Path(__file__).with_name("golden_losses.json")
ITEMS, STEPS = 30, 40
LAYERS = {
    "attention": partial(Attention, products="fp32"),
    "attention bf16": partial(Attention, products="bf16"),
    "rotary": partial(Attention, rotary=True, products="fp32"),
    "post-norm": partial(Attention, norm="post", products="fp32"),
    "filtered": partial(Filtered, products="fp32"),
    "gated": partial(Gated, products="fp32"),
    "hstu": Hstu,
    "recurrent": Recurrent,
}
LOSSES = {
    "full_softmax": partial(losses.full_softmax, products="fp32"),
    "full_softmax bf16": partial(losses.full_softmax, products="bf16"),
    "sampled_softmax": partial(losses.sampled_softmax, negatives=16),
    "in_batch_softmax": partial(losses.in_batch_softmax, temperature=1.0),
    "bce": partial(losses.bce, negatives=8),
    "gbce": partial(losses.gbce, negatives=16),
}
PAIRS = [f"{layer} × full_softmax" for layer in LAYERS] + [f"attention × {loss}" for loss in LOSSES]
PAIRS += ["filtered × sampled_softmax", "hstu × gbce", "3 interests × full_softmax"]


def paths() -> Histories:
    """Return paths that walk up a ring of items: what follows is nearly always known."""
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, ITEMS, 40), rng.integers(3, 9, 40)
    return Histories.of(
        [
            ((s + np.arange(n)) % ITEMS + 1, rng.integers(1, 5, n), np.arange(n) * 60_000)
            for s, n in zip(starts, lengths, strict=True)
        ]
    )


def trained(pair: str) -> list[float]:
    """Return the first and the last loss of a seeded training."""
    layer, _, loss = pair.partition(" × ")
    torch.manual_seed(0)
    counts = np.concatenate([[0], np.ones(ITEMS)])
    catalogue = Catalogue(ITEMS, 40, counts, has_time=True, has_types=True)
    more: dict[str, Any] = {"layer": LAYERS.get(layer, LAYERS["attention"])}
    more |= {"interests": 3} if layer == "3 interests" else {}
    model = Trajectory(catalogue, 8, 16, dropout=0.1, **more)
    return _losses(model, LOSSES[loss])


def _losses(model: Trajectory, loss: Callable[..., torch.Tensor]) -> list[float]:
    batch = {name: torch.from_numpy(array) for name, array in pack(paths(), 8).items()}
    share = torch.cat([torch.zeros(1), torch.full((ITEMS,), 1 / ITEMS)])
    side = ItemSide(model.item_vectors, model.vectors_of, share)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = []
    for _ in range(STEPS):
        value = loss(*model.training_pairs(batch), side)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(float(value.detach()))
    return [seen[0], seen[-1]]


@pytest.mark.parametrize("pair", PAIRS)
def test_loss_is_what_it_was(pair: str) -> None:
    first, last = trained(pair)
    golden_first, golden_last = json.loads(GOLDEN.read_text())[pair]
    assert first == pytest.approx(golden_first, rel=0.002)
    assert last == pytest.approx(golden_last, rel=0.05)
    assert last < first / 1.3


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({pair: trained(pair) for pair in PAIRS}, indent=1) + "\n")
