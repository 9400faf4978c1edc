"""scripts/download.py, bench_prepare.py and bench_grow.py, without a network and small."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from recsys.artifacts import Workspace

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def download() -> ModuleType:
    return script("download")


def archive(names: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, text in names.items():
            packed.writestr(name, text)
    return stream.getvalue()


class Answer(io.BytesIO):
    headers: dict[str, str] = {}  # noqa: RUF012


def served(monkeypatch: pytest.MonkeyPatch, module: ModuleType, body: bytes, **facts: Any) -> None:
    name = "ml-latest-small"
    monkeypatch.setitem(module.DATASETS, name, replace(module.DATASETS[name], **facts))
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda *_, **__: Answer(body))


GOOD = archive({"ml-latest-small/ratings.csv": "a", "ml-latest-small/movies.csv": "b"})


def test_download_checks_and_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: ModuleType, capsys: Any
) -> None:
    served(monkeypatch, download, GOOD, md5=hashlib.md5(GOOD).hexdigest())
    download.fetch("ml-latest-small", tmp_path)
    assert (tmp_path / "ml-latest-small" / "ratings.csv").read_text() == "a"
    assert "next: recsys prepare data=movielens data.path=" in capsys.readouterr().out


def test_download_refuses_another_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: ModuleType
) -> None:
    served(monkeypatch, download, GOOD, md5="0" * 32)
    with pytest.raises(SystemExit, match=r"MD5 is .* its publisher says 0000"):
        download.fetch("ml-latest-small", tmp_path)


def test_download_refuses_entries_that_point_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: ModuleType
) -> None:
    served(monkeypatch, download, archive({"../../evil": "x"}), md5=None)
    with pytest.raises(SystemExit, match="points outside"):
        download.fetch("ml-latest-small", tmp_path / "in")
    assert not (tmp_path.parent / "evil").exists()


def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: ModuleType
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(download.urllib.request, "urlopen", offline)
    with pytest.raises(SystemExit) as caught:
        download.fetch("ml-1m", tmp_path)
    message = str(caught.value)
    assert "https://files.grouplens.org/datasets/movielens/ml-1m.zip" in message
    assert f"c4d9eecfca2ab87c1945afe126590906) in {tmp_path}" in message
    with pytest.raises(SystemExit, match=r"login.*\n.*kaggle.*\n.*put otto-recsys-train.jsonl in"):
        download.fetch("otto", tmp_path)


def test_bench_reports_rate_and_memory(tmp_path: Path) -> None:
    bench = script("bench_prepare")
    bench.generate(tmp_path / "log", 5_000, 200, 50, seed=0)
    settings = {"name": "bench", "path": str(tmp_path / "log"), "min_item_events": 2}
    said = bench.measure(tmp_path / "log", tmp_path / "w", settings, "temporal")
    assert said["source_rows"] == 5_000
    assert said["rows_a_second"] > 0
    assert 50 < said["peak_mib"] < 4096


def test_bench_grow_puts_each_day_onto_the_old_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    script("bench_grow").measure(tmp_path, 3000, [200, 500], "1GB", (100, 50))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("day") for row in rows] == [None, 200, 500]
    made = Workspace(tmp_path / "workspace").folder("dataset").glob("base-*/manifest.json")
    assert len(list(made)) == 3
