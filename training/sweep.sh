#!/usr/bin/env bash
# Search the trajectory model's main settings by validation NDCG@10 on an existing dataset.
#   training/sweep.sh DATASET [TRIALS [SETTING…]]
set -euo pipefail
dataset=${1:?name a dataset: training/sweep.sh DATASET [TRIALS [SETTING…]]}
trials=${2:-20}
recsys train -m "data.dataset=$dataset" hydra/sweeper=optuna hydra.sweeper.direction=maximize \
  "hydra.sweeper.n_trials=$trials" \
  'model.dropout=interval(0.1,0.6)' 'optimizer.lr=tag(log,interval(3e-4,3e-3))' \
  'model.layers=choice(1,2,3)' "${@:3}"
