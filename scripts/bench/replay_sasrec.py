"""RePlay: `SasRec` on its Parquet loader and Lightning module, and its own seen-items filter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from protocol import TOP, Ints, Meter, Sequences, Settings
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import TorchTopItemsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.loss import CESampled
from replay.nn.sequential import SasRec
from replay.nn.transform import UniformNegativeSamplingTransform
from replay.nn.transform.template.sasrec import make_default_sasrec_transforms

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
DATASET = {"generator": torch.default_generator, "partition_size": 128 * 8192}


def schema_of(sequences: Sequences, dim: int) -> TensorSchema:
    """Items are 0 to N - 1 here; N is padding."""
    item = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=dim,
        padding_value=sequences.num_items,
        cardinality=sequences.num_items,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
    return TensorSchema([item])


def write(sequences: Sequences, users: Ints, held: int, file: Path) -> str:
    """Write one row a user: `item_id` and the same as `seen_ids`, which is not cut."""
    every = sequences.lists(held)
    items = pa.array([every[user] - 1 for user in users])
    pq.write_table(pa.table({"query_id": users, "item_id": items, "seen_ids": items}), file)
    return str(file)


def train_data(settings: Settings, sequences: Sequences, schema: TensorSchema) -> ParquetModule:
    users = np.flatnonzero(sequences.ends(2) >= 2)
    transforms = make_default_sasrec_transforms(schema)["train"]
    if settings.loss == "sampled_softmax":
        transforms.append(UniformNegativeSamplingTransform(sequences.num_items, settings.negatives))
    # One more than the model reads: the next-token transform takes the last for a target.
    columns = {"item_id": {"shape": settings.length + 1, "padding": sequences.num_items}}
    return ParquetModule(
        batch_size=settings.batch,
        metadata={"train": columns},
        transforms={"train": transforms},
        config={"train": DATASET},
        train_path=write(sequences, users, 2, Path(settings.folder) / "train.parquet"),
    )


def test_data(settings: Settings, sequences: Sequences, schema: TensorSchema) -> ParquetModule:
    padding, longest = sequences.num_items, int(sequences.lengths.max())
    columns = {
        "query_id": {},
        "item_id": {"shape": settings.length, "padding": padding},
        "seen_ids": {"shape": longest, "padding": padding},
    }
    return ParquetModule(
        batch_size=512,
        metadata={"predict": columns},
        transforms={"predict": make_default_sasrec_transforms(schema)["predict"]},
        predict_path=write(sequences, sequences.tested, 1, Path(settings.folder) / "test.parquet"),
    )


def model_of(settings: Settings, schema: TensorSchema) -> SasRec:
    model = SasRec.from_params(
        schema,
        embedding_dim=settings.dim,
        num_heads=settings.heads,
        num_blocks=settings.layers,
        max_sequence_length=settings.length,
        dropout=settings.dropout,
        hidden_dim=settings.feedforward,
    )
    if settings.loss == "sampled_softmax":
        model.loss = CESampled(ignore_index=schema["item_id"].padding_value)
        model.loss.logits_callback = model.get_logits
    return model


class Clock(lightning.Callback):
    """Tells the meter of each step and stops the trainer when time is up."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, at: int):
        # RePlay also predicts a first item from padding; what has no input is not counted.
        real = batch["padding_mask"] & batch["target_padding_mask"].squeeze(-1)
        trainer.should_stop = not self.meter.step(int(real.sum()))


def rank(model: SasRec, data: ParquetModule, sequences: Sequences) -> Ints:
    """Return lists_QK by the library's own prediction, then go on training."""
    seen = SeenItemsFilter(sequences.num_items)
    top = TorchTopItemsCallback(TOP, "query_id", postprocessors=[seen])
    predictor = lightning.Trainer(accelerator="cpu", callbacks=[top], **QUIET)
    predictor.predict(LightningModule(model), datamodule=data, return_predictions=False)
    model.train()
    users, items, _ = top.get_result()
    lists_UK = np.zeros((len(sequences.lengths), TOP), np.int64)
    lists_UK[users.numpy()] = items.numpy() + 1
    return lists_UK[sequences.tested]


def main() -> None:
    warnings.filterwarnings("ignore")
    settings = Settings.given()
    torch.set_num_threads(settings.threads)
    lightning.seed_everything(settings.seed)
    sequences = Sequences.load(settings.data)
    schema = schema_of(sequences, settings.dim)
    model, tests = model_of(settings, schema), test_data(settings, sequences, schema)
    meter = Meter(settings, lambda: rank(model, tests, sequences))
    trainer = lightning.Trainer(
        max_epochs=1_000_000,
        accelerator="cpu",
        callbacks=[Clock(meter)],
        enable_checkpointing=False,
        limit_val_batches=0,
        **QUIET,
    )
    optimizer = OptimizerFactory(learning_rate=settings.lr)
    trains = train_data(settings, sequences, schema)
    trainer.fit(LightningModule(model, optimizer), datamodule=trains)
    print(json.dumps(meter.result(sequences.positions(settings.length))))


if __name__ == "__main__":
    main()
