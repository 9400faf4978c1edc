"""A continued training: from a run's weights, on what is new, with a share of the old."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from recsys.artifacts import Workspace, write_manifest
from recsys.cli import main
from recsys.data.batches import PackedBatches, PairBatches
from recsys.data.dataset import Dataset
from recsys.data.fresh import Fresh
from recsys.history import Histories, pack
from recsys.schema import InputError
from recsys.training.gate import main as gate
from recsys.training.growth import grow_weights
from recsys.training.runs import BEFORE, build_model, load_run, read_config

USERS, ITEMS, DAYS = 60, 24, 9
DAY = 86_400
SIDE = "item_features.tables.side.weight"
SMALL = "trainer=cpu model.dim=16 optimizer.lr=0.01 patience=null logger=csv"
TRAJECTORY = f"{SMALL} model.dropout=0.1 batches.size=16 trainer.max_epochs=6"
TWO_TOWER = (
    f"{SMALL} model=two_tower batches=pairs loss=in_batch_softmax trainer.max_epochs=4 "
    "model.user_ids=true model.item_features=[side] model.user_features=[land]"
)


def rows(day: int) -> list[tuple]:
    """Three steps along a ring a day; from day 6 on it has two more items, and two more users."""
    ring = ITEMS + 2 * (day >= 6)
    return [
        (f"u{u}", f"i{(u + 3 * day + e) % ring}", 1_700_000_000 + day * DAY + u * 60 + e * 3600)
        for u in range(USERS + 2 * (day >= 6))
        for e in range(3)
    ]


def write_csv(path: Path, head: list[str], body: list) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *body])
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the dataset of six days, two runs on it, and the dataset of nine."""
    root = tmp_path_factory.mktemp("continual")
    head = ["user_id", "item_id", "timestamp"]
    first = write_csv(root / "first.csv", head, [r for day in range(6) for r in rows(day)])
    more = write_csv(root / "more.csv", head, [r for day in range(6, DAYS) for r in rows(day)])
    sides = [(f"i{i}", "new" if i == ITEMS else "left" if i % 2 else "right") for i in range(26)]
    items = write_csv(root / "items.csv", ["item_id", "side"], sides)
    lands = [(f"u{u}", "far" if u >= USERS else "here") for u in range(USERS + 2)]
    users = write_csv(root / "users.csv", ["user_id", "land"], lands)
    tables = [f"data.source.items={items}", f"data.source.users={users}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(root / "home"))
        base = ["prepare", "data=events", *tables]
        assert main([*base, f"data.path={first}", "split=days", "data.name=old"]) == 0
        assert main(["train", *TRAJECTORY.split(), "name=path"]) == 0
        assert main(["train", *TWO_TOWER.split(), "name=towers"]) == 0
        assert main([*base, f"data.path={more}", "grow.onto=latest"]) == 0
    return root / "home"


@pytest.fixture
def workspace(home: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("RECSYS_HOME", str(home))
    return Workspace()


def datasets(workspace: Workspace) -> tuple[Dataset, Dataset]:
    now = Dataset(workspace.find("dataset"))
    return Dataset(Path(now.manifest["grown"]["onto"]["path"])), now


def continued(command: str) -> dict:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["train", *command.split(), "data.dataset=latest", "--json"]) == 0
    return json.loads(said.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def second(home: Path) -> dict[str, dict]:
    """What the continued trainings `path-2` and `towers-2` said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return {
            "path": continued("resume_from=path name=path-2 trainer.max_epochs=3 logger=mlflow"),
            "towers": continued("resume_from=towers name=towers-2 trainer.max_epochs=6"),
        }


def test_pack_leaves_out_targets_that_may_not_be() -> None:
    histories = Histories.of([(np.array([5, 6, 7, 8]), np.ones(4, int), np.arange(4) * 1000)])
    arrays = pack(histories, 4, trains=np.array([True, False, False, True]))
    assert arrays["targets"].tolist() == [[0, 0, 8, 0]]
    assert arrays["items"].tolist() == [[5, 6, 7, 0]]
    assert arrays["segments"].tolist() == [[1, 1, 1, 0]], "what is no target is context"


def targets_of(batches: Any) -> list[tuple[int, int]]:
    """Return the (user row, item) of an epoch's targets; of packed ones the user is -1."""
    found: list[tuple[int, int]] = []
    for step in range(batches.steps):
        batch = batches[0, step]
        targets = batch["targets"][batch["targets"] > 0].tolist()
        users = (batch["users"] - 1).tolist() if "users" in batch else [-1] * len(targets)
        found += zip(users, targets, strict=True)
    return found


def test_fresh_events_are_those_that_the_run_before_has_not_trained_on(
    workspace: Workspace,
) -> None:
    old, now = datasets(workspace)
    fresh = Fresh.since(old, now, 0.0)
    np.testing.assert_array_equal(fresh.first_U[: old.num_users], old.split.train_end)
    assert (fresh.first_U[old.num_users :] == 0).all()
    np.testing.assert_array_equal(fresh.held_U[: old.num_users], old.split.test)
    places = [
        (u, p)
        for u in range(now.num_users)
        for p in range(max(1, fresh.first_U[u]), now.split.train_end[u])
        if p != fresh.held_U[u]
    ]
    expected = sorted((u, int(now.events["items"][now.offsets[u] + p])) for u, p in places)
    pairs = PairBatches(now, 8, 0, 20, fresh=fresh)
    assert sorted(targets_of(pairs)) == expected
    packed = PackedBatches(now, 8, 0, 20, fresh=fresh)
    items = sorted(item for _, item in expected)
    assert sorted(item for _, item in targets_of(packed)) == items
    counts = np.bincount(items, minlength=now.num_items + 1)
    np.testing.assert_allclose(fresh.share(now), counts / counts.sum())


@pytest.mark.parametrize("layout", [PairBatches, PackedBatches])
def test_replay_is_a_share_of_every_batch(layout: Any, workspace: Workspace) -> None:
    old, now = datasets(workspace)
    batches = layout(now, 20, 0, 20, fresh=Fresh.since(old, now, 0.25))
    for step in range(batches.steps - 1):
        rows_B = batches.order.rows(0, step * 20, step * 20 + 20)
        assert abs(int((rows_B >= batches.new).sum()) - 5) <= 1
    assert abs(batches.total - batches.new / 0.75) < 1
    assert batches.fresh.share(now).sum() == pytest.approx(1)
    old_ones = [set(batches.order.rows(e, 0, batches.total).tolist()) for e in (0, 1)]
    assert old_ones[0] != old_ones[1], "other old ones each epoch"


@pytest.mark.parametrize("name", ["path", "towers"])
def test_a_continued_run_learns_the_new_and_reports_the_old(
    name: str, workspace: Workspace, second: dict[str, dict]
) -> None:
    found = second[name]
    run, before = (load_run(workspace.find("run", n)) for n in (f"{name}-2", name))
    assert run.config.model == before.config.model
    assert run.config.optimizer == before.config.optimizer
    typed = {"path": 3, "towers": 6}
    assert run.manifest["epochs"] == typed[name], (
        "what is typed changes a setting of the run before"
    )
    # A few steps on two days' events: better than none.
    assert found["test"]["ndcg@10"] > found[BEFORE]["ndcg@10"]
    assert found["old_holdout_before"] == before.manifest["metrics"]["test"]
    assert found["old_holdout"]["ndcg@10"] > 0.5 * found["old_holdout_before"]["ndcg@10"]
    assert run.manifest["parent"]["name"] == name
    assert run.manifest["chain"] == [name]


def test_mlflow_knows_the_lineage(workspace: Workspace, second: dict[str, dict]) -> None:
    manifest = load_run(workspace.find("run", "path-2")).manifest
    run = MlflowClient(workspace.tracking_uri).get_run(manifest["mlflow_run_id"])
    assert run.data.tags["parent_run"] == "path"
    assert run.data.tags["chain"] == "path"
    assert run.data.metrics["old holdout/ndcg_at_10"] == pytest.approx(
        second["path"]["old_holdout"]["ndcg@10"]
    )
    assert "old holdout before/ndcg_at_10" in run.data.metrics


@pytest.mark.parametrize("name", ["path", "towers"])
def test_known_rows_stay_and_new_ones_start_near_what_is_alike(
    name: str, workspace: Workspace
) -> None:
    _, now = datasets(workspace)
    before = load_run(workspace.find("run", name))
    torch.manual_seed(0)
    model = build_model(before.config, now)
    random = {n: w.clone() for n, w in model.state_dict().items()}
    grow_weights(model, before, now)
    new, old = model.state_dict(), before.model.state_dict()
    known = before.dataset.num_items
    assert now.num_items == known + 2
    torch.testing.assert_close(new["items.weight"][: known + 1], old["items.weight"])
    assert not torch.equal(new["items.weight"][known + 1 :], random["items.weight"][known + 1 :])
    # In training the new items follow i22, i23 and go before i0, i1.
    index = {i: n for n, i in enumerate(now.items["item_id"].to_pylist(), 1)}
    likeness = torch.cosine_similarity(new["items.weight"], new["items.weight"][[known + 1]])
    near = [likeness[index[i]] for i in ("i22", "i23", "i0", "i1")]
    assert torch.stack(near).mean() > likeness[1 : known + 1].mean()
    if name == "towers":
        same = {"left": (1, 1), "right": (3, 2), "unknown": (0, 0)}
        for row, source in same.values():
            key = "item_features.tables.side.weight"
            torch.testing.assert_close(new[key][row], old[key][source])
        torch.testing.assert_close(
            new["item_features.tables.side.weight"][2],
            random["item_features.tables.side.weight"][2],
        )
        torch.testing.assert_close(new["users.weight"][: USERS + 1], old["users.weight"])


def test_an_interrupted_continued_run_goes_on(
    workspace: Workspace, second: dict[str, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    run = workspace.folder("run") / "cut"
    continued("resume_from=path name=cut trainer.max_epochs=1")
    (run / "manifest.json").unlink()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("max_epochs: 1", "max_epochs: 3"))
    capsys.readouterr()
    assert main(["train", "resume_from=cut", "data.dataset=latest"]) == 2
    assert "is not finished; go on with it: recsys train resume=cut" in capsys.readouterr().err
    assert main(["train", "resume=cut", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for part in ("test", "old_holdout", "old_holdout_before"):
        assert result[part] == second["path"][part]


def test_the_gate_ends_with_3_where_a_run_is_worse(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"test": 0.39, BEFORE: 0.4, "old_holdout": 0.3, "old_holdout_before": 0.3}
    run = workspace.folder("run") / "gated"
    run.mkdir()
    metrics = {name: {"ndcg@10": value} for name, value in figures.items()}
    write_manifest(run, "run", metrics=metrics)
    assert gate(["gated", "--new", "0.03"]) == 0
    assert gate(["gated", "--new", "0.02"]) == 3
    assert "0.3900, before 0.4000, at least 0.3920 wanted: worse" in capsys.readouterr().err
    assert gate(["gated", "--new", "0.03", "--old", "-0.01"]) == 3
    assert gate(["path"]) == 2
    assert "run path was not continued from another" in capsys.readouterr().err
    shutil.rmtree(run)


MISTAKES = {
    "resume_from=path model.dim=32": "is another model: model.dim=32 (there 16); leave these out",
    "resume_from=path model=two_tower": "model._target_=recsys.models.TwoTower (there recsys",
    "resume_from=path replay=1": "replay=1: expected a share, 0 or more and below 1",
    "resume_from=path item_start=cooccurrence": "item_start=cooccurrence has no effect with",
    "resume_from=path experiment=beauty": "experiment=beauty has no effect with resume_from=path",
    "resume_from=path data.dataset=old": "it was trained on this very dataset, old-",
    "replay=0.3": "replay has no effect without a run to continue: resume_from=RUN",
    "resume=path": "or train a new run from its weights on new days: resume_from=path",
    "resume_from=nope": "no run named 'nope'",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_explained(
    command: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    old, _ = datasets(workspace)
    runs = set(workspace.folder("run").iterdir())
    assert main(["train", *command.replace("=old", f"={old.path.name}").split()]) == 2
    assert MISTAKES[command] in capsys.readouterr().err
    assert set(workspace.folder("run").iterdir()) == runs, "a refused training leaves nothing"


def test_a_dataset_that_did_not_grow_from_the_runs_is_refused(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = ["user_id", "item_id", "timestamp"]
    other = write_csv(tmp_path / "other.csv", head, [r for d in range(7) for r in rows(d)])
    latest = workspace.find("dataset").name
    assert main(["prepare", "data=events", f"data.path={other}", "split=days", "data.name=o"]) == 0
    found = workspace.find("dataset").name
    assert main(["train", "resume_from=path", f"data.dataset={found}"]) == 2
    assert f"from which {found} has not grown" in capsys.readouterr().err
    workspace.mark_latest("dataset", workspace.find("dataset", latest))


def test_days_that_bring_nothing_to_train_on_are_refused(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, now = datasets(workspace)
    early = [("u0", "i0", 1_690_000_000), ("u1", "i1", 1_690_000_000)]
    path = write_csv(tmp_path / "early.csv", ["user_id", "item_id", "timestamp"], early)
    step = ["prepare", "data=events", f"data.path={path}", f"grow.onto={old.path.name}"]
    assert main(step) == 0
    assert main(["train", "resume_from=path"]) == 2
    assert f"is new to run path: what came after {old.path.name}" in capsys.readouterr().err
    shutil.rmtree(workspace.find("dataset"))
    workspace.mark_latest("dataset", now.path)


def test_a_model_that_would_read_more_is_refused(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, now = datasets(workspace)
    before = load_run(workspace.find("run", "path"))
    config = read_config(before.path)
    config.model.context = False
    with pytest.raises(InputError, match="would read items, lengths, gaps: the new days brought"):
        grow_weights(build_model(config, now), before, now)
