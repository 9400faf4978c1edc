"""What goes wrong around a real server: disks, stores, bundles, and settings that cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import lmdb
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import Workspace
from recsys.serving.state import open_state
from serving_process import refused, running
from tiny_bundles import write_tiny_bundle


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    path = write_tiny_bundle(workspace.folder("bundle") / "tiny-1", num_items=500)
    workspace.mark_latest("bundle", path)
    return workspace


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def event(number: int) -> dict[str, str]:
    return {"user_id": f"p{number % 50}", "item_id": "i9", "event_id": f"{number:05}" + "x" * 200}


def test_a_full_disk_loses_no_acknowledged_event(workspace: Workspace, small_disk: Path) -> None:
    flags = ("--state", str(small_disk), "--rotate-seconds", "1")
    with running(workspace, *flags) as server, server.client() as client:
        kept = [n for n in range(20) if post(client, n) == 200]
        (small_disk / "ballast").write_bytes(b"x" * room(small_disk))
        met = {}
        for number in range(20, 1000):
            met[number] = post(client, number)
            if met[number] == 503:
                break
        assert met[number] == 503
        response = client.post("/v1/events", json=event(number))
        assert response.json()["error"]["code"] == "state_unavailable"
        assert "retry-after" in response.headers
        answer = client.post("/v1/recommend", json={"user_id": "p1"}).json()
        assert (answer["source"], answer["history_used"]) == ("model", 1)
        kept += [n for n, status in met.items() if status == 200]
        (small_disk / "ballast").unlink()
        assert post(client, number) == 200
        wanted = {event(n)["event_id"] for n in [*kept, number]}
        assert known(client) == wanted
        wait_for(lambda: sorted(logged(small_disk / "log" / "events")) == sorted(wanted))


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)


def logged(log: Path) -> list[str]:
    return [i for f in log.glob("*.parquet") for i in pq.read_table(f)["event_id"].to_pylist()]


def post(client: httpx.Client, number: int) -> int:
    return client.post("/v1/events", json=event(number)).status_code


def known(client: httpx.Client) -> set[str]:
    people = [client.get(f"/v1/users/p{user}").json() for user in range(50)]
    return {event["event_id"] for person in people for event in person["events"]}


def room(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def test_a_read_only_state_is_said(workspace: Workspace, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = refused(workspace, "--state", str(small_disk))
    assert str(small_disk) in said
    assert "Read-only file system" in said


def test_a_state_of_another_version_is_said(workspace: Workspace, tmp_path: Path) -> None:
    open_state(f"lmdb:{tmp_path / 'state'}", max_events=1, keep_ms=0, sync=False).close()
    with lmdb.open(str(tmp_path / "state"), max_dbs=5) as store, store.begin(write=True) as txn:
        txn.put(b"format", b"7", db=store.open_db(b"meta", txn=txn))
    said = refused(workspace, "--state", str(tmp_path))
    assert "holds format 7, this version reads format 2; serve it with" in said


def test_a_bundle_deleted_while_loaded_goes_on_answering(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    path = write_tiny_bundle(workspace.folder("bundle") / "tiny-1", num_items=500)
    with running(workspace, "--bundle", "tiny-1") as server, server.client() as client:
        body = {"user_id": "u1", "k": 5}
        before = client.post("/v1/recommend", json=body).json()["items"]
        shutil.rmtree(path)
        for _ in range(20):
            assert client.post("/v1/recommend", json=body).json()["items"] == before
        assert client.get("/v1/similar/i9").status_code == 200
        assert client.get("/v1/items/i9").json()["features"]["title"] == "Title 9"


def test_a_head_of_40_kb_is_refused(workspace: Workspace) -> None:
    with running(workspace) as server, server.client() as client:
        response = client.get("/healthz", headers={"x-much": "x" * 40_000})
        assert response.status_code == 431
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--keys", "{tmp}/none"), "cannot read the keys: No such file"),
        (("--keys", "{tmp}/text"), "others can read these keys (mode 644); chmod 600"),
        (("--host", "0.0.0.0"), "there are no API keys: export RECSYS_API_KEYS="),
        (("--tls-cert", "{tmp}/text"), "tls_cert and tls_key go together"),
        (("--tls-cert", "{tmp}/text", "--tls-key", "{tmp}/text"), "both PEM"),
        (("--state", "redis://127.0.0.1:1"), "is not available: Error 111"),
        (("--state", "redis:/127.0.0.1"), "is no folder; expected a folder, redis://"),
        (("--state", "{tmp}/text"), "is no folder; expected a folder, redis://"),
        (("--watch", "shop"), "is no MLflow alias; expected models:/NAME@ALIAS"),
        (("--kafka", "localhost"), "'localhost' is no broker; expected HOST:PORT"),
        (("--otlp", "localhost"), "otlp='localhost' is no address; expected one such as http://"),
        (("--workers", "0"), "workers=0 is out of range; expected 1 to 256"),
        (("--wrkers", "2"), "unrecognized arguments: --wrkers 2"),
    ],
)
def test_a_wrong_setting_is_said(
    workspace: Workspace, tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    (tmp_path / "text").write_text("shop read a-secret-of-the-shop\n")
    (tmp_path / "text").chmod(0o644)
    said = refused(workspace, *(word.replace("{tmp}", str(tmp_path)) for word in arguments))
    assert part in said
    assert "a-secret" not in said
