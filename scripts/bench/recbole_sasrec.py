"""RecBole: its SASRec and `Trainer.fit`, stopped by the clock, and `full_sort_predict`.

RecBole makes a row of every prefix of a history, each with one target, so a batch is of prefixes:
as many as 128 users have targets, but no more than ROW_POSITIONS padded positions.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import TOP, Ints, Meter, Sequences, Settings
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

ROW_POSITIONS = 2**17
NAME = "bench"


class TimeUp(Exception):
    """The training's time is over."""


def write_events(sequences: Sequences, folder: Path) -> None:
    """Write the atomic file that RecBole reads: all events; it splits them itself."""
    flat = sequences.flat(held=0)
    (folder / NAME).mkdir(parents=True, exist_ok=True)
    columns = np.stack([flat["users"], flat["items"], flat["places"]], axis=1)
    head = "user_id:token\titem_id:token\ttimestamp:float"
    file = folder / NAME / f"{NAME}.inter"
    np.savetxt(file, columns, fmt="%d", delimiter="\t", header=head, comments="")


def batch_rows(settings: Settings, sequences: Sequences) -> int:
    mean = sequences.positions() / len(sequences.lengths)
    return min(round(settings.batch * mean), ROW_POSITIONS // settings.length)


def config_of(settings: Settings, sequences: Sequences) -> Config:
    values: dict[str, Any] = {
        "data_path": settings.folder,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": settings.length,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "train_neg_sample_args": None,
        "loss_type": "CE",
        "n_layers": settings.layers,
        "n_heads": settings.heads,
        "hidden_size": settings.dim,
        "inner_size": settings.feedforward,
        "hidden_dropout_prob": settings.dropout,
        "attn_dropout_prob": settings.dropout,
        "train_batch_size": batch_rows(settings, sequences),
        "eval_batch_size": 512,
        "learning_rate": settings.lr,
        "epochs": 1_000_000,
        "use_gpu": False,
        "seed": settings.seed,
        "reproducibility": False,
        "show_progress": False,
    }
    return Config(model="SASRec", dataset=NAME, config_dict=values)


def clocked(loss: Callable[[Any], Any], meter: Meter) -> Callable[[Any], Any]:
    """Return the loss that first tells the meter of the step before."""
    before: list[int] = []

    def calculate_loss(rows: Any) -> Any:
        if before and not meter.step(before.pop()):
            raise TimeUp
        before[:] = [len(rows)]
        return loss(rows)

    return calculate_loss


def code_of_each(dataset: Any) -> Ints:
    """Return our item codes by RecBole's, 0 for its padding."""
    tokens = dataset.field2id_token[dataset.iid_field]
    return np.array([0] + [int(token) for token in tokens[1:]])


@torch.no_grad()
def rank(model: Any, tests: Any, dataset: Any, sequences: Sequences) -> Ints:
    """Return lists_QK; RecBole keeps seen items in, so the common protocol takes them out here."""
    model.eval()
    codes = code_of_each(dataset)
    places = np.argsort(codes)
    seen = sequences.lists(held=1)
    lists_UK = np.zeros((len(seen), TOP), np.int64)
    for batch, *_ in tests:
        users = [int(dataset.id2token("user_id", int(user))) for user in batch["user_id"]]
        scores_BN = model.full_sort_predict(batch)
        scores_BN[:, 0] = -torch.inf
        rows = np.repeat(np.arange(len(users)), [len(seen[user]) for user in users])
        scores_BN[rows, places[np.concatenate([seen[user] for user in users])]] = -torch.inf
        lists_UK[users] = codes[scores_BN.topk(TOP).indices.numpy()]
    model.train()
    return lists_UK[sequences.tested]


def main() -> None:
    settings = Settings.given()
    os.chdir(settings.folder)  # it writes logs where it stands
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(settings.threads)
    sequences = Sequences.load(settings.data)
    write_events(sequences, Path(settings.folder))
    config = config_of(settings, sequences)
    init_seed(settings.seed, reproducibility=False)
    dataset = create_dataset(config)
    trains, _, tests = data_preparation(config, dataset)
    model = SASRec(config, trains.dataset)
    meter = Meter(settings, lambda: rank(model, tests, dataset, sequences))
    model.calculate_loss = clocked(model.calculate_loss, meter)
    try:
        Trainer(config, model).fit(trains, saved=False, verbose=False)
    except TimeUp:
        rows = config["train_batch_size"]
        print(json.dumps(meter.result(sequences.positions(), batch=f"{rows} prefixes")))


if __name__ == "__main__":
    main()
