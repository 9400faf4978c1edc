"""A server follows a real MLflow alias from a process of its own, and the alias can be moved."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from recsys.artifacts import Workspace
from recsys.export import registry
from recsys.export.follow import Finder
from recsys.index.bundle import Bundle
from recsys.schema import InputError
from recsys.serving.deployment import Deployer, Placed, Record
from recsys.serving.promote import AliasWatch
from tiny_bundles import write_tiny_bundle

pytest.importorskip("mlflow")
URI = "models:/shop@champion"


def bundle(workspace: Workspace, name: str, dim: int) -> Path:
    return write_tiny_bundle(workspace.folder("bundle") / name, num_items=20, dim=dim)


def registered(workspace: Workspace, *bundles: Path) -> None:
    """Register bundles under one name, as `recsys export` does but for the copies in MLflow."""
    with registry._store(workspace) as client:
        client.create_registered_model("shop")
        for path in bundles:
            tags = registry._tags(Bundle.open(path))
            client.create_model_version("shop", str(path), tags=tags)


def test_an_alias_is_followed_and_moved(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = bundle(workspace, "one", 8), bundle(workspace, "two", 6)
    registered(workspace, one, two)
    assert registry.promote(two, workspace, "shop") == "2"
    Record(tmp_path).begin(one)
    deployer = Deployer(tmp_path)
    watch = AliasWatch(deployer, URI, every=3600)
    try:
        watch.look()
        assert watch.error is None
        assert deployer.current.champion.version == "two"
        assert registry.promote(one, workspace, "shop") == "1"
        watch.look()
        assert deployer.current.champion.version == "one"
        assert deployer.record.asked[URI] == Placed.of(Bundle.open(one))
    finally:
        watch.close()
        deployer.close()
    assert watch.asker is not None
    assert watch.asker.process is None

    find = Finder(workspace)
    first = find(URI)
    assert first["path"] == str(one)
    monkeypatch.setattr("recsys.export.follow.resolve", None)  # a version is verified once
    assert find(URI) == first
    with pytest.raises(InputError, match="no model named 'shoq'"):
        find("models:/shoq@champion")

    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        registry, "register", lambda *given, promote: calls.append((given, promote))
    )
    registry.promote(bundle(workspace, "three", 4), workspace, "shop")
    registry.promote(one, workspace, "another 'name'")
    assert [promote for _, promote in calls] == [True, True]  # not registered yet: they are now


def test_the_server_itself_stays_without_mlflow() -> None:
    import subprocess

    code = (
        "import sys, recsys.serving.promote, recsys.serving.trial; "
        "heavy = {'torch', 'pandas', 'mlflow', 'onnxruntime', 'faiss'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
