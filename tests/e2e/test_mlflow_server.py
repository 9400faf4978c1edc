"""A real MLflow server: what one machine trains and promotes, another fetches and answers from."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from recsys.artifacts import Workspace
from recsys.cli import main

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run a server, to which everything here logs; yield where it keeps files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store, kept = f"sqlite:///{tmp_path / 'server.db'}", tmp_path / "kept"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--artifacts-destination", str(kept), "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    try:
        until_it_answers(f"{url}/health")
        yield kept
    finally:
        process.terminate()
        process.wait(30)


def until_it_answers(url: str) -> None:
    for _ in range(600):
        try:
            urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"no answer from {url}")


def test_another_machine_answers_from_what_was_promoted(
    server: Path,
    tmp_path: Path,
    ring_csv: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, there = Workspace(tmp_path / "here"), Workspace(tmp_path / "there")
    monkeypatch.setenv("RECSYS_HOME", str(here.root))
    assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
    assert main(["train", "trainer=cpu", "model.dim=8", "trainer.max_epochs=1", "name=first"]) == 0
    assert main(["export", "first", "--promote"]) == 0
    assert not (here.root / "mlartifacts").exists()
    kept = {file.name for file in server.rglob("*")}
    assert {"config.yaml", "best.ckpt", "encoder.onnx", "manifest.json"} <= kept
    shutil.rmtree(here.root)
    monkeypatch.setenv("RECSYS_HOME", str(there.root))
    capsys.readouterr()
    asked = ["recommend", "--bundle", "models:/shop@champion", "--history", "i1", "-k", "3"]
    assert main(asked) == 0
    assert "3 recommendations" in capsys.readouterr().out
