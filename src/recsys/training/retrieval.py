"""What a training of a retriever is made of: model, batches, full ranking, and the test."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import nn

from recsys import peers
from recsys.data.dataset import Dataset
from recsys.evaluation.protocol import requests
from recsys.evaluation.scorers import ModelScorer, Scorer
from recsys.losses import full_softmax
from recsys.models.hashing import collisions
from recsys.models.tables import sharded_tables
from recsys.optimizers import LazyAdam
from recsys.schema import InputError
from recsys.training.callbacks import FullRanking, averaged
from recsys.training.module import Objective, RetrieverModule
from recsys.training.runs import BEST, build_model, load_weights, short_name
from recsys.training.start import check_start, start_items
from recsys.training.testing import Tested, rank_test


class RetrievalJob:
    """A retriever to train on a dataset; raises InputError for all that a setting can get wrong."""

    def __init__(self, config: DictConfig, dataset: Dataset) -> None:
        check_start(config.item_start)
        check_lazy(config)
        requests(dataset, "validation")  # that nobody is in one is told before hours of training
        requests(dataset, "test")
        self.config, self.dataset = config, dataset
        model = build_model(config, dataset)
        self.batches = self._batches()
        self.module = _module(config, model, self._target_share())
        averaging = averaged(config.averaging, self.batches.steps)
        self.validation = FullRanking(dataset, config.evaluation.exclude_seen, averaging)
        self.collisions = collisions(model)
        self.lineage: dict[str, Any] = {}
        if self.collisions:
            shared = {name: asdict(found) for name, found in self.collisions.items()}
            self.lineage = {"collisions": shared}

    def _batches(self, **more: Any) -> Any:
        return instantiate(
            self.config.batches,
            dataset=self.dataset,
            seed=self.config.seed,
            length=self.config.model.max_length,
            **more,
        )

    def _target_share(self) -> NDArray[Any]:
        """Return what each item's share of the targets is in proportion to: [N + 1]."""
        return self.dataset.train_count

    def _beside(self) -> list[Scorer]:
        """Return what the test puts beside the baselines."""
        return []

    def begin(self, folder: Path) -> None:
        """Say how ids share rows, where they do, and put the weights where training starts."""
        for name, found in self.collisions.items() if peers.first() else ():
            print(f"{name}: {found}", file=sys.stderr, flush=True)
        self._start()

    def _start(self) -> None:
        """Put the item vectors where a new training starts."""
        if sharded_tables(self.module.model):
            from recsys.training.shards import check_torchrec

            check_torchrec()
        start_items(self.module.model, self.dataset, self.config.item_start)

    def test(self, folder: Path) -> Tested:
        """Rank the test part with the best weights, beside the baselines."""
        load_weights(self.module.model, folder / BEST)
        name = short_name(self.config.model._target_)
        scorer = ModelScorer(self.module.model.eval().cpu(), name=name)
        exclude = self.config.evaluation.exclude_seen
        return rank_test(folder, self.dataset, scorer, self.validation, exclude, self._beside())


def check_lazy(config: DictConfig) -> None:
    """Raise InputError where an optimizer that moves rows alone has no effect, or cannot be."""
    if get_object(config.optimizer._target_) is not LazyAdam:
        return
    if get_object(config.loss._target_) is full_softmax:
        raise InputError(
            "optimizer=lazy_adam has no effect with loss=full_softmax, which reads every item at "
            "each step; use loss=sampled_softmax, or optimizer=adam"
        )
    if str(config.trainer.get("strategy", "auto")).startswith("ddp"):
        raise InputError(
            "optimizer=lazy_adam is for one process: with trainer=ddp use embedding=sharded, whose "
            "tables too move only in the rows that a step has read, or optimizer=adam"
        )


def _module(config: DictConfig, model: nn.Module, counts: NDArray[Any]) -> RetrieverModule:
    loss, optimizer = unguarded(instantiate(config.loss)), instantiate(config.optimizer)
    count, objective = torch.from_numpy(counts), Objective(**config.objective)
    parts = (model, loss, optimizer, count, config.seed, objective)
    if not sharded_tables(model):
        return RetrieverModule(*parts)
    from recsys.training.sharded import ShardedRetriever, check_sharding

    check_sharding(config, loss)
    return ShardedRetriever(*parts, sharding=instantiate(config.embedding))


def unguarded(made: Any) -> Any:
    """Return the same without the check that Hydra makes at every call: a tenth of a millisecond.

    >>> unguarded(partial(max, 3))(5)
    5
    """
    return partial(made.func, *made.args, **made.keywords) if isinstance(made, partial) else made
