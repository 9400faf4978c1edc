"""Attention as a CPU trains it in bf16: near the exact one, blind to what it may not read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.models.layers import Attention, Filtered, Gated, HalfTrained, Path
from recsys.models.packed import LONGEST, PackedAttention, unread
from recsys.schema import InputError

ROWS, LENGTH, DIM, HEADS = 5, 24, 32, 2


def segments() -> Tensor:
    """Rows of one, two and three histories, the last one with padding at its end."""
    cuts = torch.tensor([[30, 30], [7, 30], [7, 15], [1, 23], [10, 30]])
    places = torch.arange(LENGTH)
    found = 1 + (places >= cuts[:, :1]).long() + (places >= cuts[:, 1:]).long()
    found[-1, 18:] = 0
    return found


def path() -> Path:
    return Path(torch.arange(LENGTH).expand(ROWS, -1), segments=segments())


def parts(seed: int, width: int = DIM // HEADS) -> list[Tensor]:
    """Queries and keys of some width, and values of the heads'."""
    draws = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, HEADS, LENGTH, each) for each in (width, width, DIM // HEADS)]
    return [torch.randn(shape, generator=draws).requires_grad_() for shape in shapes]


def near(found: Tensor, exact: Tensor) -> None:
    """bf16 keeps eight bits: errors of about a hundredth of what there is."""
    assert (found - exact).norm() < 0.01 * exact.norm()
    assert found.dtype == exact.dtype


@pytest.mark.parametrize("width", [DIM // HEADS, 1])
def test_answers_and_gradients_are_near_the_exact_ones(width: int) -> None:
    of_half, of_exact = parts(0, width), parts(0, width)
    visible = path().visible
    assert visible is not None
    half = PackedAttention.apply(*of_half, unread(segments()))
    exact = F.scaled_dot_product_attention(*of_exact, attn_mask=visible)
    near(half, exact)
    weight = torch.randn(half.shape, generator=torch.Generator().manual_seed(1))
    (half * weight).sum().backward()
    (exact * weight).sum().backward()
    for mine, theirs in zip(of_half, of_exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        near(mine.grad, theirs.grad)


def test_what_may_not_be_read_changes_nothing() -> None:
    query, key, value = parts(0)
    told = PackedAttention.apply(query, key, value, unread(segments()))
    other_key, other_value = key.detach().clone(), value.detach().clone()
    other_key[:, :, 7:], other_value[:, :, 7:] = 1e4, -1e4
    again = PackedAttention.apply(query, other_key, other_value, unread(segments()))
    assert torch.equal(told[:, :, :7], again[:, :, :7])
    # Row 2's second history begins at 7 and knows nothing of the first.
    first_key, first_value = key.detach().clone(), value.detach().clone()
    first_key[2, :, :7], first_value[2, :, :7] = 1e4, -1e4
    apart = PackedAttention.apply(query, first_key, first_value, unread(segments()))
    assert torch.equal(told[2, :, 7:15], apart[2, :, 7:15])


def test_every_segment_of_a_row_is_told_apart() -> None:
    """As many as the longest row can have: bf16 counts them exactly."""
    alone = torch.arange(1, LONGEST + 1)[None]
    read = unread(alone)[0, 0] == 0
    assert torch.equal(read, torch.eye(LONGEST, dtype=torch.bool))


@pytest.mark.parametrize(
    "make", [Attention, partial(Attention, norm="post", rotary=True), Filtered, Gated]
)
def test_training_is_near_what_answers(make: Callable[..., HalfTrained]) -> None:
    torch.manual_seed(0)
    exact, half = (make(DIM, LENGTH, 0.0, products=products) for products in ("fp32", "bf16"))
    half.load_state_dict(exact.state_dict())
    hidden = torch.randn(ROWS, LENGTH, DIM)
    trained = half(hidden, path())
    assert trained.grad_fn is not None
    assert trained.dtype == torch.float32
    near(trained, exact(hidden, path()))
    assert not torch.equal(trained, exact(hidden, path()))
    with torch.no_grad():
        assert torch.equal(half(hidden, path()), exact(hidden, path()))


@pytest.mark.parametrize("make", [Attention, Gated])
def test_gradients_of_training_are_near_the_exact_ones(make: Callable[..., HalfTrained]) -> None:
    torch.manual_seed(0)
    exact, half = (make(DIM, LENGTH, 0.0, products=products) for products in ("fp32", "bf16"))
    half.load_state_dict(exact.state_dict())
    hidden = torch.randn(ROWS, LENGTH, DIM)
    for layer in (exact, half):
        layer(hidden, path()).square().sum().backward()
    for (name, mine), theirs in zip(half.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        near(mine.grad, theirs.grad)


def test_long_rows_are_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.models.layers.bf16_pays", lambda hidden: True)
    layer = Attention(DIM, LENGTH)
    long = torch.zeros(1, LONGEST + 1, DIM)
    ones = torch.ones(1, LONGEST + 1, dtype=torch.int64)
    assert not layer._in_half(long, Path(ones, segments=ones))
    assert layer._in_half(long[:, 1:], Path(ones[:, 1:], segments=ones[:, 1:]))
    assert not layer._in_half(long[:, 1:], Path(torch.arange(LONGEST)))


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.layer.products=fp16: expected one of auto"):
        Attention(DIM, LENGTH, products="fp16")  # type: ignore[arg-type]
