"""Ranking metrics as functions of tensors.

Shapes: B users, N candidates, S left-out pairs of user and item, K places of a top list.
One relevant item a user (the target), so HR@k and recall@k are the same number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recsys.schema import InputError

BLOCK = 2**20
"""Scores compared at once: small enough to stay in a processor's cache."""


def ranks(scores_BN: Tensor, targets_B: Tensor) -> Tensor:
    """Return the rank of each row's target among its scores, 1 is best: float64 [B].

    A tie counts as half a place: the rank is the mean over all orders of the tied items, so a
    scorer that gives every item the same score gets (N + 1) / 2 and gains nothing by it. A score
    of -inf stands for "never recommended". Raises InputError where there is a NaN.

    >>> ranks(torch.tensor([[0.1, 0.9, 0.5], [2.0, 2.0, 1.0]]), torch.tensor([2, 0]))
    tensor([2.0000, 1.5000], dtype=torch.float64)
    """
    at_target_B1 = scores_BN.gather(1, targets_B[:, None])
    rows = max(1, BLOCK // scores_BN.shape[1])
    balance_B = torch.cat(
        [
            _balance(s, t)
            for s, t in zip(scores_BN.split(rows), at_target_B1.split(rows), strict=True)
        ]
    )
    # With n candidates, G above the target and L below it: 1 + G + (n - G - L - 1) / 2.
    return (balance_B.double() + scores_BN.shape[1] + 1) / 2


def _balance(scores_BN: Tensor, at_target_B1: Tensor) -> Tensor:
    """Return how many scores are above the target's, less how many are below: [B]."""
    _check(scores_BN)
    if bool(at_target_B1.isinf().any()):
        return ((scores_BN > at_target_B1).sum(1) - (scores_BN < at_target_B1).sum(1)).float()
    # The same in a quarter of the time: torch sums numbers faster than truth values.
    return (scores_BN - at_target_B1).sign_().float().sum(1)


def _check(scores_BN: Tensor) -> None:
    # A maximum spreads NaN, while comparisons hide it: each would count as a loss to the target.
    invalid_B = scores_BN.amax(1).isnan()
    if bool(invalid_B.any()):
        raise InputError(
            f"scores hold NaN for {int(invalid_B.sum())} of {len(scores_BN)} users of a batch, "
            "expected numbers; a model that diverged does this: train it again with a smaller "
            "learning rate"
        )


def ranks_without(
    ranks_B: Tensor, scores_BN: Tensor, targets_B: Tensor, rows_S: Tensor, items_S: Tensor
) -> Tensor:
    """Return the ranks left when some (row, item) pairs are taken from the candidates: [B].

    `ranks_B` are those among all candidates; pairs must be distinct and hold no target. It reads S
    scores only, instead of writing -inf into a copy of them all.

    >>> scores, target = torch.tensor([[3.0, 2.0, 1.0, 1.0]]), torch.tensor([2])
    >>> pairs = torch.tensor([0, 0]), torch.tensor([0, 3])
    >>> ranks_without(ranks(scores, target), scores, target, *pairs)
    tensor([2.], dtype=torch.float64)
    """
    at_target_S = scores_BN.gather(1, targets_B[:, None])[rows_S, 0]
    scores_S = scores_BN[rows_S, items_S]
    # One above costs a place, one tied half a place, one below none.
    places_S = ((scores_S > at_target_S).double() + (scores_S >= at_target_S).double()) / 2
    return ranks_B.index_add(0, rows_S, -places_S)


def recall_at(ranks_B: Tensor, k: int) -> Tensor:
    """Return 1 where the target is among the first k, else 0: HR@k too.

    >>> recall_at(torch.tensor([1.0, 10.0, 10.5]), 10)
    tensor([1., 1., 0.], dtype=torch.float64)
    """
    return (ranks_B <= k).double()


def ndcg_at(ranks_B: Tensor, k: int) -> Tensor:
    """Return 1 / log2(rank + 1) where the target is among the first k, else 0.

    The ideal gain is 1, as there is one target (Järvelin and Kekäläinen 2002).

    >>> ndcg_at(torch.tensor([1.0, 3.0, 11.0]), 10)
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    return recall_at(ranks_B, k) / torch.log2(ranks_B.double() + 1)


def mrr_at(ranks_B: Tensor, k: int) -> Tensor:
    """Return 1 / rank where the target is among the first k, else 0.

    >>> mrr_at(torch.tensor([1.0, 4.0, 11.0]), 10)
    tensor([1.0000, 0.2500, 0.0000], dtype=torch.float64)
    """
    return recall_at(ranks_B, k) / ranks_B.double()


METRICS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "recall": recall_at,
    "ndcg": ndcg_at,
    "mrr": mrr_at,
}


def metric(name: str, ranks_B: Tensor) -> Tensor:
    """Return each user's value of a metric by its name, such as `ndcg@10`.

    Raises InputError for a name that is not METRIC@K.

    >>> metric("mrr@10", torch.tensor([2.0]))
    tensor([0.5000], dtype=torch.float64)
    """
    kind, _, k = name.partition("@")
    if kind not in METRICS or not k.isdigit() or int(k) < 1:
        raise InputError(
            f"unknown metric {name!r}; expected one of {', '.join(METRICS)} with @k, as in ndcg@10"
        )
    return METRICS[kind](ranks_B, int(k))


def exposure(top_BK: Tensor, num_items: int) -> Tensor:
    """Return how often each item stands in top lists: int64 [N + 1]; index 0 is no item.

    Counts of several batches add up, so that coverage and popularity need no list kept.

    >>> exposure(torch.tensor([[1, 2], [2, 0]]), num_items=4)
    tensor([0, 1, 2, 0, 0])
    """
    shown_N = torch.bincount(top_BK.flatten(), minlength=num_items + 1)
    shown_N[0] = 0
    return shown_N


def coverage(shown_N: Tensor) -> float:
    """Return the share of the catalogue that is recommended to anyone, given `exposure`.

    >>> coverage(torch.tensor([0, 1, 2, 0, 0]))
    0.5
    """
    return int((shown_N > 0).sum()) / (len(shown_N) - 1)


def mean_popularity(shown_N: Tensor, share_N: Tensor) -> float:
    """Return the mean popularity of the recommended items, given `exposure`.

    `share_N` [N + 1] is each item's share of the training events; a scorer that recommends
    uniformly gets 1 / N. Zero where nothing is recommended.

    >>> mean_popularity(torch.tensor([0, 1, 2]), torch.tensor([0.0, 0.5, 0.125]))
    0.25
    """
    total = int(shown_N.sum())
    return float(shown_N.double() @ share_N.double()) / total if total else 0.0
