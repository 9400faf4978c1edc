"""What a training of a retriever is made of: model, batches, full ranking, and the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from recsys.data.dataset import Dataset
from recsys.evaluation.scorers import ModelScorer, Scorer
from recsys.training.callbacks import FullRanking, averaged
from recsys.training.module import Objective, RetrieverModule
from recsys.training.runs import BEST, build_model, load_weights, short_name
from recsys.training.start import check_start, start_items
from recsys.training.testing import Tested, rank_test


class RetrievalJob:
    """A retriever to train on a dataset; raises InputError for all that a setting can get wrong."""

    def __init__(self, config: DictConfig, dataset: Dataset) -> None:
        check_start(config.item_start)
        self.config, self.dataset = config, dataset
        model = build_model(config, dataset)
        self.batches = self._batches()
        self.module = RetrieverModule(
            model,
            instantiate(config.loss),
            instantiate(config.optimizer),
            self._target_share(),
            config.seed,
            Objective(**config.objective),
        )
        averaging = averaged(config.averaging, self.batches.steps)
        self.validation = FullRanking(dataset, config.evaluation.exclude_seen, averaging)
        self.lineage: dict[str, Any] = {}

    def _batches(self) -> Any:
        return instantiate(
            self.config.batches,
            dataset=self.dataset,
            seed=self.config.seed,
            length=self.config.model.max_length,
        )

    def _target_share(self) -> Tensor:
        """Return what each item's share of the targets is in proportion to: [N + 1]."""
        return torch.from_numpy(self.dataset.train_count)

    def _beside(self) -> list[Scorer]:
        """Return what the test puts beside the baselines."""
        return []

    def begin(self, folder: Path) -> None:
        """Put the item vectors where a new training starts."""
        start_items(self.module.model, self.dataset, self.config.item_start)

    def test(self, folder: Path) -> Tested:
        """Rank the test part with the best weights, beside the baselines."""
        load_weights(self.module.model, folder / BEST)
        name = short_name(self.config.model._target_)
        scorer = ModelScorer(self.module.model.eval().cpu(), name=name)
        exclude = self.config.evaluation.exclude_seen
        return rank_test(folder, self.dataset, scorer, self.validation, exclude, self._beside())
