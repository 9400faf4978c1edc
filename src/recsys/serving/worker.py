"""One worker process: put a service together, and answer until told to stop."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from recsys.artifacts import Workspace
from recsys.serving.accepting import Acceptor
from recsys.serving.app import App
from recsys.serving.deployment import Deployer, Record, load_verified
from recsys.serving.guard import Guard, Keys, RateLimit
from recsys.serving.http import MORE_SECONDS, home, log_json
from recsys.serving.kafka import KafkaSink
from recsys.serving.log import AnswerJournal, Shipper
from recsys.serving.promote import AliasWatch
from recsys.serving.protocol import Patience, allow_open_files, patient
from recsys.serving.service import Service
from recsys.serving.settings import ServeSettings
from recsys.serving.state import StateUnavailable, UserState, now_ms, open_state
from recsys.serving.supervisor import STOPPING, Facts, Seat, work
from recsys.serving.tracing import spans

DAY = 86_400_000
EXPIRED_EVERY = 3_600.0
GAUGED_EVERY = 5.0
SWITCH_SECONDS = 0.0005


def serve(seat: Seat) -> None:
    """Be a worker of `recsys serve`, with the settings that its seat brings."""
    log_json()
    # The event loop and the lanes take turns at the interpreter; by default each may hold it 5 ms,
    # which under a flood of requests to refuse is what each step of an answer waits.
    sys.setswitchinterval(SWITCH_SECONDS)
    given = json.loads(seat.given)
    settings = ServeSettings(**given["settings"])
    listener = socket.socket(fileno=seat.listener)
    workspace = Workspace(given["workspace"])
    with running(settings, workspace, seat.number, seat.workers) as service:
        server = Server(service, settings, seat)
        # uvicorn raises the signal that stopped it once more: it must not end this process before
        # the parts are closed.
        for number in STOPPING:
            signal.signal(number, server.handle_exit)
        server.run(sockets=[listener])


@contextmanager
def running(
    settings: ServeSettings, workspace: Workspace, number: int = 0, workers: int = 1
) -> Iterator[Service]:
    """Yield the service of worker `number`, and close each part of it after what needs it."""
    folder = home(workspace, settings)
    # Where the start names the same bundle as the last one did, what was deployed since stands.
    Record(folder).begin(Path(settings.bundle))
    with ExitStack() as stack:
        deployer = Deployer(folder, load=partial(load_verified, device=settings.device))
        stack.callback(deployer.close)
        state = _state(settings, folder)
        stack.callback(state.close)
        if number == 0:
            stack.callback(_forgetting(state, settings.keep_days * DAY))
        sink = _sink(settings)
        if sink:
            stack.callback(sink.close)
        tracer = spans(settings.otlp)
        if tracer:
            stack.callback(tracer.close)
        shipper = Shipper(folder / "log", state, rotate_seconds=settings.rotate_seconds, sink=sink)
        shipper.start()
        stack.callback(shipper.stop, MORE_SECONDS - 1)
        journal = AnswerJournal(folder / "log", rotate_seconds=settings.rotate_seconds)
        stack.callback(journal.close)
        service = Service(
            deployer,
            settings,
            state=state,
            journal=journal,
            shipper=shipper,
            guard=_guard(settings, workers),
            tracer=tracer,
            log_dir=folder / "log",
            find=lambda name: workspace.find("bundle", name),
        )
        stack.callback(service.close)
        if settings.watch:
            stack.callback(AliasWatch(deployer, settings.watch, settings.watch_seconds).close)
        yield service


def _state(settings: ServeSettings, folder: Path) -> UserState:
    address = settings.state if settings.far_state else f"lmdb:{folder / 'state'}"
    keep = settings.keep_days * DAY
    return open_state(
        address, max_events=settings.max_events, keep_ms=keep, sync=settings.state_sync
    )


def _forgetting(state: UserState, keep_ms: int) -> Callable[[], None]:
    """Drop what is older than `keep_ms` every hour; return what ends that."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(EXPIRED_EVERY):
            with suppress(StateUnavailable):
                state.expire(now_ms() - keep_ms)

    thread = threading.Thread(target=run, name="expiry", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    return end


def _sink(settings: ServeSettings) -> KafkaSink | None:
    if not settings.kafka:
        return None
    return KafkaSink(settings.kafka)


def _guard(settings: ServeSettings, workers: int) -> Guard:
    keys = Keys.read(settings.keys)
    limit = None
    if settings.rate:
        limit = RateLimit(settings.rate / workers, settings.burst / workers)
    return Guard(keys, limit)


class Server(uvicorn.Server):
    """uvicorn that reports to its seat, and shows at once when it is to stop."""

    def __init__(self, service: Service, settings: ServeSettings, seat: Seat) -> None:
        self.service, self.settings, self.seat = service, settings, seat
        self.patience = Patience(
            head_seconds=settings.head_seconds,
            connections=allow_open_files(settings.max_connections),
        )
        service.patience = self.patience
        super().__init__(_config(service, settings, self.patience))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then report."""
        assert sockets
        await super().startup([])
        self.acceptor = Acceptor(self, sockets[0], self.seat.held())
        self.patience.ended = self.acceptor.publish
        self.acceptor.start()
        self.looking = asyncio.create_task(self._look())
        self.seat.ready(_facts(self.service))

    async def _look(self) -> None:
        """Bring up to date what is not counted as it happens: any worker may be scraped."""
        while True:
            await self.service.aside_run(self.service.gauge)
            await asyncio.sleep(GAUGED_EVERY)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Turn unready, go on for the time of grace, then let requests in flight end."""
        self.service.stopping = self.patience.draining = True
        self.acceptor.leave()
        await asyncio.sleep(self.settings.grace_seconds)
        self.acceptor.stop()
        self.looking.cancel()
        await super().shutdown(sockets)


def _config(service: Service, settings: ServeSettings, patience: Patience) -> uvicorn.Config:
    options: dict[str, Any] = {
        "http": patient(patience),
        "interface": "asgi3",
        "lifespan": "off",
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        # Longer than the 60 s of common balancers, which would else send on a closed connection.
        "timeout_keep_alive": 75,
        "timeout_graceful_shutdown": settings.drain_seconds,
    }
    if settings.tls_cert:
        options |= {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}
    return uvicorn.Config(App(service), **options)


def _facts(service: Service) -> Facts:
    engine = service.engine
    return {
        "bundle": str(engine.bundle.path),
        "version": engine.version,
        "items": engine.bundle.num_items,
        "item": engine.catalogue.ids[engine.catalogue.by_popularity[0]],
    }


if __name__ == "__main__":
    sys.exit(work(serve))
