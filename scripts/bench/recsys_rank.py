"""Ours: top lists of the tested users from the checkpoints that a training left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from protocol import TOP, Ints, Sequences, Settings

from recsys.data.dataset import Dataset
from recsys.evaluation.protocol import requests
from recsys.evaluation.scorers import EvaluationBatch, ModelScorer
from recsys.history import Histories
from recsys.training.runs import build_model, dataset_of, load_weights, read_config
from recsys.training.tracking import flatten

BATCH = 512
SIZES = ("max_length", "dim", "layers", "heads", "feedforward")


def seconds_of(checkpoint: Path) -> float:
    """Return the wall time that the epochs up to a checkpoint took, their validation included."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    history = state["callbacks"]["FullRanking"]["history"]
    return sum(epoch["train/seconds"] + epoch["validation/seconds"] for epoch in history)


def codes_of(dataset: Dataset, sequences: Sequences) -> Ints:
    """Return the benchmark's item codes by the dataset's, 0 for padding."""
    code = {str(name): place for place, name in enumerate(sequences.item_ids, start=1)}
    return np.array([0] + [code[name] for name in dataset.items["item_id"].to_pylist()])


def rows_of(dataset: Dataset, sequences: Sequences) -> Ints:
    """Return the dataset's row of each tested user."""
    row = {name: place for place, name in enumerate(dataset.users["user_id"].to_pylist())}
    return np.array([row[str(name)] for name in sequences.user_ids[sequences.tested]])


def without_seen(scores_BN: torch.Tensor, histories: Histories) -> torch.Tensor:
    rows = np.repeat(np.arange(len(histories)), histories.lengths)
    scores_BN[rows, np.asarray(histories.items, np.int64)] = -torch.inf
    scores_BN[:, 0] = -torch.inf
    return scores_BN


def rank(model: torch.nn.Module, dataset: Dataset) -> Ints:
    """Return lists_UK of the dataset's item indices, a row for every user of the dataset."""
    scorer, asked = ModelScorer(model.eval()), requests(dataset, "test")
    lists_UK = np.zeros((dataset.num_users, TOP), np.int64)
    for start in range(0, len(asked.users), BATCH):
        users, places, _, now = (column[start : start + BATCH] for column in asked)
        histories = dataset.histories(users, places)
        scores_BN = scorer.score(EvaluationBatch(users, histories, now))
        lists_UK[users] = without_seen(scores_BN, histories).topk(TOP).indices.numpy()
    return lists_UK


def point(checkpoint: Path, model: torch.nn.Module, dataset: Dataset, sequences: Sequences) -> Any:
    """Rank with one checkpoint; write its lists beside it."""
    load_weights(model, checkpoint)
    started = perf_counter()
    lists_UK = rank(model, dataset)
    spent = perf_counter() - started
    file = checkpoint.with_suffix(".npy")
    np.save(file, codes_of(dataset, sequences)[lists_UK[rows_of(dataset, sequences)]])
    return {"seconds": seconds_of(checkpoint), "rank_seconds": spent, "lists": str(file)}


def check_sizes(config: DictConfig, settings: Settings) -> None:
    """Refuse a run whose model has other sizes than the other libraries were given."""
    flat = flatten(OmegaConf.to_container(config.model))
    sizes = {name.rsplit("/", 1)[-1]: value for name, value in flat.items()}
    for name in SIZES:
        wanted = getattr(settings, name.removeprefix("max_"))
        if sizes[name] != wanted:
            raise SystemExit(f"the run has {name} {sizes[name]}, but the benchmark {wanted}")


def main() -> None:
    given = json.loads(sys.argv[1])
    run, settings = Path(given["run"]), Settings(**given["settings"])
    torch.set_num_threads(settings.threads)
    config, sequences = read_config(run), Sequences.load(settings.data)
    check_sizes(config, settings)
    dataset = dataset_of(json.loads((run / "manifest.json").read_text())["dataset"])
    model = build_model(config, dataset)
    points = [point(Path(file), model, dataset, sequences) for file in given["checkpoints"]]
    print(json.dumps({"points": points}))


if __name__ == "__main__":
    main()
