"""Dropout by bytes: the right share and scale, one mask for value, gradient and seed."""

from __future__ import annotations

import pytest
import torch

from recsys.models.dropout import Dropout
from recsys.schema import InputError


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 333), (7,)])
def test_share_and_scale(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kept = Dropout(p)(torch.ones(shape))
    assert kept.shape == shape
    values = set(kept.unique().tolist()) - {0.0}
    assert all(value == pytest.approx(1 / (1 - p), rel=0.02) for value in values)
    if kept.numel() > 1000:
        assert (kept == 0).float().mean().item() == pytest.approx(p, abs=0.005)
        assert kept.mean().item() == pytest.approx(1, abs=0.02)


def test_places_are_independent() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(4000, 64)) > 0).float()
    between = torch.corrcoef(kept.T) - torch.eye(64)
    assert between.abs().max().item() < 0.08


def test_the_gradient_goes_where_the_value_went_and_seeds_repeat() -> None:
    hidden = torch.randn(50, 8, requires_grad=True)
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        answers.append(Dropout(0.4)(hidden))
    (gradient,) = torch.autograd.grad(answers[0].sum(), hidden)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(gradient > 0, answers[0] != 0)


def test_nothing_is_dropped_in_evaluation() -> None:
    hidden = torch.randn(5, 8)
    assert Dropout(0.5).eval()(hidden) is hidden


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_share_out_of_bounds_is_refused(p: float) -> None:
    with pytest.raises(InputError, match=r"model.dropout=.*expected 0 to below 1"):
        Dropout(p)
