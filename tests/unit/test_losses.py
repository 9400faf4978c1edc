"""Losses against hand-worked tables and against obvious slow code."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys import losses
from recsys.losses import ItemSide
from recsys.schema import InputError
from recsys.training.sharded import read_by


def side(vectors: Tensor, share: Tensor | None = None) -> ItemSide:
    if share is None:
        share = torch.cat([torch.zeros(1), torch.full((len(vectors) - 1,), 1 / (len(vectors) - 1))])
    return ItemSide(lambda: vectors, lambda index: vectors[index], share)


def assert_same(ours: Tensor, plain: Tensor, of: tuple[Tensor, ...]) -> None:
    """Compare two losses and their gradients, where the loss is not the last step either."""
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    gradients = (torch.autograd.grad(loss * 3, of) for loss in (ours, plain))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_softmax_among_a_table() -> None:
    # e^1 / (e^1 + e^0 + e^0), e^2 / (e^2 + e^1 + e^1)
    positive, negative = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = -(math.log(math.e / (math.e + 2)) + math.log(math.e**2 / (math.e**2 + 2 * math.e)))
    assert losses.softmax_among(positive, negative).item() == pytest.approx(expected / 2)


def test_binary_among_a_table() -> None:
    loss = losses.binary_among(torch.zeros(1, 1), torch.zeros(1, 3), beta=0.5)
    assert loss.item() == pytest.approx(3.5 * math.log(2))


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("shape", [(20, 8), (20, 3, 8)], ids=["one", "three interests"])
def test_full_softmax_equals_cross_entropy_and_its_gradients(
    chunk: int, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    query = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(1, 31, (20,))
    ours = losses.full_softmax(query, target, side(vectors), temperature=0.5, chunk=chunk)
    logits = query @ vectors[1:].T / 0.5
    plain = F.cross_entropy(logits if query.ndim == 2 else logits.amax(1), target - 1)
    assert_same(ours, plain, (query, vectors))


@pytest.mark.parametrize("shape", [(64, 8), (64, 3, 8)], ids=["one", "three interests"])
def test_sampled_softmax_nears_the_full_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    query, vectors = torch.randn(*shape), torch.randn(51, 8)
    target = torch.randint(1, 51, (64,))
    share = torch.cat([torch.zeros(1), torch.rand(50) + 0.1])
    items = side(vectors, share / share.sum())
    full = losses.full_softmax(query, target, items).item()
    for by in get_args(losses.Drawn):
        sampled = losses.sampled_softmax(query, target, items, negatives=20_000, by=by).item()
        assert sampled == pytest.approx(full, rel=0.01)
    uncorrected = losses.sampled_softmax(query, target, items, negatives=20_000, logq=False)
    assert uncorrected.item() > full + 1


@pytest.mark.parametrize("shape", [(64, 8), (64, 3, 8)], ids=["one", "three interests"])
def test_few_negatives_that_the_model_would_answer_are_worth_many(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    # Positions that share a draw want much the same few of many items.
    query, vectors = torch.randn(8) * 2 + torch.randn(*shape) / 4, torch.randn(1_001, 8)
    target, items = torch.randint(1, 1_001, (64,)), side(vectors)
    full = losses.full_softmax(query, target, items).item()

    def off(by: losses.Drawn) -> float:
        drawn = partial(losses.sampled_softmax, query, target, items, negatives=32, by=by)
        return sum((drawn().item() - full) ** 2 for _ in range(50)) ** 0.5

    assert off("adaptive") < off("popularity") / 3


def test_an_unknown_way_to_draw_is_refused() -> None:
    by: Any = "popular"
    with pytest.raises(InputError, match=r"loss\.by=popular: expected one of uniform"):
        losses.sampled_softmax(torch.ones(1, 1), torch.tensor([1]), side(torch.ones(3, 1)), by=by)


@pytest.mark.parametrize("weighted", [False, True])
def test_negatives_are_shared_by_so_many_positions(weighted: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(1, 31, (20,)), torch.rand(20).double() if weighted else None
    items = side(vectors)
    settings: dict[str, Any] = {"negatives": 4, "products": "fp32"}
    torch.manual_seed(1)
    ours = losses.sampled_softmax(query, target, items, shared=8, weight_P=weight, **settings)
    torch.manual_seed(1)
    apart = [
        losses.sampled_softmax(
            query[part],
            target[part],
            items,
            weight_P=None if weight is None else weight[part],
            **settings,
        )
        * (len(target[part]) / 20)
        for part in (slice(0, 8), slice(8, 16), slice(16, 20))
    ]
    assert_same(ours, torch.stack(apart).sum(), (query, vectors))
    torch.manual_seed(1)
    assert losses.sampled_softmax(query, target, items, **settings).item() != ours.item()


@pytest.mark.parametrize("positions", [0, 1, 9])
def test_adaptive_negatives_of_few_positions(positions: int) -> None:
    vectors = torch.randn(31, 8, requires_grad=True)
    draw = {"by": "adaptive", "negatives": 4, "shared": 4}
    query, target = torch.randn(positions, 8), torch.randint(1, 31, (positions,))
    loss = losses.sampled_softmax(query, target, side(vectors), **draw)  # type: ignore[arg-type]
    loss.backward()
    assert math.isfinite(loss.item())
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


@pytest.mark.parametrize("positions", [0, 5, 8, 20])
def test_what_a_sampled_loss_reads_is_known_before(positions: int) -> None:
    """Sharded tables fetch it first: every draw, in order, from the batch's targets and padding."""
    target = torch.randint(1, 31, (positions,))
    read: list[Tensor] = []

    def of(index: Tensor) -> Tensor:
        read.append(index)
        return torch.zeros(*index.shape, 8)

    draws = torch.Generator()
    loss = partial(losses.sampled_softmax, negatives=4, shared=8)
    items = ItemSide(lambda: torch.zeros(31, 8), of, side(torch.zeros(31, 8)).share, draws)
    padded = torch.cat([target, torch.zeros(7, dtype=torch.int64)])
    foreseen = read_by(loss, items, padded[torch.randperm(len(padded))])
    draws.manual_seed(draws.initial_seed())
    loss(torch.zeros(positions, 8), target, items)
    assert set(read[0].tolist()) == {*target.tolist(), *foreseen.tolist()}


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(20, 8), (20, 3, 8)], ids=["one", "three interests"])
def test_sampled_softmax_equals_cross_entropy_and_its_gradients(
    shape: tuple[int, ...], weighted: bool, chunk: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(1, 31, (20,)), torch.rand(20).double() if weighted else None
    items = side(vectors, torch.cat([torch.zeros(1), torch.rand(30)]))
    settings: dict[str, Any] = {"negatives": 40, "temperature": 0.5, "weight_P": weight}
    torch.manual_seed(1)
    ours = losses.sampled_softmax(
        query, target, items, by="popularity", chunk=chunk, products="fp32", **settings
    )
    torch.manual_seed(1)
    drawn, log_share = items.sample(40, "popularity")
    logits = losses.scores(query, vectors[drawn]) / 0.5 - log_share - math.log(40)
    logits = logits.masked_fill(drawn[None] == target[:, None], -torch.inf)
    plain = losses.softmax_among(losses.score(query, vectors[target]) / 0.5, logits, weight)
    assert (drawn[None] == target[:, None]).any()
    assert_same(ours, plain, (query, vectors))


@pytest.mark.parametrize("by", ["uniform", "popularity", "given"])
@pytest.mark.parametrize("count", [7, 64])
def test_negatives_are_drawn_as_often_as_their_share_says(by: Any, count: int) -> None:
    share = torch.tensor([0.0, 0.05, 0.3, 0.0, 0.4, 0.25])
    if by == "given":
        by = share = share.flip(0).roll(1)
    items = ItemSide(lambda: share, lambda index: share[index], share, torch.Generator())
    drawn_RK = torch.stack([items.sample(count, by)[0] for _ in range(2_000)])
    assert (drawn_RK.diff(dim=1) >= 0).all()
    uniform = isinstance(by, str) and by == "uniform"
    expected = torch.full((5,), 0.2) if uniform else share[1:]
    times = torch.stack([(drawn_RK == item).sum(1) for item in range(1, 6)], dim=1).double()
    torch.testing.assert_close(times.mean(0) / count, expected.double(), atol=0.01, rtol=0.02)
    # Drawn part by part: never two away from what is expected, as dice often are.
    assert ((times - count * expected).abs() < 2).all()


def test_in_batch_softmax_a_table() -> None:
    # Two different targets of equal share: the correction cancels; logits are 1/T on the diagonal.
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = losses.in_batch_softmax(torch.eye(2), torch.tensor([1, 2]), side(vectors), temperature=1)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 1)))


