"""Take connections from a socket that several processes share, each its part.

Left alone, the process that wakes first takes every connection that waits: eight connections
opened at once went to one of two workers more often than not, and stayed there. Here a process
takes one at a time, and leaves it to others while they hold fewer.
"""

from __future__ import annotations

import asyncio
import socket

import structlog
import uvicorn

from recsys.serving.supervisor import AWAY, Held

log = structlog.get_logger("recsys.serving")
STEP_BACK_SECONDS = 0.002
"""A connection that nobody else took for so long is taken whoever holds more."""
NO_ROOM_SECONDS = 0.1
HANDSHAKE_SECONDS = 10.0
GOODBYE_SECONDS = 1.0
"""So long TLS waits for the other side to end a connection too."""


class Acceptor:
    """Takes a server's connections from `listener`, which is bound and listens.

    uvicorn itself gets no socket (`startup(sockets=[])`), and calls `start` and `stop`.
    """

    def __init__(self, server: uvicorn.Server, listener: socket.socket, held: Held) -> None:
        self.server, self.listener, self.held = server, listener, held
        self.loop = asyncio.get_running_loop()
        self.making: set[asyncio.Task[object]] = set()
        self.stepped_back = self.leaving = self.stopped = False

    def start(self) -> None:
        """Take connections from now on."""
        self.listener.setblocking(False)
        self.publish()
        self.loop.add_reader(self.listener, self._offered)

    def leave(self) -> None:
        """Leave connections to the other workers, and take only those that nobody wants."""
        self.leaving = True
        self.publish()

    def stop(self) -> None:
        """Take no more."""
        self.stopped = self.leaving = True
        self.publish()
        self.loop.remove_reader(self.listener)

    def publish(self) -> None:
        """Tell the other workers how many connections this one holds."""
        held = len(self.server.server_state.connections) + len(self.making)
        self.held.set(AWAY if self.leaving else held)

    def _offered(self) -> None:
        """Take one connection, or step back once where others hold fewer."""
        self.publish()
        if not self.stepped_back and self.held.others_hold_less():
            self.stepped_back = True
            return self._pause(STEP_BACK_SECONDS)
        self.stepped_back = False
        try:
            connection, _ = self.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of file descriptors: the connection would be offered again without end.
            log.error("cannot_accept", error=error.strerror)
            return self._pause(NO_ROOM_SECONDS)
        self._make(connection)

    def _pause(self, seconds: float) -> None:
        self.loop.remove_reader(self.listener)
        self.loop.call_later(seconds, self._return)

    def _return(self) -> None:
        if not self.stopped:
            self.loop.add_reader(self.listener, self._offered)

    def _make(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self.loop.create_task(self._connect(connection))
        self.making.add(task)
        task.add_done_callback(self._made)
        self.publish()

    def _made(self, task: asyncio.Task[object]) -> None:
        self.making.discard(task)
        self.publish()

    async def _connect(self, connection: socket.socket) -> None:
        ssl = self.server.config.ssl
        try:
            await self.loop.connect_accepted_socket(
                self._protocol,
                connection,
                ssl=ssl,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if ssl else None,
                ssl_shutdown_timeout=GOODBYE_SECONDS if ssl else None,
            )
        except (TimeoutError, OSError):
            # A caller that is gone, or speaks no TLS.
            connection.close()

    def _protocol(self) -> asyncio.Protocol:
        config = self.server.config
        protocol = config.http_protocol_class(  # type: ignore[call-arg]
            config=config,
            server_state=self.server.server_state,
            app_state=self.server.lifespan.state,
        )
        assert isinstance(protocol, asyncio.Protocol)
        return protocol
