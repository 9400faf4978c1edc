"""Two towers: a user side and an item side that meet in a dot product.

Shapes: B batch, L history length, H interests (1), D dim, N items, V content vector width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.data.catalogue import Catalogue, choose
from recsys.models.dropout import Dropout
from recsys.models.features import Features
from recsys.models.tables import MakeTable, whole
from recsys.schema import InputError


class TwoTower(nn.Module):
    """Scores an item by the dot product of a user vector and an item vector.

    The user side reads the id (`user_ids`), `user_features` and the mean of the newest
    `max_length` items; the item side the id, `item_features` (categorical) and `item_vectors`
    (content); `table` makes the tables of ids. Source: Yi et al. 2019, section 4
    (sampling-bias-corrected two-tower model).
    """

    layout = "pairs"

    def __init__(
        self,
        catalogue: Catalogue,
        max_length: int = 20,
        dim: int = 64,
        hidden: int = 128,
        dropout: float = 0.1,
        normalize: bool = True,
        user_ids: bool = False,
        user_features: list[str] | None = None,
        item_features: list[str] | None = None,
        item_vectors: list[str] | None = None,
        table: MakeTable = whole,
    ) -> None:
        super().__init__()
        self.max_length, self.normalize = max_length, normalize
        user_codes = catalogue.user_codes
        wanted_users = choose(user_codes, list(user_features or []), "categorical user feature")
        self.inputs: tuple[str, ...] = ("items", "lengths")
        if user_ids or wanted_users:
            self.inputs += ("users",)
        self.items = table(catalogue.num_items + 1, dim)
        self.users = table(catalogue.num_users + 1, dim) if user_ids else None
        self.user_features = Features({n: user_codes[n] for n in wanted_users}, {}, dim)
        self.item_features = Features.of_items(catalogue, dim, item_features, item_vectors)
        parts = 1 + user_ids + len(wanted_users)
        self.user_tower = _tower(parts * dim, hidden, dim, dropout)
        self.item_tower = _tower((1 + self.item_features.parts) * dim, hidden, dim, dropout)
        self.apply(_initialise)

    def forward(self, *arrays: Tensor) -> Tensor:
        """Return queries_B1D for right-padded histories; `arrays` in the order of `inputs`."""
        return self._query(dict(zip(self.inputs, arrays, strict=True)))[:, None]

    def training_pairs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return query_BD and target_B, one a row of the batch."""
        return self._query(batch), batch["targets"]

    def item_vectors(self) -> Tensor:
        """Return vectors_ND [N + 1, D]; row 0 is padding."""
        return self.vectors_of(torch.arange(self.items.num_embeddings, device=self._device))

    def vectors_of(self, items: Tensor) -> Tensor:
        """Return the vectors of some item indices: shape [..., D]."""
        parts = [self.items(items), *self.item_features(items)]
        return self._finish(self.items(items) + self.item_tower(torch.cat(parts, dim=-1)))

    def _query(self, batch: Mapping[str, Tensor]) -> Tensor:
        items_BL = batch["items"]
        length_B1 = batch["lengths"].clamp(min=1)[:, None]
        pooled_BD = self.items(items_BL).sum(dim=1) / length_B1
        parts = [pooled_BD]
        if self.users is not None:
            parts.append(self.users(batch["users"]))
        if self.user_features.parts:
            parts += self.user_features(batch["users"])
        return self._finish(pooled_BD + self.user_tower(torch.cat(parts, dim=-1)))

    def _finish(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1, eps=1e-6) if self.normalize else vectors

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device


def _tower(width: int, hidden: int, dim: int, dropout: float) -> nn.Sequential:
    if hidden < 1:
        raise InputError(f"model.hidden={hidden}: expected at least 1")
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, dim)
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
