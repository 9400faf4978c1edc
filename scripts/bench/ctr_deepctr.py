"""DeepCTR-Torch: its DCN with a cross matrix (DCN-M, as DCNv2 is called there) and DIN, and `fit`.

Sizes are those of its constructors, but for the embedding, the batch and the patience.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ctr_rows import Clock, CtrRows, CtrSettings
from deepctr_torch.callbacks import EarlyStopping
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DCN, DIN

NAMES = {"history": "hist_item", "length": "hist_length"}
"""Our columns by the names that its DIN looks for."""


def features(rows: CtrRows, embedding: int) -> list[Any]:
    sizes = rows.sizes
    pooled = {"genres": rows.item_genres.shape[1], "ratings": rows.ratings.shape[1]}
    plain = [
        SparseFeat(name, size, embedding) for name, size in sizes.items() if name not in pooled
    ]
    history = SparseFeat("hist_item", sizes["item"], embedding, embedding_name="item")
    length = rows.histories.shape[1]
    return [
        *plain,
        VarLenSparseFeat(history, length, length_name="hist_length"),
        *(VarLenSparseFeat(SparseFeat(n, sizes[n], embedding), w) for n, w in pooled.items()),
    ]


def inputs(rows: CtrRows, part: str) -> tuple[dict[str, Any], Any]:
    columns = {NAMES.get(name, name): values for name, values in rows.columns(part).items()}
    label = columns.pop("label")
    return {name: values.astype(np.float32) for name, values in columns.items()}, label


def model_of(settings: CtrSettings, rows: CtrRows) -> Any:
    columns = features(rows, settings.embedding)
    if settings.model == "din":
        return DIN(columns, ["item"], seed=settings.seed)
    return DCN(columns, columns, cross_parameterization="matrix", seed=settings.seed)


def main() -> None:
    settings = CtrSettings.given()
    torch.set_num_threads(settings.threads)
    rows = CtrRows.load(settings.rows)
    model = model_of(settings, rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    model.compile(optimizer, "binary_crossentropy", metrics=["auc"])
    stop = EarlyStopping(
        "val_auc", patience=settings.patience, mode="max", restore_best_weights=True
    )
    clock = Clock()
    model.evaluate = clock.evaluation(model.evaluate)
    with clock.training():
        model.fit(
            *inputs(rows, "train"),
            batch_size=settings.batch,
            epochs=settings.epochs,
            verbose=0,
            validation_data=inputs(rows, "validation"),
            callbacks=[stop],
        )
    predicted = model.predict(inputs(rows, "test")[0], settings.batch)
    print(clock.result(rows, predicted, settings))


if __name__ == "__main__":
    main()
