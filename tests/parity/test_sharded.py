"""Sharded tables of two processes beside one process that holds all, and their checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recsys.training.table_file import TableFile
from torchrec_here import lacking

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four real processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).with_name("sharded_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text()) | {"folder": folder}


@pytest.mark.parametrize("by", ["row_wise", "table_wise"])
def test_two_processes_train_as_one_that_holds_the_tables(found: dict[str, Any], by: str) -> None:
    assert found[by]["sharded"] == pytest.approx(found[by]["dense"], rel=1e-5)
    assert found[by]["farthest"] < 1e-5
    assert len(set(found[by]["dense"])) > 1


@pytest.mark.parametrize("size", ["one", "four"])
def test_a_checkpoint_of_two_goes_on_in_one_and_four(found: dict[str, Any], size: str) -> None:
    """The losses after it depend on every vector and on the rule's state."""
    assert found[size] == pytest.approx(found["row_wise"]["went_on"], rel=1e-5)


def test_a_table_above_a_process_limit_trains_in_two(found: dict[str, Any]) -> None:
    limited = found["limited"]
    assert "can't allocate" in limited["whole"]
    assert limited["moved"] > 1e-5


def test_others_read_the_file(found: dict[str, Any]) -> None:
    """By safetensors itself, and without padding having moved."""
    from safetensors.torch import load_file

    file = found["folder"] / "two-row_wise"
    tensors = load_file(file)
    assert tensors.keys() == {"items", "users", "items.momentum1", "users.momentum1"}
    assert tensors["items"].equal(TableFile(file).rows("items"))
    assert not tensors["items"][0].any()
    assert tensors["items.momentum1"].count_nonzero() > 100
