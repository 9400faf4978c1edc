"""HTTP/1.1 from callers of every kind: uvicorn's protocol, with an end to patience and to size.

uvicorn waits without end for a request that comes byte by byte, and keeps a head of any length.
Here a head has so many seconds and bytes, a process so many connections, and a caller that does
not read its answers is let go. What is usual (a whole head in one packet) starts no timer and
costs under 2 µs a request.
"""

from __future__ import annotations

import asyncio
import resource
from asyncio import Transport
from asyncio.events import TimerHandle
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from recsys.serving.guard import Refusal
from recsys.serving.messages import ErrorAnswer, Problem

log = structlog.get_logger("recsys.serving")
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
LINGER_SECONDS = 1.0
"""So long a refused caller may go on sending: closed at once, it might never read why."""
LINGERING = 64
"""So many refused connections wait for that; those past them are closed at once."""
OTHER_FILES = 256
"""Files that a process has open besides its connections."""


class BodyTooLarge(Refusal):
    """A body over the limit; none of it was kept."""

    status, code = 413, "body_too_large"


class BodyTooSlow(Refusal):
    """A body that was not whole in time."""

    status, code = 408, "body_too_slow"


class Disconnected(Refusal):
    """A caller that left before its request was whole."""

    status, code = 400, "disconnected"


@dataclass
class Patience:
    """What the connections of one process may take, and how many were refused, by a word.

    While `draining`, every answer ends its connection, so that callers go elsewhere. `ended` is
    called when a connection has ended.
    """

    head_seconds: float = 10.0
    head_bytes: int = 32 * 1024
    connections: int = 1_000
    draining: bool = False
    lingering: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    ended: Callable[[], None] | None = None

    def count(self, code: str) -> None:
        """Count one refusal."""
        self.refused[code] = self.refused.get(code, 0) + 1


def patient(patience: Patience) -> Callable[..., asyncio.Protocol]:
    """Return what `uvicorn.Config(http=…)` takes, for connections that share `patience`."""

    class Patient(PatientProtocol):
        shared = patience

    return Patient