def test_in_batch_softmax_ignores_a_repeated_target() -> None:
    vectors = torch.tensor([[0.0], [1.0], [1.0]])
    loss = losses.in_batch_softmax(torch.ones(2, 1), torch.tensor([1, 1]), side(vectors))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_logq_favours_what_is_rarely_drawn() -> None:
    vectors = torch.zeros(3, 1)
    skewed = side(vectors, torch.tensor([0.0, 0.9, 0.1]))
    loss = losses.in_batch_softmax(torch.ones(2, 1), torch.tensor([1, 2]), skewed)
    # Equal scores: the corrected softmax gives item 1 a tenth and item 2 nine tenths.
    assert loss.item() == pytest.approx(-(math.log(0.1) + math.log(0.9)) / 2, rel=1e-4)


def test_gbce_without_calibration_is_bce() -> None:
    torch.manual_seed(0)
    query, target, items = torch.randn(5, 4), torch.tensor([1, 2, 3, 4, 5]), side(torch.randn(9, 4))
    torch.manual_seed(1)
    plain = losses.bce(query, target, items, negatives=3)
    torch.manual_seed(1)
    assert losses.gbce(query, target, items, negatives=3, calibration=0.0) == plain
    torch.manual_seed(1)
    assert losses.gbce(query, target, items, negatives=3, calibration=1.0) < plain


