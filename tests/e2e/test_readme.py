"""README's commands, run as printed: only ports differ, and what serves is stopped at the end.

The server closes its log each second, not each minute, so that nobody waits for the log.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient

from recsys.artifacts import Workspace
from recsys.serving.app import ROUTES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def commands(heading: str) -> list[str]:
    """Return the lines of every bash block below a heading of README."""
    return [line for block in blocks(heading) for line in block]


def blocks(heading: str) -> list[list[str]]:
    """Return the bash blocks below a heading of README, each as its lines."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [block.strip().splitlines() for block in found]


@pytest.fixture
def shop(tmp_path: Path, ring_csv: Path) -> Path:
    """An empty folder with a person's events.csv in it."""
    shutil.copy(ring_csv, tmp_path / "events.csv")
    return tmp_path


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RECSYS_HOME", "MLFLOW_TRACKING_URI")}
    return {**kept, "PATH": f"{BIN}:{kept['PATH']}", "OMP_NUM_THREADS": "1"}


def run(line: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@contextmanager
def running(line: str, url: str, folder: Path) -> Iterator[None]:
    """Run what serves until the block ends, from the moment it answers."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {line}"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(url, process)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, f"ended with {process.returncode} before it answered"
        try:
            urlopen(url, timeout=5).close()
            return
        except URLError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {url}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in commands("Try it") if line.startswith("make ")]
    assert targets[:2] == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.skipif(not shutil.which("curl"), reason="README asks with curl, which is not here")
def test_your_own_events(shop: Path) -> None:
    lines = commands("Your own events")
    port = free_port()
    for line in (line for line in lines if "serve" not in line and "curl" not in line):
        assert "Next" in run(line, shop)
    (serve,) = (line for line in lines if "serve" in line)
    asks = [line for line in lines if "curl" in line]
    assert len(asks) == 6
    started = serve.replace("8000", str(port)) + " --rotate-seconds 1"
    with running(started, f"http://localhost:{port}/readyz", shop):
        answers = [json.loads(run(line.replace("8000", str(port)), shop)) for line in asks]
        while_it_runs(port, shop)
    assert [answer.get("source") for answer in answers[:3]] == ["model", "model", "popular"]
    assert len(answers[0]["items"]) == 5
    assert [one["item_id"] for one in answers[3]["items"]] == ["i3", "i9"]
    assert answers[4]["item_id"] == answers[5]["item_id"] == "i7"


def while_it_runs(port: int, shop: Path) -> None:
    """Run what a running server is asked and told, and look at what it says."""
    live, items, retrain, trial, about = blocks("While it runs")
    post, _, known, batch, kept, erased = answers_to(live, port, shop)
    assert post == {"accepted": 1}
    assert (known["source"], known["history_used"]) == ("model", 1)
    assert [answer["source"] for answer in batch["answers"]] == ["model", "model"]
    assert [event["item_id"] for event in kept["events"]] == ["i7"]
    assert erased["events"] == 1
    added, removed, listed, _ = answers_to(items, port, shop)
    assert (added["by"], removed["repeated"]) == ("like", False)
    assert [(one["item_id"], one["state"]) for one in listed["items"]] == [("i99", "removed")]
    wait_for_files(shop / "workspace" / "serving" / "log" / "events")
    *_, deployed, back = answers_to(retrain, port, shop)
    assert [deployed["generation"], back["generation"]] == [2, 3]
    assert deployed["champion"] != back["champion"] == known["bundle"]
    shadow, canary, report, ended, _, promoted, again = answers_to(trial, port, shop)
    assert [shadow["record"]["mode"], canary["record"]["mode"]] == ["shadow", "canary"]
    assert (report["mode"], report["share"]) == ("canary", 0.1)
    assert ended["record"]["mode"] == "off"
    assert promoted["champion"] == again["champion"] == deployed["champion"]
    health, ready, metrics, described, page = answers_to(about, port, shop)
    assert [health["status"], ready["status"]] == ["ok", "ready"]
    assert "/v1/users/{user_id}" in described["paths"]
    assert "recsys_requests_total" in metrics
    assert "<html" in page


def answers_to(lines: list[str], port: int, folder: Path) -> list[Any]:
    """Run each line; return what curl got, JSON decoded, and of a verb what it printed."""
    return [answer_to(line.replace("8000", str(port)), folder) for line in lines]


def answer_to(line: str, folder: Path) -> Any:
    said = run(line, folder)
    if line.startswith("recsys "):
        assert "Next" in said
        return said
    if not said.startswith(("{", "[")):
        return said
    answer = json.loads(said)
    assert "error" not in answer, f"{line}\n{said}"
    return answer


def wait_for_files(folder: Path) -> None:
    for _ in range(300):
        if list(folder.glob("*.parquet")):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing in {folder}")


def test_every_endpoint_has_a_curl() -> None:
    asked = [asked_by(line) for line in README.splitlines() if line.startswith("curl ")]
    for route in ROUTES:
        path = re.sub(r"\\{\w+\\}", r"[^/]+", re.escape(route.path))
        assert any(how == route.method and re.fullmatch(path, to) for how, to in asked), route.path


def asked_by(line: str) -> tuple[str, str]:
    """Return the method and the path of a line with curl.

    >>> asked_by("curl -s localhost:8000/v1/events -d '{}'")
    ('POST', '/v1/events')
    """
    words = shlex.split(line)
    named = words[words.index("-X") + 1] if "-X" in words else ""
    (to,) = (word.partition("/")[2] for word in words if word.startswith("localhost:"))
    return named or ("POST" if "-d" in words else "GET"), f"/{to}"


def test_step_by_step(shop: Path) -> None:
    *lines, ui = commands("Step by step")
    for line in lines:
        assert "Next" in run(line, shop)
    port = free_port()
    with running(f"{ui} --port {port}", f"http://localhost:{port}/", shop):
        pass
    registered = run("recsys recommend --bundle models:/shop@champion --user u1 -k 3", shop)
    assert "recommendations" in registered


@pytest.mark.skipif(not shutil.which("curl"), reason="README asks with curl, which is not here")
def test_two_stages(tmp_path: Path) -> None:
    (*lines, serve), asks = blocks("Two stages")
    for line in lines:
        assert "Next" in run(line, tmp_path)
    port = free_port()
    with running(serve.replace("8000", str(port)), f"http://localhost:{port}/readyz", tmp_path):
        found, ranked = answers_to(asks, port, tmp_path)
    assert [found["source"], ranked["source"]] == ["model", "model"]
    assert len(ranked["items"]) == 3
    assert ranked["items"][0]["probabilities"].keys() >= {"view", "purchase"}


def test_sweeps(shop: Path) -> None:
    run("recsys prepare data=events data.path=events.csv", shop)
    for line in commands("Settings"):
        run(line, shop)
    runs = [path for path in (shop / "workspace" / "runs").iterdir() if not path.is_symlink()]
    assert len(runs) == 3 + 2
    client = MlflowClient(Workspace(shop / "workspace").tracking_uri)
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert sorted(Counter(run.data.tags["sweep"] for run in found).values()) == [2, 3]


def test_every_experiment_is_named() -> None:
    """Lines that need downloads are only read: their experiment and source must exist."""
    for name in re.findall(r"experiment=(\w+)", README):
        assert (ROOT / "configs" / "experiment" / f"{name}.yaml").is_file()
