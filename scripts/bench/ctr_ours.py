"""Ours: a run's calibrated probabilities of the test rows, in their order."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import cast

import numpy as np

from recsys.artifacts import Workspace, read_manifest
from recsys.evaluation.calibration import Calibration, calibrated, sigmoid
from recsys.models.ranker import Ranker
from recsys.training.ranking import CALIBRATION, RankingJob, predict
from recsys.training.runs import BEST, dataset_of, load_weights, read_config


def main() -> None:
    given = json.loads(sys.argv[1])
    run = Path(given["run"])
    dataset = dataset_of(read_manifest(run, "run")["dataset"])
    job = RankingJob(read_config(run), dataset, Workspace())
    model = cast(Ranker, job.module.model)
    load_weights(model, run / BEST)
    fits = json.loads((run / CALIBRATION).read_text())
    logit_RT = predict(model.eval(), job.shown, "test")
    fitted_RT = calibrated(logit_RT, {task: Calibration.of_json(fits[task]) for task in fits})
    np.save(given["predictions"], sigmoid(fitted_RT[:, 0]))


if __name__ == "__main__":
    main()
