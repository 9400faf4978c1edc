"""As much of HTTP as the server needs, straight on ASGI: its routes cost microseconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qsl

import msgspec

from recsys.serving.guard import Key
from recsys.serving.messages import Answer, RankAnswer
from recsys.serving.protocol import read_body

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Header = tuple[bytes, bytes]
Message = dict[str, Any]
Service = TypeVar("Service")
JSON: Header = (b"content-type", b"application/json")
ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    body: bytes
    status: int = 200
    headers: tuple[Header, ...] = (JSON,)

    def messages(self) -> tuple[Message, Message]:
        """Return it as ASGI has it: its start and its body."""
        length = (b"content-length", b"%d" % len(self.body))
        head = [*self.headers, length]
        start = {"type": "http.response.start", "status": self.status, "headers": head}
        return start, {"type": "http.response.body", "body": self.body}

    async def send(self, send: Send) -> None:
        """Send it."""
        for message in self.messages():
            await send(message)


def reply(message: msgspec.Struct, status: int = 200, headers: tuple[Header, ...] = ()) -> Reply:
    """Return a message as a JSON reply."""
    return Reply(ENCODER.encode(message), status, (JSON, *headers))


@dataclass(slots=True)
class Request:
    """One request; `tail` is what follows the route's path, `answers` what came of it."""

    scope: Scope
    receive: Receive
    tail: str = ""
    caller: Key | None = None
    answers: Sequence[Answer | RankAnswer] = ()

    def header(self, name: bytes) -> bytes | None:
        """Return the first header of this lower-case name."""
        return next((value for key, value in self.scope["headers"] if key == name), None)

    def query(self) -> dict[str, str]:
        """Return the query string's values."""
        raw = self.scope["query_string"].decode("latin-1")
        return dict(parse_qsl(raw, keep_blank_values=True))

    async def body(self, limit: int, seconds: float) -> bytes:
        """Return the body; raise a Refusal where it is too large, too slow, or never whole."""
        length = self.header(b"content-length")
        return await read_body(self.receive, length.decode() if length else None, limit, seconds)


@dataclass(frozen=True, slots=True)
class Route(Generic[Service]):
    """One method and path; a path that ends in `{name}` takes everything after it as `tail`."""

    method: str
    path: str
    handler: Callable[[Service, Request], Awaitable[Reply]]
    scope: str | None = None

    @property
    def prefix(self) -> str | None:
        """Return what comes before the tail, or None for a path without one."""
        return self.path.partition("{")[0] if self.path.endswith("}") else None


class Routes(Generic[Service]):
    """Finds a route by path and method, in a dict lookup where the path is fixed.

    >>> async def hello(service, request): ...
    >>> routes = Routes([Route("GET", "/v1/items/{item_id}", hello)])
    >>> routes.find("GET", "/v1/items/a/b")[1], routes.methods("/v1/items/a"), routes.methods("/")
    ('a/b', ['GET'], [])
    """

    def __init__(self, routes: list[Route[Service]]) -> None:
        self.all = routes
        self.fixed = {(r.method, r.path): (r, "") for r in routes if r.prefix is None}
        self.prefixed = [(r.prefix, r) for r in routes if r.prefix is not None]

    def find(self, method: str, path: str) -> tuple[Route[Service], str] | None:
        """Return the route and the path's tail, or None."""
        return self.fixed.get((method, path)) or next(
            ((r, path[len(p) :]) for p, r in self.prefixed if method == r.method and _on(p, path)),
            None,
        )

    def methods(self, path: str) -> list[str]:
        """Return the methods that this path knows."""
        exact = [method for method, known in self.fixed if known == path]
        return exact + [r.method for prefix, r in self.prefixed if _on(prefix, path)]


def _on(prefix: str, path: str) -> bool:
    return path.startswith(prefix)
