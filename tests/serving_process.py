"""Real server processes for tests: started, asked, killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx

from recsys.artifacts import Workspace


class Running(NamedTuple):
    """A server that listens: its process, the lines it printed, and where."""

    process: subprocess.Popen[str]
    printed: list[str]
    url: str

    def client(self) -> httpx.Client:
        """Return a client of it."""
        return httpx.Client(base_url=self.url, timeout=30)


def start(workspace: Workspace, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a server on the workspace and return at once; a busy machine may answer late."""
    own = ["--workspace", str(workspace.root), "--deadline-ms", "60000"]
    command = [sys.executable, "-m", "recsys.serving", *own, *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@contextmanager
def running(workspace: Workspace, *arguments: str, **environment: str) -> Iterator[Running]:
    """Start a server on a free port, wait until it listens, and kill it at the end."""
    process = start(workspace, "--port", "0", *arguments, **environment)
    guard = threading.Timer(120, process.kill)
    guard.start()
    try:
        assert process.stdout
        printed = [process.stdout.readline().rstrip() for _ in range(4)]
        assert printed[1], process.communicate()[1]
        yield Running(process, printed, printed[1].split()[2])
    finally:
        guard.cancel()
        process.kill()
        process.communicate()


def refused(workspace: Workspace, *arguments: str) -> str:
    """Start a server that must not start, and return what it says."""
    process = start(workspace, "--port", "0", *arguments)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert "Traceback" not in err
    return err
