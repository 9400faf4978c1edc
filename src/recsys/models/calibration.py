"""From a ranker's logits to probabilities that can be taken at their word.

Shapes: B requests, C candidates, T tasks, K knots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys.schema import DWELL

KNOTS = 64
LONGEST = 20.0
"""Largest log1p of seconds that is answered: some fifteen years."""


class Calibration(nn.Module):
    """Scale and shift of each task's logit, then a rising line through knots of probabilities.

    As made it is the sigmoid alone; `set` puts in what was fitted. Sources: Platt 1999 (scale and
    shift), Zadrozny and Elkan 2002 (isotonic).

    >>> calibration = Calibration(["view"])
    >>> calibration.set("view", knots=np.array([0.0, 1.0]), values=np.array([0.0, 0.5]))
    >>> calibration(torch.zeros(1, 1, 1)).item()
    0.25
    """

    scale: Tensor
    shift: Tensor
    knots: Tensor
    values: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        line_TK = torch.linspace(0, 1, KNOTS).repeat(len(tasks), 1)
        self.register_buffer("scale", torch.ones(len(tasks)))
        self.register_buffer("shift", torch.zeros(len(tasks)))
        self.register_buffer("knots", line_TK)
        self.register_buffer("values", line_TK.clone())

    def set(
        self,
        task: str,
        scale: float = 1.0,
        shift: float = 0.0,
        knots: NDArray[np.floating] | None = None,
        values: NDArray[np.floating] | None = None,
    ) -> None:
        """Calibrate one task; `values` [K] at rising `knots` [K], at most 64 of them.

        Below the first knot and above the last the value is that of the knot.
        """
        place = self.tasks.index(task)
        self.scale[place], self.shift[place] = scale, shift
        if knots is None or values is None:
            return
        assert len(knots) == len(values) <= KNOTS
        assert (np.diff(knots) > 0).all()
        for buffer, given in ((self.knots, knots), (self.values, values)):
            padded = np.pad(given, (0, KNOTS - len(given)), mode="edge")
            buffer[place] = torch.from_numpy(padded.astype(np.float32))

    @property
    def has_lines(self) -> bool:
        """Whether some task has a line other than the one it was made with."""
        return bool((self.knots != self.values).any())

    def forward(self, logit_BCT: Tensor, lines: bool = True) -> Tensor:
        """Return probability_BCT, of `dwell` the seconds; without `lines` from the logits alone."""
        scaled_BCT = logit_BCT * self.scale + self.shift
        probability_BCT = scaled_BCT.sigmoid()
        if lines:
            probability_BCT = self._on_line(probability_BCT)
        if DWELL not in self.tasks:
            return probability_BCT
        seconds_BCT = scaled_BCT.clamp(0.0, LONGEST).exp() - 1
        dwell_T = torch.tensor([task == DWELL for task in self.tasks], device=logit_BCT.device)
        return torch.where(dwell_T, seconds_BCT, probability_BCT)

    def _on_line(self, probability_BCT: Tensor) -> Tensor:
        """Return the value at each probability on its task's line."""
        width_TK, rise_TK = self.knots.diff(dim=-1), self.values.diff(dim=-1)
        slope_TK = rise_TK / width_TK.clamp(min=1e-9)
        beyond_BCTK = probability_BCT[..., None] - self.knots[:, :-1]
        within_BCTK = torch.minimum(beyond_BCTK.clamp(min=0), width_TK)
        return self.values[:, 0] + (within_BCTK * slope_TK).sum(-1)
