"""The supervisor and its workers as real processes: killed, stopped, unable to start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest

SERVER = Path(__file__).with_name("stand_in_server.py")
MIB = 1 << 20


class Running:
    """A supervisor with its workers, and what it said."""

    def __init__(self, process: subprocess.Popen[str], said: dict[str, Any]) -> None:
        self.process, self.port = process, int(said["port"])
        self.pids = [worker["pid"] for worker in said["workers"]]

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=10)

    def ask(self, path: str = "/pid") -> tuple[int, dict[str, Any]]:
        connection = self.connect()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def living(self) -> list[int]:
        """Pids of the supervisor's workers, without zombies."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if not ended(child.pid)]


def start(workers: int, port: int = 0, **given: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(SERVER), str(workers), str(port), json.dumps(given)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def running(workers: int = 2, port: int = 0, **given: Any) -> Iterator[Running]:
    process = start(workers, port, **given)
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        assert process.stdout
        yield Running(process, json.loads(process.stdout.readline()))
    finally:
        guard.cancel()
        process.kill()
        process.communicate()


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for someone to ask how it ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(true: Callable[[], object], seconds: float) -> float:
    """Wait for something to become true; return how long it took."""
    started = time.perf_counter()
    while not true():
        took = time.perf_counter() - started
        assert took < seconds, f"not within {seconds} s"
        time.sleep(0.01)
    return time.perf_counter() - started


def kept_open(connection: HTTPConnection) -> bool:
    """Ask once more over a connection; return whether the answer leaves it open."""
    connection.request("GET", "/pid")
    response = connection.getresponse()
    response.read()
    assert response.status == 200
    return response.getheader("connection") != "close"


def in_threads(count: int, call: Callable[[], Any]) -> tuple[list[Any], list[threading.Thread]]:
    """Start `count` calls at once; return where their results will be, and the threads."""
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return results, threads


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


def test_it_is_light_and_announces_when_all_workers_are_ready(server: Running) -> None:
    assert len(set(server.pids)) == 2
    assert sorted(server.living()) == sorted(server.pids)
    assert psutil.Process(server.process.pid).memory_info().rss < 40 * MIB
    code = "import sys, recsys.serving.supervisor; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"uvicorn", "numpy", "onnxruntime", "faiss", "starlette"} & set(imported)


def test_connections_opened_at_once_are_shared_out(server: Running) -> None:
    for _ in range(3):
        connections = [server.connect() for _ in range(16)]
        for connection in connections:
            connection.connect()
        for connection in connections:
            connection.request("GET", "/pid")
        answers = [json.loads(c.getresponse().read()) for c in connections]
        share = Counter(answer["number"] for answer in answers)
        assert min(share[0], share[1]) >= 6, share
        for connection in connections:
            connection.close()
        time.sleep(0.05)


def test_a_killed_worker_is_back_and_others_answer_meanwhile(server: Running) -> None:
    folder = Path(server.ask()[1]["folder"])
    for _ in range(2):
        victim, kept = server.living()
        gauge, count = folder / f"gauge_liveall_{victim}.db", folder / f"counter_{victim}.db"
        gauge.touch()
        count.touch()
        os.kill(victim, signal.SIGKILL)
        asked = time.perf_counter()
        for _ in range(20):
            assert server.ask()[1]["pid"] != victim
        assert time.perf_counter() - asked < 1
        until(lambda gone=victim: gone not in (found := server.living()) and len(found) == 2, 3)
        assert kept in server.living()
        answering = set[int]()
        until(lambda seen=answering: seen.add(server.ask()[1]["number"]) or len(seen) == 2, 3)
        assert (gauge.exists(), count.exists()) == (False, True)


def test_sigterm_answers_what_is_in_flight_and_what_comes_in_its_grace() -> None:
    with running(slow_seconds=1.5, grace_seconds=1.0) as server:
        results, threads = in_threads(40, lambda: server.ask("/slow")[0])
        time.sleep(0.3)
        folder = Path(server.ask()[1]["folder"])
        assert folder.is_dir()
        kept = server.connect()
        assert kept_open(kept)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("/readyz")[0] == 503, 0.9)
        assert server.ask()[0] == 200
        until(lambda: not kept_open(kept), 0.9)
        out, err = server.process.communicate(timeout=10)
        assert (server.process.returncode, out, err) == (0, "", "")
        for thread in threads:
            thread.join(5)
        assert results == [200] * 40
        assert not folder.exists()
        assert all(map(ended, server.pids))


def test_a_worker_that_does_not_end_is_killed_at_the_second_ctrl_c() -> None:
    with running(grace_seconds=5) as server:
        server.process.send_signal(signal.SIGINT)
        until(lambda: server.ask("/readyz")[0] == 503, 1)
        server.process.send_signal(signal.SIGINT)
        _, err = server.process.communicate(timeout=2)
        assert server.process.returncode == 0
        assert "workers_killed" in err


def test_a_worker_stopped_alone_drains_and_is_started_again() -> None:
    with running(slow_seconds=0.5) as server:
        pid = server.ask()[1]["pid"]
        results, threads = in_threads(8, lambda: server.ask("/slow")[0])
        time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)
        until(lambda: pid not in server.living() and len(server.living()) == 2, 5)
        for thread in threads:
            thread.join(5)
        assert results == [200] * 8


def test_killing_the_supervisor_frees_the_port_at_once() -> None:
    with running() as server:
        folder = Path(server.ask()[1]["folder"])
        server.process.kill()
        until(lambda: all(map(ended, server.pids)), 2)
        assert not folder.exists()
        with running(port=server.port) as again:
            assert again.ask()[0] == 200


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"fails": 1}, "error: no bundle here; next: recsys export\n"),
        ({"crashes": 1}, "error: worker 2 of 2 ended before it was ready (exit code 1); what it"),
    ],
)
def test_a_worker_that_cannot_start_stops_the_start(given: dict[str, int], part: str) -> None:
    process = start(2, **given)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert part in err


def test_a_worker_that_keeps_dying_is_started_again_with_pauses() -> None:
    with running(workers=1) as server:
        supervisor = psutil.Process(server.process.pid)
        deaths, limit = 0, time.perf_counter() + 2
        seen = set[int]()
        while time.perf_counter() < limit:
            for child in supervisor.children():
                if child.pid not in seen:
                    seen.add(child.pid)
                    deaths += 1
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            time.sleep(0.005)
        # Without pauses, a process that dies at once is started again some hundred times.
        assert 4 <= deaths <= 8
        until(lambda: answers(server), 5)


def answers(server: Running) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as caller:
            caller.sendall(b"GET /pid HTTP/1.1\r\nhost: x\r\n\r\n")
            return caller.recv(12) == b"HTTP/1.1 200"
    except OSError:
        return False
