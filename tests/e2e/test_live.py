"""A person's path over HTTP, with real processes: used at once, kept through kills, shared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import Workspace
from redis_server import RedisServer
from serving_process import Running, running
from tiny_bundles import AISLES, write_tiny_bundle


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    path = write_tiny_bundle(workspace.folder("bundle") / "tiny-1", num_items=500)
    workspace.mark_latest("bundle", path)
    return workspace


def post(client: httpx.Client, **event: object) -> dict[str, object]:
    response = client.post("/v1/events", json=event)
    assert response.status_code == 200, response.text
    return dict(response.json())


def aisles(client: httpx.Client, user: str) -> list[str]:
    answer = client.post("/v1/recommend", json={"user_id": user}).json()
    return [item["category"] for item in answer["items"]]


def test_a_path_that_changes_aisle_changes_the_answer_at_once(workspace: Workspace) -> None:
    """Items i9, i13, … are of the first aisle, i10, i14, … of the second, and so on."""
    with running(workspace, "--workers", "2") as server, server.client() as client:
        answer = client.post("/v1/recommend", json={"user_id": "new"}).json()
        assert answer["source"] == "popular"
        for turn, aisle in enumerate((0, 1, 2, 3, 0)):
            post(client, user_id="new", item_id=f"i{9 + aisle + 4 * turn}")
            assert aisles(client, "new") == [AISLES[aisle]] * 10


def test_a_known_users_path_goes_on_where_the_bundle_ends(workspace: Workspace) -> None:
    with running(workspace) as server, server.client() as client:
        before = client.post("/v1/recommend", json={"user_id": "u1"}).json()
        post(client, user_id="u1", item_id="i12", event_id="e1")
        after = client.post("/v1/recommend", json={"user_id": "u1"}).json()
        assert (before["history_used"], after["history_used"]) == (3, 4)
        shown = client.get("/v1/users/u1").json()
        assert (shown["bundle_events"], len(shown["events"])) == (3, 1)
        assert shown["events"][0]["event_id"] == "e1"


def test_an_erased_person_is_gone_everywhere(workspace: Workspace) -> None:
    flags = ("--rotate-seconds", "1")
    with running(workspace, *flags) as server, server.client() as client:
        post(client, user_id="u1-secret", item_id="i9", event_id="e1")
        client.post("/v1/recommend", json={"user_id": "u1-secret"})
        log = workspace.root / "serving" / "log"
        wait_for(lambda: len(list(log.glob("events/*.parquet"))) > 0)
        wait_for(lambda: len(list(log.glob("answers/*.parquet"))) > 0)
        erased = client.delete("/v1/users/u1-secret").json()
        assert (erased["events"], erased["log_rows"]) == (1, 2)
        assert client.get("/v1/users/u1-secret").json()["events"] == []
        client.delete("/v1/users/u1")
        assert client.post("/v1/recommend", json={"user_id": "u1"}).json()["source"] == "popular"
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
    for file in (workspace.root / "serving" / "log").rglob("*"):
        assert not file.is_file() or b"u1-secret" not in file.read_bytes()


def wait_for(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_acknowledged_events_survive_kill_9_of_workers_and_server(workspace: Workspace) -> None:
    """Each event is posted until it is acknowledged; then each must be there once."""
    flags = ("--workers", "2", "--port", "0")
    for round_ in range(2):
        with running(workspace, *flags) as server, server.client() as client:
            for number in range(30):
                if number in (10, 20):
                    worker = psutil.Process(server.process.pid).children()[0]
                    os.kill(worker.pid, signal.SIGKILL)
                until_acknowledged(server, f"{round_}-{number}")
            client.close()
            server.process.kill()
    with running(workspace, *flags, "--rotate-seconds", "1") as server, server.client() as client:
        kept = [event["event_id"] for event in client.get("/v1/users/ann").json()["events"]]
        log = workspace.root / "serving" / "log" / "events"
        wait_for(lambda: len(logged(log)) >= 60)
    wanted = sorted(f"{r}-{n}" for r in range(2) for n in range(30))
    assert sorted(kept) == wanted
    assert sorted(logged(log)) == wanted


def until_acknowledged(server: Running, event_id: str) -> None:
    event = {"user_id": "ann", "item_id": "i9", "event_id": event_id}
    for _ in range(100):
        try:
            if httpx.post(f"{server.url}/v1/events", json=event).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{event_id} was never acknowledged")


def logged(log: Path) -> list[str]:
    return [i for f in log.glob("*.parquet") for i in pq.read_table(f)["event_id"].to_pylist()]


def test_two_replicas_share_one_redis(workspace: Workspace, redis: RedisServer) -> None:
    flags = ("--state", redis.url)
    with (
        running(workspace, *flags) as one,
        running(workspace, *flags) as two,
        one.client() as here,
        two.client() as there,
    ):
        post(here, user_id="new", item_id="i10", event_id="e1")
        assert aisles(there, "new") == [AISLES[1]] * 10
        one.process.kill()
        one.process.wait()
        post(there, user_id="new", item_id="i11", event_id="e2")
        assert post(there, user_id="new", item_id="i10", event_id="e1")["repeated"] == 1
        assert aisles(there, "new") == [AISLES[2]] * 10
        events = there.get("/v1/users/new").json()["events"]
        assert [event["event_id"] for event in events] == ["e1", "e2"]


def test_redis_gone_and_back(workspace: Workspace, redis: RedisServer) -> None:
    with running(workspace, "--state", redis.url) as server, server.client() as client:
        post(client, user_id="new", item_id="i10", event_id="e1")
        redis.kill()
        response = client.post("/v1/events", json={"user_id": "new", "item_id": "i11"})
        assert (response.status_code, response.json()["error"]["code"]) == (
            (503, "state_unavailable")
        )
        assert client.post("/v1/recommend", json={"user_id": "u1"}).json()["source"] == "model"
        redis.start()
        wait_for(lambda: aisles(client, "new") == [AISLES[1]] * 10)


def test_the_log_becomes_a_model_that_is_tried_and_promoted(tmp_path: Path) -> None:
    """Events → log → prepare → train → export → challenger: shadow, canary, champion."""
    workspace = Workspace(tmp_path / "workspace")
    recsys = [sys.executable, "-m", "recsys.cli"]
    environment = {**os.environ, "RECSYS_HOME": str(workspace.root)}

    def run(*words: str) -> dict[str, object]:
        done = subprocess.run(
            [*recsys, *words, "--json"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    small = ("trainer.max_epochs=1", "model.dim=8", "model.layer.heads=1", "logger=csv")
    first = ("data=synthetic", "data.source.num_users=200", "data.source.num_items=60")
    run("prepare", *first, "data.source.events_per_user=8")
    run("train", *small)
    champion = Path(str(run("export", "registry.name=null")["bundle"]))
    with running(workspace, "--rotate-seconds", "1") as server, server.client() as client:
        items = [f"item-{n:06d}" for n in range(1, 31)]
        events = [
            {"user_id": f"p{u}", "item_id": items[(u + n) % 30], "event_id": f"{u}-{n}"}
            for u in range(40)
            for n in range(6)
        ]
        assert client.post("/v1/events", json=events).json()["accepted"] == len(events)
        log = workspace.root / "serving" / "log"
        wait_for(lambda: len(logged(log / "events")) == len(events))
        served = run("prepare", "data=served", f"data.path={log}")
        assert (served["num_users"], served["num_events"]) == (40, len(events))
        run("train", *small)
        challenger = Path(str(run("export", "registry.name=null")["bundle"]))
        body = {"bundle": str(challenger), "mode": "shadow"}
        assert client.post("/admin/challenger", json=body).status_code == 200
        assert named(client, 20) == {champion.name}
        wait_for(lambda: compared(client) >= 10)
        body = {"bundle": str(challenger), "mode": "canary", "share": 0.5}
        assert client.post("/admin/challenger", json=body).status_code == 200
        assert named(client, 40) == {champion.name, challenger.name}
        assert client.post("/admin/challenger/promote").status_code == 200
        assert named(client, 20) == {challenger.name}
        assert client.post("/admin/bundles/rollback").status_code == 200
        assert named(client, 20) == {champion.name}


def compared(client: httpx.Client) -> int:
    return int(client.get("/admin/challenger").json()["trial"]["shadow"]["compared"])


def named(client: httpx.Client, users: int) -> set[str]:
    asked = [client.post("/v1/recommend", json={"user_id": f"p{u}"}).json() for u in range(users)]
    return {answer["bundle"] for answer in asked}
