"""Training on a log with a known answer: the item after the last one on the ring."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.artifacts import Workspace, write_json
from recsys.cli import main
from recsys.data.batches import PackedBatches, PairBatches, Steps
from recsys.data.dataset import Dataset
from recsys.schema import InputError
from recsys.training.module import Objective
from recsys.training.runs import BEST, load_run

SMALL = "trainer=cpu model.dim=32 optimizer.lr=0.01 patience=null"
TRAJECTORY = f"{SMALL} model.dropout=0.1 batches.size=16 trainer.max_epochs=12"
TWO_TOWER = f"{SMALL} model=two_tower batches=pairs loss=in_batch_softmax trainer.max_epochs=9"


@pytest.fixture
def dataset(workspace: Workspace, ring_csv: Path) -> Dataset:
    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    return Dataset(workspace.find("dataset"))


def trained(command: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["train", *command.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("command", [TRAJECTORY, TWO_TOWER], ids=["trajectory", "two_tower"])
def test_the_next_item_of_the_ring_ranks_first(
    command: str, dataset: Dataset, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    result = trained(f"{command} logger=csv", capsys)
    floor = {"trajectory": 0.95, "two_tower": 0.5}[
        load_run(workspace.find("run")).manifest["model"]
    ]
    assert result["test"]["ndcg@10"] > floor
    assert result["test"]["ndcg@10"] > result["popularity"]["ndcg@10"] + 0.2


@pytest.mark.parametrize("loss", ["sampled_softmax", "in_batch_softmax", "bce", "gbce"])
def test_every_loss_learns(loss: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"sampled_softmax": 16, "bce": 4, "gbce": 16}.get(loss)
    more = f"loss={loss} logger=csv trainer.max_epochs=25" + (
        f" loss.negatives={few}" if few else ""
    )
    result = trained(f"{TRAJECTORY} {more}", capsys)
    assert result["test"]["ndcg@10"] > result["popularity"]["ndcg@10"] + 0.2


@pytest.mark.parametrize(
    "setting",
    [
        "averaging=0.5",
        "schedule=cosine",
        "objective.contrastive=0.1",
        "batches.horizon=2",
        "model.interests=2",
    ],
)
@pytest.mark.parametrize("layer", ["attention", "filtered"])
def test_every_setting_learns(
    setting: str, layer: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"{setting} model/layer={layer} logger=csv trainer.max_epochs=20"
    result = trained(f"{TRAJECTORY} {more}", capsys)
    assert result["test"]["ndcg@10"] > result["popularity"]["ndcg@10"] + 0.2


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("averaging=0", "averaging=0: expected a number of epochs above 0, or null"),
        ("schedule=cosine schedule.warmup=1", "schedule.warmup=1: expected 0 or more, and less"),
        ("schedule=cosine trainer.max_epochs=-1", "a rate that falls needs to know the end"),
        ("batches.horizon=0", "batches.horizon=0: expected 1 (the next event) or more"),
        ("objective.type_weights={buy:2}", "unknown event type 'buy'"),
        ("objective.type_weights={purchase:-1}", "type_weights.purchase=-1: expected 0 or more"),
        ("model.layer.width=0 model/layer=filtered", "model.layer.width=0: expected at least 1"),
        ("model.interests=0", "model.interests=0: expected 1"),
        ("item_start=zeros", "item_start=zeros: expected random or cooccurrence"),
    ],
)
def test_a_setting_out_of_bounds_is_refused(
    setting: str,
    problem: str,
    dataset: Dataset,
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", *SMALL.split(), "logger=csv", *setting.split()]) == 2
    assert problem in capsys.readouterr().err
    assert not list(workspace.folder("run").glob("*")), "a refused training leaves nothing"


def test_what_weighs_nothing_is_not_learned() -> None:
    targets = torch.tensor([[3, 5, 0], [7, 0, 0]])
    types = torch.tensor([[1, 4, 0], [4, 0, 0]])
    batch = {"targets": targets, "target_types": types}
    assert Objective().weights(batch) is None
    weight_P = Objective(type_weights={"purchase": 4}).weights(batch)
    assert weight_P is not None
    assert weight_P.tolist() == pytest.approx([1 / 3, 4 / 3, 4 / 3])


def test_mixed_precision_learns(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    result = trained(f"{TRAJECTORY} trainer.precision=bf16-mixed logger=csv", capsys)
    assert result["test"]["ndcg@10"] > 0.95


def test_checkpoint_holds_tensors_and_primitives(
    dataset: Dataset, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(f"{SMALL} trainer.max_epochs=1 logger=csv", capsys)
    run = load_run(workspace.find("run"))
    state = torch.load(run.path / BEST, weights_only=True)
    assert "model.items.weight" in state["state_dict"]
    assert not run.model.training


def test_the_same_seed_gives_the_same_run(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    short = f"{SMALL} trainer.max_epochs=2 logger=csv"
    first, second, other = (trained(f"{short} seed={seed}", capsys) for seed in (1, 1, 2))
    assert first["test"] == second["test"]
    assert first["test"] != other["test"]


def test_a_checkpoint_of_another_dataset_is_refused(
    dataset: Dataset, workspace: Workspace, ring_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(f"{SMALL} trainer.max_epochs=1 logger=csv", capsys)
    run = workspace.find("run")
    smaller = ["data.name=smaller", "data.min_user_events=2"]
    lines = ring_csv.read_text().splitlines()
    cut = workspace.root / "cut.csv"
    cut.write_text("\n".join(lines[:200]))
    main(["prepare", "data=events", f"data.path={cut}", *smaller])
    other = Dataset(workspace.find("dataset"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["dataset"] |= {"path": str(other.path)}
    write_json(run / "manifest.json", manifest)
    with pytest.raises(InputError, match=r"fingerprint .* but the run was trained on"):
        load_run(run)
    manifest["dataset"] |= {"fingerprint": other.fingerprint}
    write_json(run / "manifest.json", manifest)
    with pytest.raises(InputError, match="does not fit this dataset or model"):
        load_run(run)


@pytest.mark.parametrize("kind", [PackedBatches, PairBatches])
def test_batches_are_a_function_of_seed_epoch_and_step(kind: type, dataset: Dataset) -> None:
    batches = kind(dataset, size=7, seed=3, length=6)
    plain, worked = (list(batches.loader(workers)) for workers in (0, 2))
    assert len(plain) == batches.steps
    for left, right in zip(plain, worked, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)
    again = list(batches.loader(2, Steps(batches.steps, first=5)))
    assert len(again) == batches.steps - 5
    assert all(torch.equal(again[0][name], plain[5][name]) for name in again[0])
    first, later = batches[(0, 0)], batches[(1, 0)]
    assert not all(np.array_equal(first[name], later[name]) for name in first)


@pytest.mark.parametrize("kind", [PackedBatches, PairBatches])
def test_a_spawned_worker_gets_the_path_not_the_data(kind: type, dataset: Dataset) -> None:
    batches = kind(dataset, size=7, seed=3, length=6)
    sent = pickle.dumps(batches)
    assert len(sent) < 1000
    made, expected = pickle.loads(sent)[(1, 2)], batches[(1, 2)]  # noqa: S301 (our own bytes)
    assert all(torch.equal(made[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", [PackedBatches, PairBatches])
def test_no_batch_holds_an_event_to_predict(kind: type, dataset: Dataset) -> None:
    batches = kind(dataset, size=16, seed=0, length=50)
    found = batches.find(np.arange(batches.total))
    seen = {(int(user), int(end)) for user, end in zip(*found, strict=True)}
    last = {user: max(e for u, e in seen if u == user) for user in {u for u, _ in seen}}
    limit = 0 if kind is PackedBatches else 1
    assert all(end <= dataset.split.train_end[user] - limit for user, end in last.items())
    total = sum(int((batch["targets"] > 0).sum()) for batch in batches.loader())
    assert total == int(np.maximum(dataset.split.train_end - 1, 0).sum())
