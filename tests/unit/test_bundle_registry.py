"""A registered bundle is found by name and alias, comes back unchanged, and predicts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.artifacts import Workspace
from recsys.export import registry
from recsys.index.bundle import Bundle
from recsys.schema import InputError
from tiny_bundles import write_tiny_bundle

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with version 1 (promoted) and version 2 of the model `shop`."""
    workspace = Workspace(tmp_path_factory.mktemp("registry"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(workspace.root)
        for name, promote in (("one", True), ("two", False)):
            path = write_tiny_bundle(workspace.folder("bundle") / name, num_items=20 + len(name))
            version = registry.register(path, workspace, "shop", promote=promote)
            assert version == {"one": "1", "two": "2"}[name]
        yield workspace


def test_resolves_to_the_workspaces_own_copy(workspace: Workspace) -> None:
    bundles = workspace.folder("bundle")
    assert registry.resolve("models:/shop@champion", workspace) == bundles / "one"
    assert registry.resolve("models:/shop/2", workspace) == bundles / "two"


def test_says_nothing_itself(workspace: Workspace) -> None:
    code = f"""
from pathlib import Path
import shutil
from recsys.artifacts import Workspace
from recsys.export import registry
workspace = Workspace({str(workspace.root / "quiet")!r})
from tiny_bundles import write_tiny_bundle
path = write_tiny_bundle(workspace.folder("bundle") / "one")
registry.register(path, workspace, "shop", promote=True)
shutil.rmtree(path)
registry.resolve("models:/shop@champion", workspace)
"""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_comes_back_where_the_copy_is_gone(workspace: Workspace) -> None:
    kept = workspace.folder("bundle") / "two"
    wanted = Bundle.open(kept).manifest
    shutil.rmtree(kept)
    path = registry.resolve("models:/shop/2", workspace)
    assert path == kept
    assert Bundle.open(path).manifest == wanted
    assert not list(kept.parent.glob(".*"))


def test_never_over_another_bundle_of_that_name(workspace: Workspace) -> None:
    path = workspace.folder("bundle") / "one"
    aside = path.rename(workspace.root / "aside")
    try:
        write_tiny_bundle(path, num_items=50)
        found = registry.resolve("models:/shop/1", workspace)
        assert found.name.startswith("one-")
        assert Bundle.open(found).num_items == 23
        assert Bundle.open(path).num_items == 50
    finally:
        shutil.rmtree(path)
        aside.rename(path)


def test_promoting_moves_the_alias(workspace: Workspace) -> None:
    three = write_tiny_bundle(workspace.folder("bundle") / "three", num_items=40)
    registry.register(three, workspace, "other")
    with pytest.raises(InputError, match="other has versions 1 and aliases none"):
        registry.resolve("models:/other@champion", workspace)
    registry.register(three, workspace, "other", promote=True)
    assert registry.resolve("models:/other@champion", workspace) == three


def test_nothing_is_left_where_the_command_ran(workspace: Workspace) -> None:
    assert not (workspace.root / "mlruns").exists()
    assert (workspace.root / "mlartifacts").is_dir()
    assert mlflow.active_run() is None
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_predicts_as_the_engine_does(workspace: Workspace) -> None:
    """Loaded by MLflow in a process of its own, without torch and without a pickle."""
    code = f"""
import sys, mlflow, pandas as pd
mlflow.set_tracking_uri({workspace.tracking_uri!r})
model = mlflow.pyfunc.load_model("models:/shop@champion")
users, histories = ["u1", None, None], [[], ["i9", "i10"], []]
table = pd.DataFrame({{"user_id": users, "history": histories}})
answers = model.predict(table, params={{"k": 4}})
from recsys.serving.engine import Engine
from recsys.serving.messages import RecommendRequest as R
engine = Engine.load({str(workspace.folder("bundle") / "one")!r})
asked = [R(user_id="u1", k=4), R(history=["i9", "i10"], k=4), R(k=4)]
wanted = [[item.item_id for item in answer.items] for answer in engine.recommend(asked)]
assert answers["item_ids"].tolist() == wanted, (answers, wanted)
assert [len(scores) for scores in answers["scores"]] == [4, 4, 4]
assert len(model.predict([{{"user_id": "u1"}}])["item_ids"][0]) == 10
assert len(model.predict(pd.DataFrame({{"history": [["i9"]]}}))) == 1
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stored = [p.name for p in (workspace.root / "mlartifacts").rglob("*") if p.suffix == ".pkl"]
    assert stored == []


def test_signature_and_example_are_stored(workspace: Workspace) -> None:
    try:
        mlflow.set_tracking_uri(workspace.tracking_uri)
        info = mlflow.models.get_model_info("models:/shop/1")
    finally:
        mlflow.set_tracking_uri(None)
    assert info.signature.inputs.input_names() == ["user_id", "history"]
    assert [param.name for param in info.signature.params] == ["k", "exclude_seen"]
    assert info.saved_input_example_info is not None


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/shop", "expected models:/NAME/VERSION or models:/NAME@ALIAS"),
        ("shop@champion", "expected models:/NAME"),
        ("models:/shop/latest", "expected models:/NAME"),
        ("models:/shop/99", "shop has versions .* and aliases champion"),
        ("models:/shop@winner", "shop has versions"),
        ("models:/shoq/1", "no model named 'shoq' is registered; there is: .*shop"),
    ],
)
def test_what_is_not_there(workspace: Workspace, uri: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        registry.resolve(uri, workspace)


def test_damaged_bundle_is_not_registered(workspace: Workspace, tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path / "damaged")
    (path / "encoder.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="content differs"):
        registry.register(path, workspace, "damaged")


def test_importing_needs_no_mlflow() -> None:
    code = "import sys; import recsys.export.registry; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
