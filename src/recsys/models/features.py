"""Feature columns as vectors: what a model says of an item or a user beside its id."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.data.catalogue import Catalogue, Codes, choose


class Features(nn.Module):
    """Looks up feature columns by index and brings each to `dim`: a list of [..., D]."""

    def __init__(self, codes: Mapping[str, Codes], vectors: Mapping[str, Tensor], dim: int) -> None:
        super().__init__()
        self.parts = len(codes) + len(vectors)
        self.tables = nn.ModuleDict({n: nn.Embedding(c.size, dim) for n, c in codes.items()})
        self.projections = nn.ModuleDict(
            {n: nn.Linear(v.shape[1], dim) for n, v in vectors.items()}
        )
        for name, column in codes.items():
            # Columns come from the dataset, not from training: a checkpoint need not hold them.
            self.register_buffer(f"codes_{name}", torch.from_numpy(column.codes), persistent=False)
        for name, matrix in vectors.items():
            self.register_buffer(f"vectors_{name}", matrix, persistent=False)

    @classmethod
    def of_items(
        cls,
        catalogue: Catalogue,
        dim: int,
        categorical: list[str] | None,
        vectors: list[str] | None,
    ) -> Features:
        """Return the named item columns; raise InputError naming one that is not there."""
        wanted = choose(catalogue.item_codes, list(categorical or []), "categorical item feature")
        content = choose(catalogue.item_vectors, list(vectors or []), "item vector")
        return cls(
            {name: catalogue.item_codes[name] for name in wanted},
            {name: torch.from_numpy(catalogue.item_vectors[name]) for name in content},
            dim,
        )

    def forward(self, index: Tensor) -> list[Tensor]:
        """Return one [..., D] tensor a feature for the rows `index` [...]."""
        looked_up = [t(self.get_buffer(f"codes_{n}")[index]) for n, t in self.tables.items()]
        projected = [p(self.get_buffer(f"vectors_{n}")[index]) for n, p in self.projections.items()]
        return looked_up + projected
