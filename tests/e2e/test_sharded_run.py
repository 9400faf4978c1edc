"""A run whose tables two processes share: trained, stopped, gone on with by one, exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recsys.artifacts import LAST, Workspace
from recsys.cli import main
from recsys.training.runs import BEST, TABLES
from torchrec_here import lacking

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

SHARDED = (
    "embedding=sharded trainer=ddp trainer.accelerator=cpu patience=null model.dropout=0 "
    "trainer.max_epochs=2 logger=csv checkpoint_every.steps=7 model.dim=16"
)
TRAIN = (
    f"train {SHARDED} model=two_tower model.user_ids=true batches=pairs loss=in_batch_softmax "
    "batches.size=199 loss.uniform_negatives=8"
)
SCRIPT = """
import sys
from recsys.cli import main
from recsys.training.sharded import ShardedRetriever

train = ShardedRetriever.training_step

def training_step(module, batch, number):
    if module.trainer.default_root_dir.endswith("stopped") and module.global_step == 8:
        sys.exit(3)
    return train(module, batch, number)

ShardedRetriever.training_step = training_step
for command in sys.argv[1:]:
    if code := main(command.split()):
        sys.exit(code)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ring_csv: Path) -> Workspace:
    """`whole` by two processes; `stopped` by two, and after its 8th step by one."""
    folder = tmp_path_factory.mktemp("sharded")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(folder / "workspace"))
        assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [f"{TRAIN} name=whole", f"{TRAIN} name=stopped"]
        two = [*torchrun, "--nproc-per-node=2", str(script), *words]
        done = subprocess.run(two, capture_output=True, text=True, timeout=250)
        assert "exitcode  : 3" in done.stderr, done.stderr
        one = [*torchrun, "--nproc-per-node=1", "-m", "recsys.cli", "train", "resume=stopped"]
        done = subprocess.run(one, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return Workspace()


def facts(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def test_one_process_goes_on_where_two_stopped(trained: Workspace) -> None:
    whole, stopped = (facts(trained.folder("run") / name) for name in ("whole", "stopped"))
    for expected, met in zip(whole["history"], stopped["history"], strict=True):
        for figure in ("train/loss", "validation/ndcg@10"):
            assert met[figure] == pytest.approx(expected[figure], abs=1e-4), figure


@pytest.mark.parametrize("name", ["whole", "stopped"])
def test_checkpoints_name_the_files_that_are_there(trained: Workspace, name: str) -> None:
    run = trained.folder("run") / name
    states = [torch.load(run / file, weights_only=True) for file in (BEST, LAST)]
    files = {file.name for file in (run / BEST.parent).glob("*.safetensors")}
    assert files == {state[TABLES] for state in states}
    assert not [key for state in states for key in state["state_dict"] if "items.weight" in key]


def test_neighbours_are_learnt_and_exported(
    trained: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the ring the next item is near: better than by popularity, and the bundle says so."""
    run = trained.folder("run") / "whole"
    tested = facts(run)["metrics"]
    assert tested["test"]["ndcg@10"] > 1.5 * tested["popularity"]["ndcg@10"]
    monkeypatch.setenv("RECSYS_HOME", str(trained.root))
    assert main(["export", str(run)]) == 0
    assert main(["recommend", "--history", "i7", "i8", "-k", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer
