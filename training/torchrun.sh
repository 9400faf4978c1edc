#!/usr/bin/env bash
# Train one run by several processes, or go on with it where an earlier start was interrupted.
#   training/torchrun.sh NAME [SETTING…]                                 this machine, all devices
#   NODES=2 RENDEZVOUS=HOST:29400 training/torchrun.sh NAME [SETTING…]   on each of two machines
# PROCESSES is how many a machine: `gpu` (one a CUDA device, the default) or a number. The dataset is
# prepared already, and RECSYS_HOME is one folder that all machines see.
set -euo pipefail
name=${1:?name the run: training/torchrun.sh NAME [SETTING…]}
shift
run=${RECSYS_HOME:-workspace}/runs/$name
if [ -e "$run/manifest.json" ]; then
  echo "run $name is finished; next: recsys export $name"
  exit 0
elif [ -e "$run/run.json" ]; then
  words=("resume=$name") # a resumed run keeps its settings
else
  words=(trainer=ddp "name=$name" "$@")
fi
if [ "${NODES:-1}" = 1 ]; then
  meet=(--standalone)
else
  meet=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-id "$name" --rdzv-endpoint "${RENDEZVOUS:?HOST:PORT of one of the machines}")
fi
exec torchrun "${meet[@]}" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-3}" \
  -m recsys.cli train "${words[@]}"
