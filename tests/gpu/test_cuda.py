"""What needs a CUDA device: every model, layer and loss in bf16, ranking and resuming on it.

`RECSYS_GPU_TESTS=cpu` rehearses them in bf16 on a CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from recsys import losses
from recsys.artifacts import LAST, Workspace
from recsys.cli import main
from recsys.config import config_dir
from recsys.evaluation.device_search import Kind, faiss_gpus, searcher
from recsys.evaluation.protocol import Evaluation, evaluate
from recsys.evaluation.scorers import ModelScorer
from recsys.losses import ItemSide
from recsys.serving.engine import Engine
from recsys.serving.messages import RecommendRequest
from recsys.training.runs import load_run
from tiny_bundles import write_tiny_bundle

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not CUDA and os.environ.get("RECSYS_GPU_TESTS") != "cpu",
        reason="torch sees no CUDA device",
    ),
]
ON_DEVICE = "trainer=gpu" if CUDA else "trainer=cpu trainer.precision=bf16-mixed"
FEW = {"sampled_softmax": 16, "bce": 4, "gbce": 16}
"""Negatives of a loss, of which a ring of so few items must not have hundreds."""
LOSSES = ("full_softmax", "in_batch_softmax", *FEW)
LAYERS = sorted(path.stem for path in (config_dir() / "model" / "layer").glob("*.yaml"))
SMALL = f"{ON_DEVICE} batches.size=16 model.dropout=0.1 optimizer.lr=0.01"


def trained(command: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["train", *command.split(), "patience=null", "logger=csv", "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def learns(settings: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "data=events", f"data.path={log}"]) == 0
    result = trained(settings, capsys)
    assert result["test"]["ndcg@10"] > result["popularity"]["ndcg@10"] + 0.1


@pytest.mark.parametrize("loss", LOSSES)
def test_trajectory_learns_in_bf16(
    loss: str, workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    negatives = f"loss.negatives={FEW[loss]}" if loss in FEW else ""
    learns(f"{SMALL} loss={loss} {negatives} trainer.max_epochs=25", ring_csv, capsys)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_learns_in_bf16(
    layer: str, workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learns(f"{SMALL} model/layer={layer} trainer.max_epochs=15", ring_csv, capsys)


@pytest.mark.parametrize("parts", ["model.interests=3", "model.blend=true", "averaging=1.5"])
def test_every_part_learns_in_bf16(
    parts: str, workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learns(f"{SMALL} {parts} trainer.max_epochs=25", ring_csv, capsys)


def test_two_tower_learns_in_bf16(
    workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = f"{ON_DEVICE} model=two_tower batches=pairs loss=in_batch_softmax"
    learns(f"{settings} trainer.max_epochs=15", ring_csv, capsys)


def test_ranks_on_the_device_are_the_cpus(
    workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    trained(f"{SMALL} name=ranked trainer.max_epochs=5", capsys)
    run = load_run(workspace.folder("run") / "ranked")

    def ranked(device: str) -> Evaluation:
        return evaluate(run.dataset, ModelScorer(run.model.eval(), device), "test")

    there, here = ranked("cuda" if CUDA else "cpu"), ranked("cpu")
    assert there.metrics["ndcg@10"] == pytest.approx(here.metrics["ndcg@10"], abs=0.002)
    assert there.per_user is not None
    assert here.per_user is not None
    ranks = (table["rank"].to_numpy() for table in (there.per_user, here.per_user))
    # Items with nearly equal scores may change places.
    assert np.abs(np.subtract(*ranks)).max() <= 1


def middle(last: Path) -> bool:
    """Whether a checkpoint lies there that was written within the second epoch."""
    if not last.exists():
        return False
    kept = torch.load(last, weights_only=True, map_location="cpu")
    epoch, step = kept["callbacks"]["Bookmark"]["place"]
    return epoch == 1 and step > 0


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "cagra"])
def test_search_on_the_device_finds_what_the_cpu_finds(kind: Kind) -> None:
    if kind != "flat" and not faiss_gpus():
        pytest.skip("needs faiss-gpu-cuvs")
    centres = np.random.default_rng(0).normal(size=(50, 32))
    rng = np.random.default_rng(1)
    items_ND, queries_QD = (
        (centres[rng.integers(0, 50, n)] + 0.3 * rng.normal(size=(n, 32))).astype(np.float32)
        for n in (20_000, 200)
    )
    wanted = searcher(items_ND).search(queries_QD, 100).rows_QK
    on = searcher(items_ND, "cuda" if CUDA else "cpu", kind, nprobe=64)
    found = on.search(queries_QD, 100)
    recall = np.mean([np.isin(f, w).mean() for f, w in zip(found.rows_QK, wanted, strict=True)])
    assert recall >= (0.999 if on.exact else 0.9), on.by
    true = np.einsum("qkd,qd->qk", items_ND[found.rows_QK], queries_QD)
    np.testing.assert_allclose(found.scores_QK, true, atol=1e-2)


def test_a_server_encodes_on_the_device(tmp_path: Path) -> None:
    """Or says why it does not: onnxruntime-gpu is not installed wherever torch sees a GPU."""
    bundle = write_tiny_bundle(tmp_path / "tiny-1")
    device = "cuda" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
    asked = [RecommendRequest(history=["i9", "i10"])]
    items = [
        [(item.item_id, round(item.score, 3)) for item in engine.recommend(asked)[0].items]
        for engine in (Engine.load(bundle, device=device), Engine.load(bundle))
    ]
    assert items[0] == items[1]


def test_killed_in_mid_epoch_and_resumed(
    workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    settings = f"{ON_DEVICE} batches.size=3 trainer.max_epochs=3 checkpoint_every.steps=7"
    trained(f"{settings} name=whole", capsys)
    command = [sys.executable, "-m", "recsys.cli", "train", *settings.split(), "name=killed"]
    process = subprocess.Popen([*command, "patience=null", "logger=csv"])
    folders = [workspace.folder("run") / name for name in ("whole", "killed")]
    while not middle(folders[1] / LAST):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert main(["train", "resume=killed"]) == 0
    whole, killed = (
        [epoch["train/loss"] for epoch in json.loads((f / "manifest.json").read_text())["history"]]
        for f in folders
    )
    # A GPU adds up an item's gradients in any order.
    assert killed == pytest.approx(whole, rel=0.02)


@pytest.mark.skipif(
    not CUDA or not importlib.util.find_spec("liger_kernel"), reason="needs CUDA and liger-kernel"
)
@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_liger_equals_ours(products: losses.Products) -> None:
    torch.manual_seed(0)
    query = torch.randn(300, 32, device="cuda", requires_grad=True)
    vectors = torch.randn(1001, 32, device="cuda", requires_grad=True)
    target = torch.randint(1, 1001, (300,), device="cuda")
    side = ItemSide(lambda: vectors, lambda index: vectors[index], torch.ones(1001, device="cuda"))
    found = []
    for kernel in ("torch", "liger"):
        loss = losses.full_softmax(query, target, side, kernel=kernel, products=products, chunk=64)
        found.append((loss, *torch.autograd.grad(loss * 3, (query, vectors))))
    for ours, theirs in zip(*found, strict=True):
        near = 1e-4 if products == "fp32" else 0.02
        assert (ours - theirs).norm() <= near * ours.norm()
