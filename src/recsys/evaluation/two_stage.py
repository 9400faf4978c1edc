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

Rank = Callable[[EvaluationBatch, NDArray[np.int64], NDArray[np.float32]], NDArray[np.floating]]
"""A batch, its candidates [B, C] and their retrieval scores [B, C] → the ranker's scores [B, C]."""


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
        scores_BN = self.retriever.score(batch).cpu().clone()
        items_BC, found_BC = self.top(batch, scores_BN)
        order_BC = np.argsort(-self.rank(batch, items_BC, found_BC), axis=1, kind="stable")
        best_BC = torch.from_numpy(np.take_along_axis(items_BC, order_BC, axis=1))
        # In doubles: adding a place to a large score must not make two places equal.
        scores_BN = scores_BN.double()
        above_B = scores_BN[:, 1:].amax(dim=1, keepdim=True)
        places_C = torch.arange(best_BC.shape[1], 0, -1, dtype=scores_BN.dtype)
        return scores_BN.scatter(1, best_BC, above_B + places_C)

    def top(
        self, batch: EvaluationBatch, scores_BN: Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the candidates of each user, best first, and their retrieval scores."""
        eligible_BN = scores_BN.clone()
        eligible_BN[:, 0] = -torch.inf
        if self.exclude_seen:
            rows = np.repeat(np.arange(len(batch)), batch.histories.lengths)
            eligible_BN[
                torch.from_numpy(rows), np.asarray(batch.histories.items, np.int64)
            ] = -torch.inf
        width = min(self.candidates, scores_BN.shape[1] - 1)
        found_BC, items_BC = eligible_BN.topk(width, dim=1)
        return items_BC.numpy(), found_BC.numpy()
