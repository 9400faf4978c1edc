"""Every shipped model: causal, batch equals single, inputs as the dataset has them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from recsys.data.catalogue import Catalogue, Codes
from recsys.history import Histories, encode, pack
from recsys.models import Trajectory, TwoTower
from recsys.models.layers import Attention, Filtered, Gated, Hstu, Path, Recurrent
from recsys.models.trajectory import HIDDEN_VALUES
from recsys.schema import InputError

N = 40


EVERYTHING = {"has_time": True, "has_types": True, "has_values": True}
NOTHING = dict.fromkeys(EVERYTHING, False)


def catalogue(**facts: Any) -> Catalogue:
    codes = Codes(np.arange(N + 1) % 3, 3)
    vectors = np.random.default_rng(0).normal(size=(N + 1, 5)).astype(np.float32)
    features = {
        "item_codes": {"category": codes},
        "user_codes": {"region": Codes(np.array([0, 1, 1]), 2)},
        "item_vectors": {"vector": vectors},
    }
    counts = np.concatenate([[0], np.arange(N)])
    return Catalogue(N, 2, counts, **(EVERYTHING | facts), **features)


INTERESTS = {"interests": 3, "blend": 2}
LAYERS = {
    "attention": Attention,
    "rotary": partial(Attention, rotary=True),
    "post": partial(Attention, norm="post"),
    "filtered": Filtered,
    "filtered, rotary": partial(Filtered, rotary=True),
    "gated": Gated,
    "gated, rotary": partial(Gated, rotary=True),
    "hstu": Hstu,
    "recurrent": Recurrent,
}


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    features = {"item_features": ["category"], "item_vectors": ["vector"]}
    layered = {
        n: Trajectory(catalogue(), 12, 16, layer=layer).eval() for n, layer in LAYERS.items()
    }
    return layered | {
        "interests": Trajectory(catalogue(), 12, 16, interests=3).eval(),
        "blend": Trajectory(catalogue(), 12, 16, interests=2, blend=True).eval(),
        "trajectory": Trajectory(catalogue(), 12, 16).eval(),
        "trajectory, items only": Trajectory(catalogue(**NOTHING), 12, 16),
        "trajectory, features": Trajectory(catalogue(), 12, 16, **features).eval(),
        "two_tower": TwoTower(catalogue(), 12, 16).eval(),
        "two_tower, features": TwoTower(
            catalogue(), 12, 16, user_ids=True, user_features=["region"], **features
        ),
    }


def some_histories(count: int = 6) -> Histories:
    rng = np.random.default_rng(1)
    return Histories.of(
        [
            (
                rng.integers(1, N + 1, n),
                rng.integers(1, 5, n),
                np.sort(rng.integers(0, 10**9, n)),
                np.where(rng.random(n) < 0.3, np.nan, rng.uniform(0, 100, n)),
            )
            for n in rng.integers(1, 20, count)
        ]
    )


def query(model: torch.nn.Module, histories: Histories) -> torch.Tensor:
    now = np.full(len(histories), 2 * 10**9)
    arrays = encode(histories, model.max_length, now) | {"users": np.ones(len(histories), int)}
    with torch.no_grad():
        return model.eval()(*(torch.from_numpy(arrays[name]) for name in model.inputs))


@pytest.mark.parametrize("name", models())
def test_batch_equals_single(name: str) -> None:
    model, histories = models()[name], some_histories()
    together = query(model, histories)
    assert together.shape == (6, INTERESTS.get(name, 1), 16)
    for b in range(6):
        first, end = histories.offsets[b], histories.offsets[b + 1]
        one = histories.taking(slice(first, end), np.array([0, end - first]))
        torch.testing.assert_close(query(model, one)[0], together[b], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", models())
def test_item_vectors_agree(name: str) -> None:
    model = models()[name].eval()
    with torch.no_grad():
        every = model.item_vectors()
        torch.testing.assert_close(every[[3, 7]], model.vectors_of(torch.tensor([3, 7])))
    assert every.shape == (N + 1, 16)


@pytest.mark.parametrize("has_time", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_no_position_reads_what_follows_it(name: str, has_time: bool) -> None:
    torch.manual_seed(0)
    model = Trajectory(catalogue(has_time=has_time), 12, 16, layer=LAYERS[name]).eval()
    batch = {k: torch.from_numpy(v) for k, v in pack(some_histories(), 12).items()}
    with torch.no_grad():
        before, _ = model.training_pairs(batch)
        changed = dict(batch)
        place = (0, 5)
        for key, size in (("items", N), ("types", 4), ("gaps", 9), ("times", 99)):
            changed[key] = batch[key].clone()
            changed[key][place] = batch[key][place] % size + 1
        after, _ = model.training_pairs(changed)
    moved = (before - after).abs().amax(1) > 1e-6
    flat = (batch["segments"] > 0).flatten().nonzero().squeeze(1)
    segment = batch["segments"][place]
    where = {(int(p) // 12, int(p) % 12) for p in flat[moved]}
    assert where
    assert all(r == 0 and c >= 5 and batch["segments"][r, c] == segment for r, c in where)


class Running(torch.nn.Module):
    """A layer that knows nothing of single positions: a running mean behind a residual."""

    reads_times = False

    def __init__(self, dim: int, max_length: int, dropout: float) -> None:
        super().__init__()

    def forward(self, hidden_BLD: torch.Tensor, path: Path) -> torch.Tensor:
        return hidden_BLD + hidden_BLD.cumsum(dim=1) / (path.positions + 1)[:, None]


def last_states(model: Trajectory, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the states and the mean at each history's end: of all positions, then the end."""
    newest_B = batch["lengths"] - 1
    rows = torch.arange(len(newest_B))
    return tuple(part[rows, newest_B] for part in model._read(batch, Path.padded(batch)))


