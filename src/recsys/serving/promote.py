"""Promotion from outside: an MLflow alias that is followed, and a running server that is asked."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec
import structlog

from recsys.artifacts import MANIFEST, Workspace
from recsys.schema import InputError
from recsys.serving.deployment import Deployer, Placed

log = structlog.get_logger("recsys.serving")
KEY = "RECSYS_API_KEY"
LOCK = ".alias.lock"
PATIENCE = 120.0
"""Seconds that the registry may take to answer; a bundle is copied from it in that time too."""
LOADING = 600.0
"""Seconds that a server may take to load and test a bundle."""
AGAIN = 10
"""A bundle that was refused is tried again after so many looks."""


class Asker:
    """Asks MLflow in a process of its own, whose memory and interpreter the server never shares.

    MLflow takes a quarter of a gigabyte, and two seconds of the interpreter's lock to import.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, uri: str) -> Placed:
        """Return the verified bundle that `uri` means; raise InputError where none can be had."""
        try:
            met = json.loads(self._line(uri))
        except (OSError, ValueError) as error:
            self.close()
            raise InputError(f"{uri}: the registry did not answer ({error})") from error
        if "error" in met:
            raise InputError(str(met["error"]))
        return msgspec.convert(met, Placed)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _line(self, uri: str) -> bytes:
        if self.process is None:
            command = [sys.executable, "-P", "-m", "recsys.export.follow"]
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null)
        asked, answered = _pipes(self.process)
        asked.write(uri.encode() + b"\n")
        asked.flush()
        if not select.select([answered], [], [], self.patience)[0]:
            raise OSError(f"nothing in {self.patience:g} s")
        return answered.readline()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin
    assert process.stdout
    return process.stdin, process.stdout


class AliasWatch:
    """Deploys what an MLflow alias such as `models:/shop@champion` means, whenever that changes.

    Of all processes on one state directory one asks, the holder of a lock that the system frees
    with the process. A rollback made here stands until the alias moves. While MLflow fails, or
    what it names is refused, everything stays as it is.
    """

    def __init__(
        self,
        deployer: Deployer,
        uri: str,
        every: float = 30.0,
        ask: Callable[[str], Placed] | None = None,
    ) -> None:
        self.deployer, self.uri, self.every = deployer, uri, every
        self.asker = None if ask else Asker()
        self.ask = ask or self.asker or Asker()
        self.refused: tuple[Placed, int] | None = None
        self.error: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alias", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Ask once, and deploy where the alias has moved; note what fails."""
        try:
            wanted = self.ask(self.uri)
            if wanted != self.deployer.record.asked.get(self.uri) and not self._passed_over(wanted):
                self._deploy(wanted)
            self.error = None
        except Exception as error:
            if str(error) != self.error:
                log.error("alias_failed", uri=self.uri, reason=str(error))
            self.error = str(error)

    def close(self) -> None:
        """Stop asking; close this before the deployer."""
        self._stopping.set()
        if self.asker is not None and (process := self.asker.process) is not None:
            process.kill()  # the thread may be waiting for its answer
        self._thread.join()
        if self.asker is not None:
            self.asker.close()

    def _deploy(self, wanted: Placed) -> None:
        try:
            self.deployer.deploy(wanted.path, by=self.uri, why="the alias", asked_by=self.uri)
            self.refused = None
        except InputError:
            self.refused = (wanted, AGAIN)
            raise

    def _passed_over(self, wanted: Placed) -> bool:
        """Whether this bundle was refused lately: loading it at each look would be a waste."""
        if self.refused is None or self.refused[0] != wanted:
            return False
        self.refused = (wanted, self.refused[1] - 1)
        return self.refused[1] > 0

    def _run(self) -> None:
        with (self.deployer.file.path.parent / LOCK).open("wb") as file:
            mine = False
            while not self._stopping.is_set():
                mine = mine or _taken(file)
                if mine:
                    self.look()
                self._stopping.wait(self.every)


def _taken(file: IO[bytes]) -> bool:
    """Lock an open file for as long as it stays open; return whether nobody else has."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def find_bundle(name: str, workspace: Workspace) -> Path:
    """Return a bundle by its name or path, or the newest one of the run of that name."""
    of_run = [
        manifest
        for manifest in workspace.folder("bundle").glob(f"[!.]*/{MANIFEST}")
        if not manifest.parent.is_symlink() and _run_of(manifest) == name
    ]
    if of_run and not (workspace.folder("bundle") / name).is_dir():
        return max(of_run, key=lambda manifest: manifest.stat().st_mtime).parent.resolve()
    return workspace.find("bundle", name)


def _run_of(manifest: Path) -> str | None:
    try:
        met = json.loads(manifest.read_bytes())
    except (OSError, ValueError):
        return None
    return met.get("run") if isinstance(met, dict) else None


def promote(bundle: str, server: str, *, why: str = "", seconds: float = LOADING) -> dict[str, Any]:
    """Have the server at `server` (`http://HOST:PORT`) deploy a bundle; return its answer.

    `bundle` is a path or name that the server can open. The API key is taken from RECSYS_API_KEY.
    Raises InputError with the server's own words where it refuses, and what it has stays.
    """
    if not server.startswith(("http://", "https://")):
        raise InputError(f"--server {server!r}: expected http://HOST:PORT")
    body = json.dumps({"bundle": bundle, "why": why}).encode()
    headers = {"content-type": "application/json"}
    if key := os.environ.get(KEY):
        headers["authorization"] = f"Bearer {key}"
    url = server.rstrip("/") + "/admin/bundles"
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with _OPENER.open(request, timeout=seconds) as answer:
            met: dict[str, Any] = json.load(answer)
            return met
    except urllib.error.HTTPError as error:
        raise InputError(f"{url}: {error.code}: {_message(error)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"{url}: no answer ({reason}); is `recsys serve` running?") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key along to wherever it leads."""

    def redirect_request(self, *args: Any) -> None:
        """Follow none."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def _message(error: urllib.error.HTTPError) -> str:
    """Return the sentence of the server's error body."""
    hint = f"; set {KEY} to a key with the scope admin" if error.code in (401, 403) else ""
    try:
        return str(json.load(error)["error"]["message"]) + hint
    except (ValueError, KeyError, TypeError):
        return str(error.reason) + hint
