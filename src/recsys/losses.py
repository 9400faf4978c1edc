"""Training losses: functions of query vectors, targets and the item side.

Shapes: P positions (A of all processes), H interests, K negatives, C candidates, N items, D dim.
All return a scalar: the mean over positions, or where `weight_P` is given the weighted sum over P
(weights of mean 1 keep the scale).
Queries are [P, D], or [P, H, D]: then an item's score is the nearest interest's, as when served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise, repeat
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.products import Products, bf16_pays
from recsys.schema import InputError

Kernel = Literal["torch", "liger"]
Drawn = Literal["uniform", "popularity", "adaptive"]
Rows = TypeVar("Rows", Tensor, Tensor | None)
ALIGNED = 32
"""Numbers that a row of logits is a multiple of."""
TILE = 1 << 26
"""Most logits that a full softmax holds at a time on a CPU; a quarter of a gigabyte in fp32."""
ROWS = 16
"""Positions are multiplied by so many, or a multiple: a CPU's kernels are made anew for each number
that was not met before, which took a tenth of a small step."""
SAMPLED_TILE = 3 << 19
"""Most of a sampled one: as many as stay in cache, and few steps where there are few negatives."""
EVERY = 32
"""One of so many positions tells what the model would answer, where negatives are drawn by it."""


@dataclass(frozen=True)
class ItemSide:
    """The item side of a model as a loss sees it.

    `all` returns vectors_ND [N + 1, D]; `of` the vectors of some indices; `share` [N + 1] is each
    item's share of training events (0 for padding). Negatives are drawn by `generator`, or torch's
    own, of the CPU. Where several processes train, `gather` returns the targets of all of them, and
    the place among these where this one's begin.
    """

    all: Callable[[], Tensor]
    of: Callable[[Tensor], Tensor]
    share: Tensor
    generator: torch.Generator | None = None
    gather: Callable[[Tensor], tuple[Tensor, int]] = lambda target_P: (target_P, 0)

    @cached_property
    def _below(self) -> Tensor:
        """Shares up to each item: summed once, however often is drawn by popularity."""
        return self.share.double().cumsum(0)

    def sample(self, count: int, by: Drawn | Tensor) -> tuple[Tensor, Tensor]:
        """Draw item indices, rising; return them and the log of each one's share, both [K].

        One in each of `count` equal parts of the catalogue (`uniform`), of its events
        (`popularity`), or of given shares [N + 1]: every item as often as its share says, and more
        evenly than by dice alone.
        """
        size = len(self.share) - 1
        place = torch.rand(count, dtype=torch.float64, generator=self.generator)
        place = ((torch.arange(count) + place) / count).to(self.share.device)
        if isinstance(by, str) and by == "uniform":
            drawn = (place * size).long().clamp(max=size - 1) + 1
            return drawn, torch.full((count,), 1 / size, device=drawn.device).log()
        share = by if isinstance(by, Tensor) else self.share
        below = share.double().cumsum(0) if isinstance(by, Tensor) else self._below
        drawn = torch.searchsorted(below, place * below[-1], right=True).clamp(max=size)
        return drawn, share[drawn].log()


def full_softmax(
    query_PD: Tensor,
    target_P: Tensor,
    items: ItemSide,
    *,
    temperature: float = 1.0,
    chunk: int = 256,
    products: Products = "auto",
    kernel: Kernel = "torch",
    weight_P: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over every item, `chunk` positions at a time: P × N is never held.

    On a CPU fewer at a time where there are many items, see `TILE`.

    `products`: the number format of the matrix products (`bf16` halves the time of a step where
    the processor has such instructions, `auto` asks it); sums and gradients stay as they are.
    `kernel`: `liger` has Liger's fused kernels compute it on a GPU, see `_liger_softmax`.

    >>> vectors = torch.tensor([[0.0], [1.0], [1.0]])
    >>> side = ItemSide(lambda: vectors, lambda i: vectors[i], torch.ones(3) / 2)
    >>> round(full_softmax(torch.ones(1, 1), torch.tensor([1]), side).item(), 4)
    0.6931
    """
    vectors_ND = items.all()[1:]
    half = products == "bf16" or (products == "auto" and bf16_pays(query_PD))
    if kernel == "liger":
        return _liger_softmax(
            query_PD / temperature, vectors_ND, target_P - 1, weight_P, chunk, half
        )
    if kernel != "torch":
        raise InputError(f"loss.kernel={kernel}: expected torch or liger")
    query_PD = query_PD / temperature
    loss = LinearCrossEntropy.apply(query_PD, vectors_ND, target_P - 1, weight_P, chunk, half)
    return cast(Tensor, loss)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `query @ vectors.T`, with gradients made while logits are in cache.

    Softmax and both gradient products run chunk by chunk in the forward pass, as in Liger's fused
    linear cross-entropy (Hsu et al. 2024, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_PD: Tensor,
        vectors_ND: Tensor,
        target_P: Tensor,
        weight_P: Tensor | None,
        chunk: int,
        half: bool,
    ) -> Tensor:
        """Return the scalar loss, keeping its gradients for the backward pass."""
        dtype = torch.bfloat16 if half else query_PD.dtype
        positions, shape = len(query_PD), query_PD.shape
        query_PD, vectors_ND = _even(query_PD.to(dtype)), vectors_ND.to(dtype).contiguous()
        target_P, weight_P = _even(target_P), _even(weight_P)
        grad_dtype = torch.float32 if half else dtype
        chunk = _at_once(chunk, query_PD, TILE // len(vectors_ND))
        query_PHD = query_PD if query_PD.ndim == 3 else query_PD[:, None]
        query_grad_PHD = torch.empty_like(query_PHD, dtype=grad_dtype)
        vectors_grad_ND = torch.zeros_like(vectors_ND, dtype=grad_dtype)
        total = query_PD.new_zeros((), dtype=torch.float32)
        for at in range(0, len(query_PD), chunk):
            some = slice(at, at + chunk)
            weight_C = None if weight_P is None else weight_P[some]
            logits_HCN = [query_CD @ vectors_ND.T for query_CD in query_PHD[some].unbind(1)]
            best_CN = reduce(torch.maximum, logits_HCN)
            error_CN, loss_C = _softmax_error(best_CN, target_P[some], weight_C)
            total += loss_C[: positions - at].sum()
            for h, logits_CN in enumerate(logits_HCN):
                nearest_CN = error_CN if len(logits_HCN) == 1 else error_CN * (logits_CN >= best_CN)
                query_grad_PHD[some, h] = nearest_CN @ vectors_ND
                vectors_grad_ND += nearest_CN.T @ query_PHD[some, h]
        ctx.save_for_backward(query_grad_PHD[:positions].view(shape), vectors_grad_ND)
        return total / max(1, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass made."""
        query_grad_PD, vectors_grad_ND = ctx.saved_tensors
        scale = grad / max(1, len(query_grad_PD))
        return query_grad_PD * scale, vectors_grad_ND * scale, None, None, None, None


def scores(query: Tensor, vectors_KD: Tensor) -> Tensor:
    """Return each item's score [P, K] for queries [P, D], or by the nearest of [P, H, D].

    >>> scores(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[2.0, 1.0], [0.0, 3.0]]))
    tensor([[2., 3.]])
    """
    logits = query @ vectors_KD.T
    return logits if query.ndim == 2 else logits.amax(1)


def score(query: Tensor, vectors_PD: Tensor) -> Tensor:
    """Return the score [P, 1] of one item a position, by the nearest of queries [P, H, D]."""
    if query.ndim == 2:
        return (query * vectors_PD).sum(-1, keepdim=True)
    return (query * vectors_PD[:, None]).sum(-1).amax(1, keepdim=True)


def _at_once(chunk: int, query_PD: Tensor, fit: int) -> int:
    """Return how many positions to take at a time: on a CPU no more than fit, but for a few."""
    return max(ROWS, (chunk if query_PD.is_cuda else min(chunk, fit)) // ROWS * ROWS)


def _softmax_error(
    logits_CN: Tensor, target_C: Tensor, weight_C: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return softmax minus one-hot, in the logits' own format, and each row's loss, weighted."""
    error_CN = logits_CN.softmax(dim=1)
    # Indexing, not scatter: on a CPU that takes as long as the softmax itself.
    at = torch.arange(len(target_C), device=target_C.device), target_C
    picked_C = error_CN[at]
    error_CN[at] = picked_C - 1
    loss_C = -picked_C.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    if weight_C is None:
        return error_CN, loss_C
    return error_CN.mul_(weight_C[:, None]), loss_C * weight_C


