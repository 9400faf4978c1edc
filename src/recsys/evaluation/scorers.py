"""What can be evaluated: anything that scores every item for a batch of histories.

Shapes: B users, H interests, D dim, N + 1 items with padding at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys.history import Arrays, Histories, encode


@dataclass(frozen=True)
class EvaluationBatch:
    """Who asks, with which past, and when; the target is not in it.

    users: int64 [B], rows of the dataset; histories: all events before the target; now: int64 [B],
    the moment of the request in milliseconds, which is the target's.
    """

    users: NDArray[np.int64]
    histories: Histories
    now: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)

    def encoded(self, max_length: int) -> Arrays:
        """Return every array that a model may read, the newest `max_length` events encoded."""
        return encode(self.histories, max_length, self.now) | {"users": self.users + 1}


class Scorer(Protocol):
    """Scores all items at once."""

    @property
    def name(self) -> str:
        """What tables and pictures call it."""
        ...

    def score(self, batch: EvaluationBatch) -> Tensor:
        """Return scores [B, N + 1], higher is better, -inf never recommended; column 0 is ignored.

        The caller reads the tensor before the next call and does not write into it, so it may be
        a buffer that is used again.
        """
        ...


class ModelScorer:
    """Scores by the model of a run: query vectors times item vectors, the best of its interests.

    The item vectors are computed once, here: make a new scorer after a training step.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str = "cpu", name: str = "model"
    ) -> None:
        assert not model.training, "call model.eval() first: dropout would make scores random"
        self.name = name
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.inputs = cast("tuple[str, ...]", model.inputs)
        self.max_length = cast(int, model.max_length)
        with torch.no_grad():
            self.items_ND = cast(Tensor, model.item_vectors()).float()  # type: ignore[operator]
        self._buffer_BN = torch.empty(0, len(self.items_ND), device=self.device)

    @torch.no_grad()
    def score(self, batch: EvaluationBatch) -> Tensor:
        """Return the dot product of each item with the nearest interest: [B, N + 1]."""
        queries_BHD = self.queries(batch)
        # fp32 here: rounding to bf16 would make ties of what the model tells apart.
        with torch.autocast(self.device.type, enabled=False):
            return self._best_interest(queries_BHD)

    @torch.no_grad()
    def queries(self, batch: EvaluationBatch) -> Tensor:
        """Return the query vectors, float32 [B, H, D]."""
        arrays = batch.encoded(self.max_length)
        inputs = (torch.from_numpy(arrays[name]).to(self.device) for name in self.inputs)
        return cast(Tensor, self.model(*inputs)).float()

    def _best_interest(self, queries_BHD: Tensor) -> Tensor:
        # The same memory each time: asking the system for it costs more than the product.
        if len(self._buffer_BN) < len(queries_BHD):
            self._buffer_BN = self._buffer_BN.new_empty(len(queries_BHD), len(self.items_ND))
        scores_BN = self._buffer_BN[: len(queries_BHD)]
        first_BD, *others = queries_BHD.unbind(1)
        torch.mm(first_BD, self.items_ND.T, out=scores_BN)
        for query_BD in others:
            torch.maximum(scores_BN, query_BD @ self.items_ND.T, out=scores_BN)
        return scores_BN