@pytest.mark.parametrize("interests", [1, 3])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("layer", [*LAYERS, "running"])
def test_the_newest_position_alone_is_what_it_is_among_all(
    layer: str, depth: int, interests: int
) -> None:
    torch.manual_seed(0)
    make = LAYERS.get(layer, Running)
    model = Trajectory(
        catalogue(), 12, 16, layers=depth, layer=make, interests=interests, blend=True
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    arrays = encode(some_histories(9), 12, np.full(9, 2 * 10**9))
    batch = {name: torch.from_numpy(values) for name, values in arrays.items()}
    assert len(set(batch["lengths"].tolist())) > 3
    with torch.no_grad():
        states_BHD, mean_BD = last_states(model, batch)
        alone = model._read(batch, Path.padded(batch), batch["lengths"] - 1)
    torch.testing.assert_close(alone[0][:, 0], states_BHD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone[1][:, 0], mean_BD, atol=1e-5, rtol=1e-5)


def test_serving_computes_the_last_layer_for_one_position() -> None:
    model, widths = models()["attention"], []
    for layer in model.layers:
        layer.feedforward.register_forward_hook(lambda *call: widths.append(call[1][0].shape[1]))
    query(model, some_histories().last(7))
    assert widths == [7, 1]


@pytest.mark.parametrize("name", ["trajectory", "interests", *LAYERS])
def test_packed_training_equals_serving(name: str) -> None:
    """The query that a position trains is the one that its prefix is answered with."""
    model = models()[name]
    whole = some_histories(1).last(9)
    with torch.no_grad():
        packed, _ = model.training_pairs(
            {k: torch.from_numpy(v) for k, v in pack(whole, 12).items()}
        )
    for end in range(1, len(whole.items)):
        prefix = whole.taking(slice(end), np.array([0, end]))
        arrays = encode(prefix, 12, whole.times[end : end + 1])
        with torch.no_grad():
            alone = model(*(torch.from_numpy(arrays[name]) for name in model.inputs))
        torch.testing.assert_close(alone[0].squeeze(0), packed[end - 1], atol=1e-5, rtol=1e-5)


def test_auto_reads_what_the_dataset_has() -> None:
    assert Trajectory(catalogue(**NOTHING), 5).inputs == ("items", "lengths")
    assert "gaps" not in Trajectory(catalogue(), 5, gaps=False).inputs
    with pytest.raises(InputError, match=r"model.gaps=true has no effect.*no timestamps"):
        Trajectory(catalogue(has_time=False), 5, gaps=True)


def test_values_are_read_and_in_training_sometimes_hidden() -> None:
    model, histories = models()["trajectory"], some_histories()
    told = query(model, histories)
    assert not torch.allclose(told, query(model, replace(histories, values=None)))
    values_BL = torch.full((100, 100), 7)
    assert (model._told(values_BL) == 7).all()
    hidden = (model.train()._told(values_BL) == 0).float().mean()
    assert hidden == pytest.approx(HIDDEN_VALUES, abs=0.02)
    with pytest.raises(InputError, match=r"model.values=true has no effect.*no values"):
        Trajectory(catalogue(has_values=False), 5, values=True)


def test_unknown_feature_is_named() -> None:
    with pytest.raises(InputError, match=r"no categorical item feature 'categry'.*'category'"):
        TwoTower(catalogue(), item_features=["categry"])


def test_dim_must_divide_by_heads() -> None:
    with pytest.raises(InputError, match=r"model.dim=10 is not a multiple of model.layer.heads=4"):
        Trajectory(catalogue(), dim=10, layer=partial(Attention, heads=4))