def _even(rows: Rows) -> Rows:
    """Return rows with some of zeros behind: a multiple of `ROWS`, if there are any."""
    if rows is None:
        return rows
    return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, -len(rows) % ROWS)).contiguous()


def _liger_softmax(
    query_PD: Tensor,
    vectors_ND: Tensor,
    target_P: Tensor,
    weight_P: Tensor | None,
    chunk: int,
    half: bool,
) -> Tensor:
    """Mean cross-entropy by Liger's fused kernels, about `chunk` positions at a time.

    Raises InputError on a CPU, for weighted positions, and where liger-kernel is not installed.
    Source: Hsu et al. 2024, section 3.2.
    """
    if not query_PD.is_cuda:
        raise InputError(
            f"loss.kernel=liger runs on a GPU only, not on {query_PD.device.type}; "
            "use loss.kernel=torch, or trainer=gpu"
        )
    if weight_P is not None:
        raise InputError(
            "loss.kernel=liger knows no weights of positions; use loss.kernel=torch, or "
            "objective.type_weights=null"
        )
    fused, dtype = _liger(), torch.bfloat16 if half else query_PD.dtype
    share = _liger_memory(len(query_PD), vectors_ND, chunk)
    # Autocast would convert all items again for each chunk.
    with torch.autocast("cuda", enabled=False):
        query_PD, vectors_ND = query_PD.to(dtype), vectors_ND.to(dtype)
        loss = fused(
            query_PD, vectors_ND, target_P, accum_dtype=torch.float32, chunk_mem_const=share
        )
    return loss


