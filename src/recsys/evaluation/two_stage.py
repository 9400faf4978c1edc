"""Both stages as one scorer: what a retriever finds, in the order that a ranker gives it.

Shapes: B users, C candidates, N + 1 items with padding at 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.evaluation.scorers import EvaluationBatch, Scorer

Rank = Callable[[EvaluationBatch, NDArray[np.int64]], NDArray[np.floating]]
"""A batch and its candidates [B, C] → the ranker's scores [B, C]."""


class TwoStages:
    """Puts a retriever's best `candidates` in a ranker's order; all others stay behind them.

    exclude_seen: whether items of the history are left out before the ranker sees any, as a server
    does. Answers with scores [B, N + 1] that mean an order and nothing else.
    """

    name = "two stages"

    def __init__(
        self, retriever: Scorer, rank: Rank, candidates: int = 200, exclude_seen: bool = True
    ) -> None:
        self.retriever, self.rank = retriever, rank
        self.candidates, self.exclude_seen = candidates, exclude_seen

    def score(self, batch: EvaluationBatch) -> Tensor:
        """Return scores whose order is that of the whole system."""
        # In doubles: adding a place to a large score must not make two places equal.
        scores_BN = self.retriever.score(batch).cpu().double()
        items_BC, found_BC = self.top(batch, scores_BN)
        ranked_BC = np.where(np.isneginf(found_BC), -np.inf, self.rank(batch, items_BC))
        order_BC = np.argsort(-ranked_BC, axis=1, kind="stable")
        best_BC = torch.from_numpy(np.take_along_axis(items_BC, order_BC, axis=1))
        out_BC = torch.from_numpy(np.take_along_axis(np.isneginf(found_BC), order_BC, axis=1))
        above_B1 = scores_BN[:, 1:].amax(dim=1, keepdim=True)
        places_C = torch.arange(best_BC.shape[1], 0, -1, dtype=scores_BN.dtype)
        lifted_BC = torch.where(out_BC, scores_BN.gather(1, best_BC), above_B1 + places_C)
        return scores_BN.scatter(1, best_BC, lifted_BC)

    def top(
        self, batch: EvaluationBatch, scores_BN: Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return each user's candidates, best first, and their scores; -inf is no candidate."""
        eligible_BN = scores_BN.clone()
        eligible_BN[:, 0] = -torch.inf
        if self.exclude_seen:
            rows = np.repeat(np.arange(len(batch)), batch.histories.lengths)
            seen = torch.from_numpy(rows), np.asarray(batch.histories.items, np.int64)
            eligible_BN[seen] = -torch.inf
        width = min(self.candidates, scores_BN.shape[1] - 1)
        found_BC, items_BC = eligible_BN.topk(width, dim=1)
        return items_BC.numpy(), found_BC.numpy()
