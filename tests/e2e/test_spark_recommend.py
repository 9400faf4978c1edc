"""The recipe for Spark, under spark-submit: the parts that one machine alone would write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from recsys.cli import main
from tiny_bundles import write_tiny_bundle

RECIPE = Path(__file__).resolve().parents[2] / "training" / "spark_recommend.py"


@pytest.fixture
def submit() -> list[str]:
    """Return how to submit to Spark on this machine."""
    found = find_spec("pyspark")
    if found is None or found.origin is None:
        pytest.skip("no pyspark; pip install 'recsys[spark]'")
    if shutil.which("java") is None:
        pytest.skip("no java, which Spark runs on")
    program = Path(found.origin).parent / "bin" / "spark-submit"
    return [str(program), "--master", "local[2]", "--conf", "spark.ui.enabled=false"]


def test_executors_write_what_one_machine_writes(tmp_path: Path, submit: list[str]) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny", num_users=30)
    typed = [str(bundle), "--part-users", "8", "--top-k", "7", "--now", "1700400000", "--out"]
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert main(["recommend", "--all-users", *typed, str(alone), "--finish"]) == 2
    assert main(["recommend", "--all-users", *typed, str(alone)]) == 0
    spread.mkdir()
    for name in ("plan.json", "part-00001.parquet"):  # one was written before: it is left alone
        shutil.copy(alone / name, spread / name)
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(
        [*submit, str(RECIPE), *typed, str(spread)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"30 users in {spread}: 3 parts written now" in done.stdout
    for part in ("part-00000.parquet", "part-00001.parquet", "part-00003.parquet"):
        assert (spread / part).read_bytes() == (alone / part).read_bytes()
    assert (spread / "manifest.json").is_file()
