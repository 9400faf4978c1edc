"""Directories are written whole or not at all, and refused when they are not what they say."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from recsys.artifacts import (
    LAST,
    Workspace,
    read_manifest,
    verify,
    write_json,
    write_manifest,
    writing,
)
from recsys.cli import explain
from recsys.schema import InputError


def made(path: Path, text: str = "hello") -> Path:
    with writing(path) as scratch:
        (scratch / "data.txt").write_text(text)
        write_manifest(scratch, "dataset", name="d")
    return path


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = made(tmp_path / "thing", "old")
    with pytest.raises(ZeroDivisionError), writing(path) as scratch:
        (scratch / "data.txt").write_text(str(1 / 0))
    assert (path / "data.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_good_write_replaces_the_old_one_whole(tmp_path: Path) -> None:
    made(tmp_path / "thing", "old")
    path = made(tmp_path / "thing", "new")
    assert (path / "data.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99; this recsys .* reads version 2"),
        ({"kind": "bundle"}, "expected a dataset, found a bundle"),
    ],
)
def test_another_version_or_kind_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = made(tmp_path / "thing")
    manifest = json.loads((path / "manifest.json").read_text())
    write_json(path / "manifest.json", manifest | change)
    with pytest.raises(InputError, match=message):
        read_manifest(path, "dataset")


def test_no_manifest_or_half_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest.json in it; make it again with"):
        read_manifest(tmp_path, "run")
    (tmp_path / LAST).parent.mkdir()
    (tmp_path / LAST).write_bytes(b"weights")
    with pytest.raises(InputError, match=rf"not finished.*recsys train resume={tmp_path.name}"):
        read_manifest(tmp_path, "run")
    (tmp_path / "manifest.json").write_text('{"kind": "ru')
    with pytest.raises(InputError, match="not JSON"):
        read_manifest(tmp_path, "run")


@pytest.mark.parametrize("damage", ["byte", "missing", "short"])
def test_a_changed_file_is_named(tmp_path: Path, damage: str) -> None:
    path = made(tmp_path / "thing")
    file = path / "data.txt"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("hellO" if damage == "byte" else "hell")
    with pytest.raises(InputError, match=r"data\.txt"):
        verify(path, read_manifest(path, "dataset"))


def test_latest_moves_and_names_are_found(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first, second = (made(workspace.folder("dataset") / name) for name in ("a", "b"))
    workspace.mark_latest("dataset", first)
    workspace.mark_latest("dataset", second)
    assert workspace.find("dataset") == second
    assert workspace.find("dataset", "a") == workspace.find("dataset", str(first)) == first
    with pytest.raises(InputError, match=r"no dataset named 'c' in .*; there is: a, b; make one"):
        workspace.find("dataset", "c")
    with pytest.raises(InputError, match="no dataset named '' in"):
        workspace.find("dataset", "")


def test_a_full_disk_is_explained_and_our_own_mistakes_are_not() -> None:
    assert "no space left" in str(explain(OSError(errno.ENOSPC, "No space left", "/x")))
    assert explain(ZeroDivisionError()) is None