def _liger_memory(positions: int, vectors_ND: Tensor, chunk: int) -> int:
    """Return how many times the size of the queries Liger's logits may have, for such a chunk.

    >>> _liger_memory(1000, torch.zeros(5000, 10), 200)
    100
    """
    return max(1, round(chunk * len(vectors_ND) / max(1, positions * vectors_ND.shape[1])))


def _liger() -> Callable[..., Tensor]:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise InputError(
            f"loss.kernel=liger needs liger-kernel ({error}): pip install 'recsys[gpu]', "
            "or use loss.kernel=torch"
        ) from error
    return cast("Callable[..., Tensor]", liger_fused_linear_cross_entropy)


def sampled_softmax(
    query_PD: Tensor,
    target_P: Tensor,
    items: ItemSide,
    *,
    negatives: int = 256,
    by: Drawn = "uniform",
    logq: bool = True,
    temperature: float = 1.0,
    shared: int = 1024,
    chunk: int = 1024,
    products: Products = "auto",
    weight_P: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the target among shared negatives, corrected for how they were drawn.

    Source: Bengio and Senécal 2008 (sampled softmax); the correction is log(K q) off each negative.
    by: how they are drawn, from the whole catalogue alike, from its events, or (adaptive) half from
    its events and half from what the model itself would answer some of the positions.
    shared: so many positions have the same negatives; others cost nothing, and the more of the
    catalogue a step meets, the nearer it is to the full softmax. chunk, products: as of
    `full_softmax`.
    """
    if by not in get_args(Drawn):
        raise InputError(f"loss.by={by}: expected one of {', '.join(get_args(Drawn))}")
    half = products == "bf16" or (products == "auto" and bf16_pays(query_PD))
    query_PD = query_PD / temperature
    ways = repeat(by) if by != "adaptive" else _answered(query_PD, items, shared, half)
    each = zip(target_P.split(shared), ways, strict=False)
    draws = [_draw(items, target_C, negatives, way, logq) for target_C, way in each]
    # One look-up, so that a table gets one gradient of its whole size.
    read_AD = items.of(torch.cat([target_P, *(draw.items_K for draw in draws)]))
    rows = query_PD, *read_AD.tensor_split([len(target_P)])
    return cast(Tensor, SampledCrossEntropy.apply(*rows, draws, weight_P, shared, chunk, half))


@torch.no_grad()
def _answered(query_PD: Tensor, items: ItemSide, shared: int, half: bool) -> list[Tensor]:
    """Return the shares [N + 1] from which each `shared` positions are given their negatives.

    Half are the items' own: no item that the model has dismissed is out of reach.
    """
    dtype = torch.bfloat16 if half else query_PD.dtype
    vectors_ND = items.all()[1:].to(dtype)
    some = [query_CD[::EVERY].to(dtype) for query_CD in query_PD.split(shared)]
    answers = (scores(query_CD, vectors_ND).softmax(1).float() for query_CD in some)
    means = (answer_CN.sum(0) / max(1, len(answer_CN)) for answer_CN in answers)
    return [(F.pad(mean_N, (1, 0)) + items.share) / 2 for mean_N in means]


class Negatives(NamedTuple):
    """Distinct drawn items, what is added to their scores, and which is a position's own, or -1."""

    items_K: Tensor
    offset_K: Tensor
    hit_P: Tensor


def _draw(
    items: ItemSide, target_P: Tensor, negatives: int, by: Drawn | Tensor, logq: bool
) -> Negatives:
    drawn, log_share = items.sample(negatives, by)
    drawn_K, times_K = drawn.unique_consecutive(return_counts=True)
    offset_K = times_K.log()
    if logq:
        offset_K = offset_K - log_share[times_K.cumsum(0) - 1] - math.log(negatives)
    at_P = torch.searchsorted(drawn_K, target_P).clamp(max=len(drawn_K) - 1)
    return Negatives(drawn_K, offset_K, torch.where(drawn_K[at_P] == target_P, at_P, -1))


class SampledCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of an item of each position's own among drawn ones that many share.

    As `LinearCrossEntropy`, with gradients made while logits are in cache. drawn_KD: of all draws,
    one after the other, each for the next `shared` positions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_PD: Tensor,
        own_PD: Tensor,
        drawn_KD: Tensor,
        draws: Sequence[Negatives],
        weight_P: Tensor | None,
        shared: int,
        chunk: int,
        half: bool,
    ) -> Tensor:
        """Return the scalar loss, keeping its gradients for the backward pass."""
        dtype = torch.bfloat16 if half else query_PD.dtype
        kept = torch.float32 if half else dtype
        ctx.kinds = query_PD.dtype, own_PD.dtype, drawn_KD.dtype
        positions, shape = len(query_PD), query_PD.shape
        query_PHD = query_PD if query_PD.ndim == 3 else query_PD[:, None]
        hit_P = torch.cat([draw.hit_P for draw in draws])
        query_PHD, own_PD = _even(query_PHD.to(dtype)), _even(own_PD.to(dtype))
        hit_P, weight_P = _even(hit_P), _even(weight_P)
        query_grad_PHD, own_grad_PD = (torch.zeros_like(x, dtype=kept) for x in (query_PHD, own_PD))
        rows = Among(query_PHD, own_PD, hit_P, weight_P, query_grad_PHD, own_grad_PD)
        each_KD = drawn_KD.to(dtype).split([len(draw.items_K) for draw in draws])
        # What was put behind, to be even, belongs to the last draw.
        ends = [*range(shared, positions, shared), len(query_PHD)]
        parts = [rows.at(slice(*some)) for some in pairwise([0, *ends])]
        found = [
            _among(part, one_KD, draw.offset_K, chunk)
            for part, one_KD, draw in zip(parts, each_KD, draws, strict=True)
        ]
        losses, drawn_grads = zip(*found, strict=True)
        query_grad_PD = query_grad_PHD[:positions].view(shape)
        ctx.save_for_backward(query_grad_PD, own_grad_PD[:positions], torch.cat(drawn_grads))
        return torch.cat(losses)[:positions].sum() / max(1, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass made."""
        scale = grad / max(1, len(ctx.saved_tensors[0]))
        grads = [(x * scale).to(kind) for x, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)]
        return *grads, None, None, None, None, None


class Among(NamedTuple):
    """Positions that have the same negatives, and where their gradients go.

    hit_C: which of the drawn items is the position's own, -1 for none: it does not count.
    """

    query_CHD: Tensor
    own_CD: Tensor
    hit_C: Tensor
    weight_C: Tensor | None
    query_grad_CHD: Tensor
    own_grad_CD: Tensor

    def at(self, some: slice) -> Among:
        """Return some of them."""
        parts: list[Any] = [rows if rows is None else rows[some] for rows in self]
        return Among(*parts)


def _among(rows: Among, drawn_KD: Tensor, offset_K: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return the positions' losses and the gradient of the drawn, `chunk` at a time.

    offset_K is added to the scores of the drawn.
    """
    place, dtype = len(drawn_KD), drawn_KD.dtype
    # A column for the position's own item, and as many more as make products aligned.
    more = ALIGNED - place % ALIGNED
    drawn_WD = F.pad(drawn_KD, (0, 0, 0, more))
    offset_W = F.pad(offset_K.to(dtype), (0, more), value=-torch.inf)
    grad_WD = torch.zeros_like(drawn_WD, dtype=rows.own_grad_CD.dtype)
    chunk = _at_once(chunk, drawn_KD, SAMPLED_TILE // len(drawn_WD))
    losses = [
        _added(rows.at(slice(at, at + chunk)), place, drawn_WD, offset_W, grad_WD)
        for at in range(0, max(1, len(rows.own_CD)), chunk)
    ]
    return torch.cat(losses), grad_WD[:place]


def _added(rows: Among, place: int, drawn_WD: Tensor, offset_W: Tensor, grad_WD: Tensor) -> Tensor:
    """Add the gradients of positions, whose own item stands at `place`; return their losses."""
    own_CD, queries = rows.own_CD, rows.query_CHD.unbind(1)
    logits_HCW = [torch.addmm(offset_W, query_CD, drawn_WD.T) for query_CD in queries]
    for logits_CW, query_CD in zip(logits_HCW, queries, strict=True):
        logits_CW[:, place] = (query_CD * own_CD).sum(-1)
    best_CW = _without(reduce(torch.maximum, logits_HCW), rows.hit_C)
    own_C = torch.full_like(rows.hit_C, place)
    error_CW, loss_C = _softmax_error(best_CW, own_C, rows.weight_C)
    for h, (logits_CW, query_CD) in enumerate(zip(logits_HCW, queries, strict=True)):
        near_CW = error_CW if len(queries) == 1 else error_CW * (logits_CW >= best_CW)
        own_C1 = near_CW[:, place, None]
        rows.query_grad_CHD[:, h] = torch.addmm(own_C1 * own_CD, near_CW, drawn_WD)
        rows.own_grad_CD.add_(own_C1 * query_CD)
        grad_WD += near_CW.T @ query_CD
    return loss_C


def _without(logits_CK: Tensor, hit_C: Tensor) -> Tensor:
    """Leave out the drawn item that is a position's own."""
    at = torch.arange(len(hit_C), device=hit_C.device), hit_C.clamp(min=0)
    logits_CK[at] = torch.where(hit_C >= 0, -torch.inf, logits_CK[at])
    return logits_CK


def in_batch_softmax(
    query_PD: Tensor,
    target_P: Tensor,
    items: ItemSide,
    *,
    temperature: float = 0.05,
    logq: bool = True,
    uniform_negatives: int = 0,
    weight_P: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each target among the batch's targets and some uniform negatives.

    Every candidate's log of how often it is expected there is taken off (Yi et al. 2019, section
    4.1); `uniform_negatives` mixes the whole catalogue in (Yang et al. 2020, section 3.2).
    """
    uniform_K = items.sample(uniform_negatives, "uniform")[0]
    target_A, own = items.gather(target_P)
    candidate_C = torch.cat([target_A, uniform_K])
    logits_PC = scores(query_PD, items.of(candidate_C)) / temperature
    if logq:
        expected_C = len(target_A) * items.share[candidate_C]
        expected_C = expected_C + uniform_negatives / (len(items.share) - 1)
        logits_PC = logits_PC - expected_C.log()
    positive_P1 = logits_PC[:, own : own + len(target_P)].diagonal()[:, None]
    return softmax_among(positive_P1, _without_hits(logits_PC, target_P, candidate_C), weight_P)


def bce(
    query_PD: Tensor,
    target_P: Tensor,
    items: ItemSide,
    *,
    negatives: int = 1,
    weight_P: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of the target against uniform negatives (SASRec, section 3.5)."""
    plain = {"negatives": negatives, "calibration": 0.0, "weight_P": weight_P}
    return gbce(query_PD, target_P, items, **plain)  # type: ignore[arg-type]


def gbce(
    query_PD: Tensor,
    target_P: Tensor,
    items: ItemSide,
    *,
    negatives: int = 256,
    calibration: float = 0.75,
    weight_P: Tensor | None = None,
) -> Tensor:
    """Generalised binary cross-entropy with shared negatives (gSASRec, Petrov and Macdonald 2023).

    `calibration` is the paper's t: 0 is plain binary cross-entropy, 1 fully calibrated.
    """
    drawn_K, _ = items.sample(negatives, "uniform")
    positive_P1 = score(query_PD, items.of(target_P))
    negative_PK = _without_hits(scores(query_PD, items.of(drawn_K)), target_P, drawn_K)
    rate = min(1.0, negatives / (len(items.share) - 2))
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    return binary_among(positive_P1, negative_PK, beta, weight_P)


def contrastive(
    query_PD: Tensor, again_PD: Tensor, target_P: Tensor, temperature: float = 1.0
) -> Tensor:
    """Pull each query to its own second reading, against positions with another target.

    Source: DuoRec (Qiu et al. 2022, section 3.3); other positions with the same target are
    positives as well, all weighing alike. Several interests [P, H, D] count as one long vector.
    """
    logits_PP = query_PD.flatten(1) @ again_PD.flatten(1).T / temperature
    same_PP = target_P[:, None] == target_P[None, :]
    log_share_PP = logits_PP.float().log_softmax(dim=1)
    return -(log_share_PP * same_PP).sum(dim=1).div(same_PP.sum(dim=1)).mean()


def softmax_among(
    positive_P1: Tensor, negative_PK: Tensor, weight_P: Tensor | None = None
) -> Tensor:
    """Mean of -log softmax of the positive logit among itself and its negatives."""
    logits = torch.cat([positive_P1, negative_PK], dim=1).float()
    first_P = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return _mean(F.cross_entropy(logits, first_P, reduction="none"), weight_P)


def binary_among(
    positive_P1: Tensor, negative_PK: Tensor, beta: float = 1.0, weight_P: Tensor | None = None
) -> Tensor:
    """Mean of -beta log σ(positive) - Σ log σ(-negative)."""
    positive_P = beta * F.logsigmoid(positive_P1.float()).squeeze(1)
    return _mean(-positive_P - F.logsigmoid(-negative_PK.float()).sum(dim=1), weight_P)


def _mean(loss_P: Tensor, weight_P: Tensor | None) -> Tensor:
    return loss_P.mean() if weight_P is None else (loss_P * weight_P).mean()


def _without_hits(logits_PK: Tensor, target_P: Tensor, drawn_K: Tensor) -> Tensor:
    """A negative that is the target itself says nothing: it leaves the sum."""
    return logits_PK.masked_fill(drawn_K[None, :] == target_P[:, None], -1e9)