class PatientProtocol(HttpToolsProtocol):
    """One connection.

    A message is `between` two requests, in its `head`, or in its `body`; `timer` runs where the
    caller has to send something that is not there yet.
    """

    shared = Patience()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.in_head = self.in_body = self.refused = False
        self.chunk = self.received = 0
        self.timer: TimerHandle | None = None
        self.stalled: TimerHandle | None = None

    # What the transport tells.
    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Take the connection, or refuse it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.shared.connections:
            self._refuse(503, "too_many_connections", "this server has no connection left")
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget everything about it."""
        self._stop_waiting()
        self.resume_writing()
        if self.refused:
            self.shared.lingering -= 1
        super().connection_lost(exc)
        if self.shared.ended:
            self.shared.ended()

    def data_received(self, data: bytes) -> None:
        """Parse; then see to it that what is missing does not stay away for ever."""
        if self.refused:
            return
        self.chunk = len(data)
        self.received += self.chunk
        super().data_received(data)
        if self.in_head:
            self._check_part_of_head()
        elif not self.in_body and self._idle():
            # Neither a request nor its beginning, such as empty lines.
            self._wait()

    def pause_writing(self) -> None:
        """Stop answering until the caller reads, or for good when it does not."""
        super().pause_writing()
        self._abort_unless_read()

    def resume_writing(self) -> None:
        """Go on answering."""
        if self.stalled:
            self.stalled.cancel()
            self.stalled = None
        if self.flow is not None:
            super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        if self.in_head:
            return
        super().timeout_keep_alive_handler()
        self._abort_unless_read()

    # What the parser tells.
    def on_message_begin(self) -> None:
        """Expect a head."""
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start the request, unless its head is too large."""
        self.in_head, self.in_body = False, True
        if self.timer:
            self._stop_waiting()
        limit = self.shared.head_bytes
        # Other requests may have come in the same packet: only then is a head measured.
        if (self.received > limit or self.chunk > limit) and self._head_size() > limit:
            self._start_refusing()
        else:
            super().on_headers_complete()
        if self.shared.draining and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Expect nothing until the answer is given."""
        self.in_body = False
        self.received = 0
        if self.timer:
            self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Count the seconds from now where more is coming in: the body, or the next head."""
        super().on_response_complete()
        if self.in_body or self.in_head:
            self._stop_waiting()
            self._wait()
        if self.transport.is_closing():
            self._abort_unless_read()

    def send_400_response(self, msg: str) -> None:
        """Say that this is no HTTP, in the form of every other error."""
        if self._idle():
            self._refuse(400, "malformed_request", "this is not a request of HTTP/1.1")
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """Close when idle, else after the request that is coming in or being answered."""
        self.shared.draining = True
        if not (self.in_head and self._idle()):
            super().shutdown()

    # Patience.
    def _idle(self) -> bool:
        """Whether no answer is being made."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        """Give the caller `head_seconds`, from the first time that something is missing."""
        if self.timer is None and not self.refused:
            self.timer = self.loop.call_later(self.shared.head_seconds, self._run_out)

    def _stop_waiting(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None

    def _run_out(self) -> None:
        self.timer = None
        if not self._idle():
            self._wait()
        elif self.in_body:
            self.transport.close()
        else:
            self._refuse(
                408, "head_too_slow", f"no request within {self.shared.head_seconds:g} seconds"
            )

    def _abort_unless_read(self) -> None:
        """Cut off a caller that does not read: closing would wait for it without end."""
        if self.stalled is None and self.transport.get_write_buffer_size():
            self.stalled = self.loop.call_later(self.shared.head_seconds, self.transport.abort)

    # Refusals.
    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _check_part_of_head(self) -> None:
        """Wait for the rest of a head, unless it is too large already."""
        if self.received <= self.shared.head_bytes:
            self._wait()
        elif self._idle():
            self._refuse(431, "head_too_large", self._too_large())
        else:
            self.transport.close()

    def _too_large(self) -> str:
        return f"the head is larger than this server's limit of {self.shared.head_bytes} bytes"

    def _start_refusing(self) -> None:
        """Let uvicorn answer, in its turn, a whole head that is too large."""
        self.shared.count("head_too_large")
        served, self.app = self.app, _always(_response(431, "head_too_large", self._too_large()))
        try:
            super().on_headers_complete()
        finally:
            self.app = served

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer without a request, and close once the caller has had time to read it."""
        if self.transport.is_closing():
            return
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self.shared.count(code)
        self.connections.discard(self)
        self.refused = True
        self.shared.lingering += 1
        start, body = _response(status, code, message)
        self.transport.write(_raw(start) + body)
        if self.shared.lingering > LINGERING:
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _response(status: int, code: str, message: str) -> tuple[dict[str, Any], bytes]:
    """Return the ASGI start and the body of an error that ends its connection."""
    body = msgspec.json.encode(ErrorAnswer(Problem(code, message)))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    return {"type": "http.response.start", "status": status, "headers": headers}, body


def _raw(start: dict[str, Any]) -> bytes:
    status = HTTPStatus(start["status"])
    lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
    lines += [name + b": " + value for name, value in start["headers"]]
    return b"\r\n".join([*lines, b"", b""])


def _always(
    response: tuple[dict[str, Any], bytes],
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Return an ASGI application that gives this one answer."""
    start, body = response

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return app


async def read_body(receive: Receive, length: str | None, limit: int, seconds: float) -> bytes:
    """Return a request's body, of which `length` is the Content-Length header.

    Raises BodyTooLarge before more than `limit` bytes are held, BodyTooSlow when it is not whole
    after `seconds`, and Disconnected when the caller left.
    """
    if length and int(length) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(seconds):
            return await _whole_body(receive, limit)
    except TimeoutError:
        # Closed: whoever needs so long for this body is not waited for until its end.
        raise BodyTooSlow(
            f"the body was not whole after {seconds:g} seconds", {"connection": "close"}
        ) from None


async def _whole_body(receive: Receive, limit: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected("the caller left before the body was whole")
        more, part = message.get("more_body", False), message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than this server's limit of {limit} bytes")


def allow_open_files(connections: int) -> int:
    """Let this process hold so many connections, or as many as the system allows; return them."""
    wanted = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("fewer_connections", asked=connections, files=hard, next=f"ulimit -n {wanted}")
    return max(1, allowed - OTHER_FILES)
