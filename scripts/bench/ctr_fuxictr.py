"""FuxiCTR: DCNv2 and DIN of its wheel (`model_zoo.LongCTR`), their loader, and `fit`.

Sizes are those of its config templates, but for the embedding, the batch and the patience.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ctr_rows import PARTS, Clock, CtrRows, CtrSettings
from fuxictr.features import FeatureMap
from fuxictr.pytorch.torch_utils import seed_everything

# The wheel's model_zoo asks for an older FuxiCTR only in its scripts, which are not run here.
from model_zoo.LongCTR.DCNv2 import DCNv2
from model_zoo.LongCTR.DIN import DIN
from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader

NAME = "bench"
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dcnv2": (DCNv2, {"parallel_dnn_hidden_units": [500, 500, 500], "num_cross_layers": 3}),
    "din": (DIN, {"dnn_hidden_units": [500, 500, 500], "attention_hidden_units": [64]}),
}


def specs(rows: CtrRows) -> list[dict[str, dict[str, Any]]]:
    sizes = rows.sizes
    category = {"type": "categorical", "source": "context"}
    pooled = {"padding_idx": 0, "feature_encoder": "layers.MaskedAveragePooling()"}
    pooled |= {"type": "sequence", "source": "context"}
    widths = {"genres": rows.item_genres.shape[1], "ratings": rows.ratings.shape[1]}
    return [
        *({name: {"type": "meta"}} for name in ("user_index", "seq_len", "item_index")),
        *({name: {**category, "vocab_size": sizes[name]}} for name in ("user", "hour", "weekday")),
        *({n: {**pooled, "max_len": w, "vocab_size": sizes[n]}} for n, w in widths.items()),
        {"item": {**category, "source": "item", "vocab_size": sizes["item"], "padding_idx": 0}},
    ]


def feature_map(rows: CtrRows, folder: Path, embedding: int) -> FeatureMap:
    file = folder / NAME / "feature_map.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"dataset_id": NAME, "labels": ["label"], "features": specs(rows)}))
    found = FeatureMap(NAME, str(file.parent))
    found.load(str(file), {"embedding_dim": embedding})
    return found


def write(rows: CtrRows, folder: Path) -> None:
    """Write what its loader reads, whole numbers alone: rows, the sequence of each, items."""
    codes = np.arange(rows.sizes["item"])
    pd.DataFrame({"item_index": codes, "item": codes}).to_parquet(folder / "items.parquet")
    for part in PARTS:
        columns = rows.columns(part)
        index = np.arange(len(columns["label"]))
        sequences = pd.DataFrame({"full_item_seq": list(columns["history"])})
        sequences.to_parquet(folder / f"{part}-sequences.parquet")
        frame = {name: columns[name].astype(int) for name in ("user", "hour", "weekday", "label")}
        own = {"user_index": index, "seq_len": columns["length"], "item_index": columns["item"]}
        lists = {name: list(columns[name]) for name in ("genres", "ratings")}
        pd.DataFrame({**own, **frame, **lists}).to_parquet(folder / f"{part}.parquet")


def loader(features: FeatureMap, part: str, folder: Path, settings: CtrSettings) -> Any:
    files = [str(folder / name) for name in (f"{part}-sequences.parquet", "items.parquet")]
    length = CtrRows.load(settings.rows).histories.shape[1]
    return LongCTRDataLoader(
        features,
        str(folder / f"{part}.parquet"),
        *files,
        batch_size=settings.batch,
        shuffle=part == "train",
        num_workers=1,
        max_len=length,
    )


def main() -> None:
    settings = CtrSettings.given()
    folder = Path(settings.folder)
    os.chdir(folder)
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(settings.threads)
    seed_everything(settings.seed)
    rows = CtrRows.load(settings.rows)
    write(rows, folder)
    features = feature_map(rows, folder, settings.embedding)
    kind, sizes = MODELS[settings.model]
    model = kind(
        features,
        embedding_dim=settings.embedding,
        learning_rate=settings.lr,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC", "logloss"],
        monitor="AUC",
        early_stop_patience=settings.patience,
        verbose=0,
        model_root=str(folder),
        **sizes,
    )
    training, validation, test = (loader(features, part, folder, settings) for part in PARTS)
    clock = Clock()
    model.evaluate = clock.evaluation(model.evaluate)
    with clock.training():
        model.fit(training, epochs=settings.epochs, validation_data=validation)
    print(clock.result(rows, model.predict(test), settings))


if __name__ == "__main__":
    main()
