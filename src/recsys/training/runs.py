"""Run directories: what one training leaves, and how to read it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from recsys.artifacts import read_manifest
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset
from recsys.models.tables import sharded_tables
from recsys.schema import InputError
from recsys.training.table_file import read_tables

BEST = Path("checkpoints/best.ckpt")
BEFORE, OLD, OLD_BEFORE = "run before", "old_holdout", "old_holdout_before"
"""Metrics of a continued run: the run before on the test part, and both on that run's own."""
TABLES = "tables"
"""A checkpoint's word for the file beside it that holds its sharded tables."""


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, its dataset, and its best model in eval mode on the CPU."""

    path: Path
    manifest: Mapping[str, Any]
    config: DictConfig
    dataset: Dataset
    model: nn.Module


def is_ranker(path: Path) -> bool:
    """Return whether a run is that of a second stage."""
    return "retriever" in read_manifest(path, "run")


def load_run(path: Path) -> LoadedRun:
    """Read a run directory; raise InputError where its dataset or checkpoint does not fit."""
    manifest = read_manifest(path, "run")
    config = read_config(path)
    dataset = dataset_of(manifest["dataset"])
    model = build_model(config, dataset)
    load_weights(model, path / BEST)
    return LoadedRun(path, manifest, config, dataset, model.eval())


def read_config(path: Path) -> DictConfig:
    """Return the resolved config of a run, finished or not."""
    file = path / "config.yaml"
    if not file.is_file():
        raise InputError(f"{path}: no config.yaml in it; is it a run? Train one with recsys train")
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    return config


def dataset_of(lineage: Mapping[str, Any]) -> Dataset:
    """Open the dataset that a run was trained on, refusing another content under that path."""
    dataset = Dataset(Path(lineage["path"]))
    if dataset.fingerprint != lineage["fingerprint"]:
        raise InputError(
            f"{dataset.path}: fingerprint {dataset.fingerprint}, but the run was trained on "
            f"{lineage['fingerprint']}; prepare that dataset again, or train anew"
        )
    return dataset


def build_model(config: DictConfig, dataset: Dataset) -> nn.Module:
    """Return the configured model, untrained, sized to a dataset."""
    table = {"table": instantiate(config.embedding)} if config.get("embedding") else {}
    model = instantiate(config.model, _partial_=True)(catalogue=Catalogue.of(dataset), **table)
    assert isinstance(model, nn.Module)
    return model


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights into `model`, or raise InputError where they do not fit."""
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint} is missing; resume or repeat the training")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    named = state["state_dict"].items()
    weights = {n.removeprefix("model."): v for n, v in named if n.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{checkpoint} does not fit this dataset or model: {_first_misfit(error)}; use the "
            "dataset that the run was trained on, or train anew"
        ) from error
    if TABLES in state:
        read_tables(sharded_tables(model), checkpoint.parent / state[TABLES])


def short_name(target: str) -> str:
    """Return a class path as a name.

    >>> short_name("recsys.models.TwoTower")
    'two_tower'
    """
    name = target.rsplit(".", 1)[-1]
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _first_misfit(error: RuntimeError) -> str:
    lines = str(error).splitlines()
    return lines[1].strip() if len(lines) > 1 else str(error)
