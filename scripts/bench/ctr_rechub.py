"""Torch-RecHub: its DCNv2 and DIN, `DataGenerator` and `CTRTrainer.fit`.

Sizes are those of its constructors and examples, but for the embedding, the batch and the patience.
"""

from __future__ import annotations

from typing import Any

import torch
from ctr_rows import Clock, CtrRows, CtrSettings
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN, DCNv2
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

MLP = {"dims": [256, 128], "dropout": 0.2}


def model_of(settings: CtrSettings, rows: CtrRows) -> Any:
    sizes, embedding = rows.sizes, settings.embedding
    plain = [SparseFeature(name, sizes[name], embedding) for name in ("user", "hour", "weekday")]
    item = SparseFeature("item", sizes["item"], embedding, padding_idx=0)
    pooled = [
        SequenceFeature(name, sizes[name], embedding, "mean", padding_idx=0)
        for name in ("genres", "ratings")
    ]
    pooling = "concat" if settings.model == "din" else "mean"
    history = SequenceFeature(
        "history", sizes["item"], embedding, pooling, shared_with="item", padding_idx=0
    )
    if settings.model == "din":
        return DIN([*plain, *pooled], [history], [item], MLP, {"dims": [36]})
    return DCNv2([*plain, item, *pooled, history], n_cross_layers=3, mlp_params=MLP)


def inputs(rows: CtrRows, part: str) -> tuple[dict[str, Any], Any]:
    columns = rows.columns(part)
    label = columns.pop("label")
    del columns["length"]
    return columns, label


def main() -> None:
    settings = CtrSettings.given()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    rows = CtrRows.load(settings.rows)
    generator = DataGenerator(*inputs(rows, "train"))
    loaders = generator.generate_dataloader(
        *inputs(rows, "validation"), *inputs(rows, "test"), batch_size=settings.batch
    )
    trainer = CTRTrainer(
        model_of(settings, rows),
        optimizer_params={"lr": settings.lr, "weight_decay": 1e-5},
        n_epoch=settings.epochs,
        earlystop_patience=settings.patience,
        model_path=settings.folder,
    )
    clock = Clock()
    trainer.evaluate = clock.evaluation(trainer.evaluate)
    with clock.training():
        trainer.fit(loaders[0], loaders[1])
    print(clock.result(rows, trainer.predict(trainer.model, loaders[2]), settings))


if __name__ == "__main__":
    main()
