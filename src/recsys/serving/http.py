"""`recsys serve`: take the port, check what is given, start the workers, say where they listen."""

from __future__ import annotations

import errno
import json
import logging
import shlex
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import structlog

from recsys.artifacts import Workspace
from recsys.schema import InputError
from recsys.serving.guard import Keys, check_exposure
from recsys.serving.settings import ServeSettings
from recsys.serving.supervisor import Facts, Supervisor, module_command

__all__ = ["Started", "home", "print_started", "serve"]
log = structlog.get_logger("recsys.serving")
BACKLOG = 2_048
"""Connections that wait for a worker to take them."""
MORE_SECONDS = 5
"""A worker that takes longer than its grace and its drain together by this is killed."""


@dataclass(frozen=True)
class Started:
    """What a server says when it takes requests; `seconds` count from the start of the process.

    Memory is that of all processes, pages that they share counted once.
    """

    url: str
    bundle: str
    version: str
    items: int
    workers: int
    seconds: float
    memory_mib: float
    next: str


def print_started(started: Started) -> None:
    """Print what is served, where, how long the start took, and the next command."""
    workers = f"{started.workers} workers" if started.workers > 1 else "1 worker"
    print(f"Serving {started.version} ({started.items:,} items) from {started.bundle}")
    print(f"Listening on {started.url} (docs at {started.url}/docs)")
    print(f"Started in {started.seconds:.2f} s, {workers}, {started.memory_mib:.0f} MiB resident")
    print(f"Next: {started.next}", flush=True)


def serve(
    settings: ServeSettings,
    workspace: Workspace,
    announce: Callable[[Started], None] = print_started,
) -> None:
    """Serve a bundle until SIGTERM or SIGINT, then finish what is in flight and return.

    Raises InputError where the bundle is missing or damaged, or the port is taken.
    """
    log_json()
    check_exposure(settings.host, Keys.read(settings.keys))
    if settings.tls_cert:
        _check_tls(settings)
    home(workspace, settings)
    bundle = workspace.find("bundle", settings.bundle)
    chosen = {**asdict(settings), "bundle": str(bundle)}
    given = json.dumps({"workspace": str(workspace.root), "settings": chosen})
    with listening(settings.host, settings.port) as listener:
        supervisor = Supervisor(
            listener,
            module_command("recsys.serving.worker"),
            given,
            workers=settings.workers,
            stop_seconds=settings.grace_seconds + settings.drain_seconds + MORE_SECONDS,
        )
        supervisor.run(lambda facts: announce(_started(settings, listener, facts)))
    log.info("stopped")


def home(workspace: Workspace, settings: ServeSettings) -> Path:
    """Return the folder where a server keeps paths, log and deployment record.

    Raises InputError where `state` names a file, or an address that lacks its slashes.
    """
    plain = settings.state.removeprefix("lmdb:") if "://" not in settings.state else ""
    if plain.startswith(("redis:", "rediss:", "unix:")) or Path(plain).is_file():
        raise InputError(
            f"state={settings.state!r} is no folder; expected a folder, redis://HOST:PORT/DB, "
            "rediss://… or unix:///SOCKET"
        )
    return Path(plain).resolve() if plain else workspace.root / "serving"


def _check_tls(settings: ServeSettings) -> None:
    """Raise InputError where the certificate or its key cannot be used."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Without a password OpenSSL would ask for that of an encrypted key, on the terminal.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except OSError as error:
        raise InputError(
            f"cannot use --tls-cert {settings.tls_cert} with --tls-key {settings.tls_key}: "
            f"{error.strerror or error}; expected a certificate chain and its own key, both PEM, "
            "the key without a password"
        ) from error


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket bound to `host` and `port`; raise InputError where it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise InputError(f"cannot listen on host {host!r}: {error.strerror}; set --host") from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            # At once: two servers may both bind a port that nobody listens on yet.
            listener.listen(BACKLOG)
        except OSError as error:
            raise InputError(_why_not(host, port, error)) from error
        yield listener


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is taken by another program; choose another with "
            f"--port {port % 65_535 + 1}, or any free one with --port 0"
        )
    return f"cannot listen on {host} port {port}: {error.strerror}; set --host and --port"


def log_json() -> None:
    """Write logs to stderr as one JSON object a line; they name no user and no item."""
    chain: list[structlog.types.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    json_line = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*chain, json_line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # Looked up at each line: what stands for stderr now may be closed by then.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    _capture_warnings_of("uvicorn", chain, json_line)


def _capture_warnings_of(
    name: str, chain: list[structlog.types.Processor], render: structlog.types.Processor
) -> None:
    """Send what a library logs with `logging` the same way."""
    handler = logging.StreamHandler(sys.stderr)
    meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=chain, processors=[meta, render])
    )
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)


def _started(settings: ServeSettings, listener: socket.socket, workers: list[Facts]) -> Started:
    process = psutil.Process()
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.tls_cert else "http"
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    first = workers[0]
    example = json.dumps({"history": [first["item"]], "k": 5}, ensure_ascii=False)
    started = Started(
        url=url,
        bundle=first["bundle"],
        version=first["version"],
        items=first["items"],
        workers=len(workers),
        seconds=round(time.time() - process.create_time(), 2),
        memory_mib=round(memory_mib([process, *process.children()]), 1),
        next=f"curl -s {url}/v1/recommend -d {shlex.quote(example)}",
    )
    log.info("started", **{k: v for k, v in asdict(started).items() if k != "next"})
    return started


def memory_mib(processes: list[psutil.Process]) -> float:
    """Return the memory of some processes, a page that n of them share counted as 1/n each."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
        except (psutil.AccessDenied, AttributeError):
            total += process.memory_info().rss
    return total / 2**20
