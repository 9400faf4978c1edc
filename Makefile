# Two commands do everything on a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# The one version that is tested; a CUDA or CPU build of it that is installed already is kept.
TORCH ?= torch==2.13.0
# Processes that run the tests, one core each.
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIN := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --custom-compile-command 'make constraints'

.PHONY: help install sharded optional demo test lint gates bench bench-training bench-ranking faults constraints check-image clean

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'

install: $(READY)  ## Create the environment and install everything

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

sharded: $(READY)  ## Add TorchRec, for embedding=sharded on a CPU
	$(BIN)/python -m pip install --quiet --editable '.[sharded]'
	$(BIN)/python -m pip install --quiet --no-deps torchrec==1.8.0

optional: sharded  ## Tests of what CI leaves out: Spark (needs Java 17) and TorchRec
	$(BIN)/python -m pip install --quiet --editable '.[spark]'
	$(BIN)/python -m pytest -q tests/unit/test_spark.py tests/parity/test_sharded.py tests/e2e/test_spark_recommend.py tests/e2e/test_sharded_run.py

demo: $(READY)  ## Synthetic shop: prepare, train both stages, export, serve, ask
	$(BIN)/python scripts/demo.py

test: lint  ## Lint, types, layers, and every fast test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m 'not slow and not gpu'

lint: $(READY)  ## Style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

gates: $(READY)  ## Real data, hours: accuracy over seeds, speed, latency
	$(BIN)/python -m pytest -q -m slow

bench: $(READY)  ## Speed, side by side in one run
	$(BIN)/python scripts/bench_prepare.py
	$(BIN)/python scripts/bench_serving.py
	$(BIN)/python scripts/bench_batch.py --ways index exact --kill

faults: $(READY)  ## Kill, swap, drain and overload a server under load: make faults BUNDLES="A B"
	$(BIN)/python scripts/fault_serving.py --bundles $(BUNDLES)
	$(BIN)/python scripts/overload_serving.py --bundle $(firstword $(BUNDLES))

bench-training: $(READY)  ## Two hours and more: training beside three libraries, then the cost curves
	$(BIN)/python scripts/bench_training.py
	$(BIN)/python scripts/bench_training.py --scale

bench-ranking: $(READY)  ## Rankers beside three libraries on MovieLens, and the ranking stage's latency
	$(BIN)/python scripts/bench_ranking.py
	$(BIN)/python scripts/bench_rank_stage.py

constraints: $(READY)  ## Pin the versions of what the images install, to the newest that fit
	$(BIN)/python -m pip install --quiet uv
	mkdir -p constraints
	printf 'build\nhatchling\npip\n' | $(PIN) - -o constraints/build.txt
	$(PIN) pyproject.toml --extra train --extra gpu --extra redis -o constraints/train.txt
	$(PIN) pyproject.toml --extra serve --extra redis --extra kafka --extra trace -o constraints/serve.txt
	$(PIN) pyproject.toml --extra serve-gpu --extra redis --extra kafka --extra trace -o constraints/serve-gpu.txt

check-image: $(READY)  ## As root: the image's steps, one by one, without a container engine
	$(BIN)/python scripts/check_image.py

clean:  ## Remove the environment and results of builds, not the workspace
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache
