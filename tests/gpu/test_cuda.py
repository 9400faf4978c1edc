"""What needs a CUDA device: one step of every model and loss in bf16, and ranking on the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recsys.artifacts import Workspace
from recsys.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
LOSSES = ("full_softmax", "sampled_softmax", "in_batch_softmax", "bce", "gbce")


def trained(command: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["train", *command.split(), "patience=null", "logger=csv", "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.parametrize("loss", LOSSES)
def test_trajectory_learns_in_bf16(
    loss: str, workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    settings = "trainer=gpu batches.size=16 model.dropout=0.1 optimizer.lr=0.01"
    result = trained(f"{settings} loss={loss} trainer.max_epochs=25", capsys)
    assert result["test"]["ndcg@10"] > result["popularity"]["ndcg@10"] + 0.1


def test_two_tower_learns_in_bf16(
    workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    settings = "trainer=gpu model=two_tower batches=pairs loss=in_batch_softmax"
    result = trained(f"{settings} trainer.max_epochs=15", capsys)
    assert result["test"]["ndcg@10"] > result["popularity"]["ndcg@10"] + 0.1
