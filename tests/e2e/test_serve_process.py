"""A real server process: what it prints, what it answers, how it stops."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import psutil
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import Workspace
from recsys.serving.engine import Engine
from recsys.serving.messages import Answer, RecommendRequest
from serving_process import refused, running
from tiny_bundles import write_tiny_bundle

MIB = 1 << 20


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    path = write_tiny_bundle(workspace.folder("bundle") / "tiny-1", num_items=500)
    workspace.mark_latest("bundle", path)
    return workspace


def test_it_says_what_it_serves_and_the_next_command_works(workspace: Workspace) -> None:
    with running(workspace) as server:
        serving, listening, started, following = server.printed
        assert serving == f"Serving tiny-1 (500 items) from {workspace.find('bundle')}"
        assert listening.startswith("Listening on http://127.0.0.1:")
        assert 0 < float(started.split()[2]) < 60
        assert "1 worker, " in started
        assert 10 < int(started.split()[6]) < 1000
        curl, *rest = shlex.split(following.removeprefix("Next: "))
        assert (curl, rest[0], rest[2]) == ("curl", "-s", "-d")
        answer = httpx.post(rest[1], content=rest[3]).json()
        assert (answer["source"], len(answer["items"])) == ("model", 5)


def test_http_answers_are_the_engines_own(workspace: Workspace) -> None:
    engine = Engine.load(workspace.find("bundle"))
    requests = [RecommendRequest(user_id=f"u{i}", k=20) for i in range(20)]
    with running(workspace) as server, httpx.Client(base_url=server.url) as client:
        for request, own in zip(requests, engine.recommend(requests), strict=True):
            response = client.post("/v1/recommend", content=msgspec.json.encode(request))
            answer = msgspec.json.decode(response.content, type=Answer)
            assert [i.item_id for i in answer.items] == [i.item_id for i in own.items]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(workspace: Workspace, stop: signal.Signals) -> None:
    with running(workspace) as server:
        httpx.post(f"{server.url}/v1/recommend", json={"user_id": "u1"})
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0)) as raw:
            raw.sendall(b"not HTTP\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
        server.process.send_signal(stop)
        out, err = server.process.communicate(timeout=20)
    assert (server.process.returncode, out) == (0, "")
    lines = [json.loads(line) for line in err.splitlines()]
    events = ["started", "Invalid HTTP request received.", "stopped"]
    assert [line["event"] for line in lines] == events
    assert "u1" not in err


def test_a_body_of_50_mb_is_refused_without_being_kept(
    workspace: Workspace, tmp_path: Path
) -> None:
    def parts() -> Iterator[bytes]:
        yield from (b" " * MIB for _ in range(50))

    # A state of its own: the log of another server would be worked on meanwhile.
    with running(workspace, "--state", str(tmp_path)) as server, server.client() as client:
        client.post("/v1/recommend", json={})
        worker = psutil.Process(server.process.pid).children()[0]
        before = worker.memory_info().rss
        for body in (b" " * 50 * MIB, parts()):
            response = client.post("/v1/recommend", content=body)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
        grown = worker.memory_info().rss - before
        assert grown < 20 * MIB
        assert client.get("/healthz").status_code == 200


def test_a_taken_port_is_named(workspace: Workspace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(workspace, "--port", str(port))
    assert f"port {port} on 127.0.0.1 is taken" in message
    assert f"--port {port + 1}" in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--bundle", "none"), "no bundle named 'none'"),
        (("--host", "no.such.host.invalid"), "cannot listen on host"),
        (("--port", "70000"), "port=70000 is out of range"),
        (("--threads", "0"), "threads=0 is out of range"),
    ],
)
def test_what_cannot_be_served_is_said(
    workspace: Workspace, arguments: tuple[str, ...], part: str
) -> None:
    assert part in refused(workspace, *arguments)


def test_a_damaged_bundle_is_not_served(workspace: Workspace) -> None:
    path = write_tiny_bundle(workspace.folder("bundle") / "damaged")
    file = path / "index.faiss"
    os.truncate(file, file.stat().st_size // 2)
    assert "index.faiss: content differs" in refused(workspace, "--bundle", "damaged")


def test_a_request_in_flight_is_answered_before_it_stops(workspace: Workspace) -> None:
    with running(workspace) as server:

        def body() -> Iterator[bytes]:
            yield b'{"user_id": '
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            yield b'"u1"}'

        response = httpx.post(f"{server.url}/v1/recommend", content=body())
        assert (response.status_code, response.json()["source"]) == (200, "model")
        assert server.process.wait(20) == 0


def test_what_it_answered_and_took_is_in_its_log_when_it_has_stopped(
    workspace: Workspace, tmp_path: Path
) -> None:
    given = ("--workers", "2", "--state", str(tmp_path), "--grace-seconds", "0")
    with running(workspace, *given) as server:
        event = {"user_id": "u1", "item_id": "i1", "event_id": "last"}
        httpx.post(f"{server.url}/v1/events", json=event).raise_for_status()
        answers = [  # over connections of their own, which the workers share
            httpx.post(f"{server.url}/v1/recommend", json={"user_id": f"u{n}"}).json()
            for n in range(20)
        ]
        server.process.terminate()
        assert server.process.wait(20) == 0
    log = tmp_path / "log"
    kept = {kind: pq.ParquetDataset(log / kind).read() for kind in ("answers", "events")}
    assert sorted(kept["answers"]["answer_id"].to_pylist()) == sorted(
        answer["answer_id"] for answer in answers
    )
    assert kept["events"]["event_id"].to_pylist() == ["last"]
    assert not [*(log / "journal").iterdir()]
