#!/usr/bin/env bash
# Where a CUDA device is at hand: the gpu-marked tests, training on synthetic data, and the GPU
# benchmark, beside RecTools where RECTOOLS names a Python interpreter that has it.
# Without one, `scripts/gpu_check.sh cpu` runs the same at small size, to see that it works.
# Where scripts/gpu_wheels.sh has made ./wheels, they are used, and nothing is installed for good.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
RECSYS_HOME=$(mktemp -d)
export RECSYS_HOME
trap 'rm -rf "$RECSYS_HOME"' EXIT
if [ -d wheels ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$RECSYS_HOME/site" wheels/*.whl
  export PYTHONPATH=$PYTHONPATH:$RECSYS_HOME/site
fi

"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_name())'
if [ "$device" = gpu ]; then
  users=200000 items=100000 size=1024 small=
else
  export RECSYS_GPU_TESTS=cpu
  users=500 items=500 size=32 small=--small
fi
"$python" -m pytest -q -m gpu tests/gpu
shop="data=synthetic data.source.num_users=$users data.source.num_items=$items"
for model in "model=trajectory" "model=two_tower batches=pairs loss=in_batch_softmax"; do
  # shellcheck disable=SC2086
  "$python" -m recsys.cli train $shop $model batches.size=$size trainer="$device" \
    logger=csv trainer.max_epochs=2 patience=null evaluation.exclude_seen=false
done
"$python" scripts/bench_gpu.py $small ${RECTOOLS:+--rectools "$RECTOOLS"}
