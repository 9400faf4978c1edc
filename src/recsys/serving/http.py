"""Run the HTTP application: take the port, load the bundle, say so, serve until a signal."""

from __future__ import annotations

import errno
import logging
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import psutil
import structlog
import uvicorn

from recsys.artifacts import Workspace
from recsys.schema import InputError
from recsys.serving.app import create_app
from recsys.serving.engine import Engine
from recsys.serving.settings import ServeSettings

__all__ = ["Started", "create_app", "print_started", "serve"]
log = structlog.get_logger("recsys.serving")


class Started(msgspec.Struct, frozen=True):
    """What a server says when it takes requests; `seconds` count from the start of the process."""

    url: str
    bundle: str
    version: str
    items: int
    seconds: float
    resident_mib: float
    next: str


def print_started(started: Started) -> None:
    """Print what is served, where, how long the start took, and the next command."""
    print(f"Serving {started.version} ({started.items:,} items) from {started.bundle}")
    print(f"Listening on {started.url} (docs at {started.url}/docs)")
    print(f"Started in {started.seconds:.2f} s, {started.resident_mib:.0f} MiB resident")
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
    with listening(settings.host, settings.port) as listener:
        engine = Engine.load(workspace.find("bundle", settings.bundle))
        server = Server(engine, settings, announce)
        with returning_from(signal.SIGTERM, signal.SIGINT):
            server.run(sockets=[listener])
    log.info("stopped", bundle=engine.version)


class Server(uvicorn.Server):
    """uvicorn that says when it takes requests, and shows at once that it no longer does."""

    def __init__(
        self, engine: Engine, settings: ServeSettings, announce: Callable[[Started], None]
    ) -> None:
        self.engine, self.settings, self.announce = engine, settings, announce
        app = create_app(engine, settings)
        self.service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=settings.drain_seconds,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then announce; raise InputError where another took the port meanwhile."""
        assert sockets
        try:
            await super().startup(sockets)
        except OSError as error:
            raise InputError(_why_not(self.settings.host, self.settings.port, error)) from error
        started = _started(self.engine, sockets[0])
        log.info("started", **msgspec.structs.asdict(started))
        self.announce(started)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Turn unready, then let requests in flight end."""
        self.service.stopping = True
        await super().shutdown(sockets)


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


@contextmanager
def returning_from(*signals: signal.Signals) -> Iterator[None]:
    """Let the block end normally at a signal: uvicorn raises it again once it has stopped."""
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
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


def _started(engine: Engine, listener: socket.socket) -> Started:
    process = psutil.Process()
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    example = msgspec.json.encode({"history": [engine.catalogue.ids[1]], "k": 5}).decode()
    return Started(
        url=url,
        bundle=str(engine.bundle.path),
        version=engine.version,
        items=engine.bundle.num_items,
        seconds=round(time.time() - process.create_time(), 2),
        resident_mib=round(process.memory_info().rss / 2**20, 1),
        next=f"curl -s {url}/v1/recommend -d {shlex.quote(example)}",
    )
