#!/usr/bin/env bash
# Fetch what scripts/gpu_check.sh needs into ./wheels, for a GPU machine without a network:
#   scripts/gpu_wheels.sh              for a machine with torch alone
#   scripts/gpu_wheels.sh there.txt    for one with more: what `pip list --format=freeze` prints there,
#                                      or names alone, one a line, where versions do not matter
# For x86-64 Linux and Python 3.12, or PYTHON_VERSION. torch and CUDA's libraries are never fetched;
# nor is MLflow, for the check logs to CSV. Copy the folder along with the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${PYTHON_VERSION:-3.12}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
uv=$(command -v uv) || { "$python" -m venv "$scratch/venv" && "$scratch/venv/bin/pip" install --quiet uv && uv=$scratch/venv/bin/uv; }

# The project's own requirements, with what tests/gpu import.
"$python" - >"$scratch/wanted" <<'PY'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
def named(requirements):
    for one in requirements:
        own = re.match(r"recsys\[([\w,-]+)\]", one)
        yield from (n for e in own[1].split(",") for n in named(extras[e])) if own else [one]
wanted = {*named(project["dependencies"]), *named(extras["train"] + extras["gpu"] + extras["redis"])}
left_out = ("mlflow", "hydra-optuna-sweeper")
print(*(one for one in sorted(wanted) if not one.startswith(left_out)), sep="\n")
print("pytest", "pytest-timeout", "hypothesis", sep="\n")
PY

# Versions that go together, and with those that are there.
there=${1:-/dev/null}
sed -nE 's/^([A-Za-z0-9._-]+==[^+ ]+).*/\1/p' "$there" >"$scratch/pinned"
"$uv" pip compile --quiet --no-header --no-annotate --python-version "$version" \
  --python-platform x86_64-manylinux_2_28 --constraint "$scratch/pinned" "$scratch/wanted" >"$scratch/all"

# Without those that are there, and torch's own.
sed -E 's/[=@ ].*//' "$there" | tr '_.[:upper:]' '--[:lower:]' >"$scratch/have"
printf '%s\n' torch triton setuptools cuda-bindings cuda-pathfinder cuda-toolkit >>"$scratch/have"
awk -F'[=[]' 'NR == FNR { have[$1]; next } !($1 in have) && $1 !~ /^nvidia-/' \
  "$scratch/have" "$scratch/all" >"$scratch/missing"

rm -rf wheels
platforms=()
for glibc in 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
# ANTLR's runtime is published as a source alone, in pure Python.
grep '^antlr4' "$scratch/missing" | xargs -r "$python" -m pip wheel --quiet --no-deps --wheel-dir wheels
grep -v '^antlr4' "$scratch/missing" >"$scratch/binary"
"$python" -m pip download --quiet --no-deps --only-binary :all: --python-version "$version" \
  --implementation cp "${platforms[@]}" --dest wheels --requirement "$scratch/binary"
echo "$(find wheels -name '*.whl' | wc -l) wheels, $(du -sm wheels | cut -f1) MiB in ./wheels; there: scripts/gpu_check.sh"