WEIGHABLE = {
    "full_softmax": losses.full_softmax,
    "sampled_softmax": losses.sampled_softmax,
    "in_batch_softmax": losses.in_batch_softmax,
    "bce": losses.bce,
    "gbce": losses.gbce,
}


@pytest.mark.parametrize("name", ["full_softmax", "gbce"])
def test_weights_are_a_weighted_mean(name: str) -> None:
    torch.manual_seed(0)
    query, vectors = torch.randn(4, 8, dtype=torch.float64), torch.randn(21, 8, dtype=torch.float64)
    target, weight = torch.randint(1, 21, (4,)), torch.tensor([2.0, 0.0, 1.5, 0.5]).double()
    single = []
    for row in range(4):
        torch.manual_seed(7)
        loss = WEIGHABLE[name](query[row : row + 1], target[row : row + 1], side(vectors))
        single.append(loss.item())
    torch.manual_seed(7)
    weighted = WEIGHABLE[name](query, target, side(vectors), weight_P=weight)
    expected = sum(w * s for w, s in zip(weight.tolist(), single, strict=True)) / 4
    assert weighted.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", WEIGHABLE)
def test_no_weight_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    query, vectors = torch.randn(6, 8, requires_grad=True), torch.randn(21, 8)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 2.0])
    loss = WEIGHABLE[name](query, torch.arange(1, 7), side(vectors), weight_P=weight)
    (gradient,) = torch.autograd.grad(loss, query)
    assert (gradient.norm(dim=1) > 0).tolist() == (weight > 0).tolist()


def test_contrastive_a_table() -> None:
    # Three readings; the first two want the same item, so both count as their positives.
    query, again = torch.eye(3), torch.eye(3)
    same = -(math.log(math.e / (math.e + 2)) + math.log(1 / (math.e + 2))) / 2
    alone = -math.log(math.e / (math.e + 2))
    loss = losses.contrastive(query, again, torch.tensor([5, 5, 9]))
    assert loss.item() == pytest.approx((2 * same + alone) / 3)


def test_contrastive_reads_several_interests_end_to_end() -> None:
    torch.manual_seed(0)
    query, again, target = torch.randn(5, 3, 4), torch.randn(5, 3, 4), torch.tensor([1, 2, 1, 3, 3])
    loss = losses.contrastive(query, again, target)
    assert loss == losses.contrastive(query.reshape(5, 12), again.reshape(5, 12), target)


def test_bf16_products_stay_near_the_exact_gradient() -> None:
    torch.manual_seed(0)
    query, vectors = torch.randn(50, 16, requires_grad=True), torch.randn(201, 16)
    target = torch.randint(1, 201, (50,))
    values, gradients = zip(
        *(
            (loss.item(), torch.autograd.grad(loss, query)[0])
            for loss in (
                losses.full_softmax(query, target, side(vectors), products=products)
                for products in ("fp32", "bf16")
            )
        ),
        strict=True,
    )
    assert values[1] == pytest.approx(values[0], rel=0.002)
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 0.02


def asked_of_liger(device: str, **more: object) -> None:
    # Shapes and devices alone decide about refusing: `meta` holds no numbers.
    vectors, target = torch.zeros(21, 8, device=device), torch.ones(6, device=device).long()
    query = torch.zeros(6, 8, device=device)
    losses.full_softmax(query, target, side(vectors, torch.ones(21)), kernel="liger", **more)


def test_liger_refuses_a_cpu() -> None:
    with pytest.raises(InputError, match=r"not on cpu; use loss\.kernel=torch, or trainer=gpu"):
        asked_of_liger("cpu")


def test_liger_refuses_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(InputError, match=r"objective\.type_weights=null"):
        asked_of_liger("meta", weight_P=torch.ones(6))


def test_liger_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(InputError, match=r"pip install 'recsys\[gpu\]'"):
        asked_of_liger("meta")


def test_liger_is_asked_for_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(query: Tensor, vectors: Tensor, target: Tensor, **more: object) -> Tensor:
        assert more == {"accum_dtype": torch.float32, "chunk_mem_const": 32}
        return F.cross_entropy(query @ vectors.T, target)

    torch.manual_seed(0)
    query, vectors, target = torch.randn(6, 8), torch.randn(21, 8), torch.arange(1, 7)
    expected = losses.full_softmax(query, target, side(vectors), temperature=0.5, products="fp32")
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(losses, "_liger", lambda: fused)
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: nullcontext())
    settings = {"kernel": "liger", "chunk": 77, "temperature": 0.5}
    loss = losses.full_softmax(query, target, side(vectors), **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(InputError, match=r"loss\.kernel=cuda: expected torch or liger"):
        losses.full_softmax(
            torch.zeros(1, 1), torch.ones(1).long(), side(torch.zeros(2, 1)), kernel="cuda"
        )


def test_full_softmax_in_a_small_tile_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vectors, query, target = torch.randn(30, 8), torch.randn(40, 8), torch.randint(1, 30, (40,))
    whole = losses.full_softmax(query, target, side(vectors), products="fp32")
    monkeypatch.setattr(losses, "TILE", 29)
    few = losses.full_softmax(query, target, side(vectors), products="fp32")
    torch.testing.assert_close(few, whole)
