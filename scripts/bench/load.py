"""Load for a server, and a clock on what comes back: for serving/load_test.py and benchmarks.

In an open loop requests are sent at moments drawn beforehand (a Poisson process), whether or not
earlier ones were answered, and latency counts from the moment meant: a server that stalls is
charged for everyone who would have waited. In a closed loop each connection sends its next request
when it has the answer to the last. Requests are bytes made beforehand, connections are kept, and
answers are not decoded, so that a client on the server's machine takes little of it.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import numpy as np

CODE = b'"code":"'
FALLBACK = b'"fallback":'
END = b"\r\n\r\n"
PAUSE = 0.05
"""Seconds that a closed loop waits after a broken connection: a dead server refuses at once."""
QUANTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


class Refused(ValueError):
    """The server cannot be asked as told; the message says what to change."""


class Shot(NamedTuple):
    """A request ready to send, and the kind that its figures are counted under."""

    kind: str
    request: bytes


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    body: bytes

    @property
    def outcome(self) -> str:
        """Return "ok", "fallback", the code of an error, or its status where it has none.

        >>> Reply(429, b'{"error":{"code":"overloaded","message":""}}').outcome
        'overloaded'
        >>> Reply(502, b"<html>").outcome, Reply(200, b"{}").outcome
        ('http_502', 'ok')
        """
        if self.status == 200:
            return "fallback" if FALLBACK in self.body else "ok"
        code = self.body.partition(CODE)[2].partition(b'"')[0]
        return code[:40].decode("ascii", "replace") or f"http_{self.status}"


@dataclass(frozen=True)
class Target:
    """Where requests go, and how they are written."""

    host: str
    port: int
    tls: bool = False
    key: str | None = None

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Target:
        """Return the target of an address; raise Refused where it is none.

        >>> Target.of("https://shop.example")
        Target(host='shop.example', port=443, tls=True, key=None)
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise Refused(f"{url!r} is no server's address; expected such as http://127.0.0.1:8000")
        return cls(parts.hostname, port, parts.scheme == "https", key)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Return a whole HTTP request."""
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}:{self.port}\r\n{key}"
        head += "Content-Type: application/json\r\n" if body else ""
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def connect(self) -> Connection:
        """Open a connection; raises OSError."""
        context = ssl.create_default_context() if self.tls else None
        loop = asyncio.get_running_loop()
        _, opened = await loop.create_connection(Connection, self.host, self.port, ssl=context)
        return opened


class Connection(asyncio.Protocol):
    """One kept connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.waiting: asyncio.Future[Reply] | None = None
        self.received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.waiting and not self.waiting.done():
            self.waiting.set_exception(error or ConnectionResetError("closed before it answered"))

    def data_received(self, data: bytes) -> None:
        self.received += data
        if (reply := taken(self.received)) and self.waiting and not self.waiting.done():
            self.waiting.set_result(reply)

    @property
    def open(self) -> bool:
        """Whether another request can be sent."""
        return self.transport is not None and not self.transport.is_closing()

    async def ask(self, request: bytes) -> Reply:
        """Send a request and return its answer; raises OSError where the connection breaks."""
        if self.transport is None:
            raise ConnectionResetError("closed")
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.waiting

    def close(self) -> None:
        """Close it."""
        if self.transport:
            self.transport.close()


def taken(received: bytearray) -> Reply | None:
    """Take a whole answer from what was received, or return None until it is whole.

    >>> taken(bytearray(b"HTTP/1.1 404 Not Found\\r\\nContent-Length: 2\\r\\n\\r\\n{}"))
    Reply(status=404, body=b'{}')
    """
    end = received.find(END)
    if end < 0:
        return None
    head = bytes(received[:end]).lower()
    start = end + len(END)
    length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
    size = int(length) if length else 0
    if len(received) < start + size:
        return None
    body = bytes(received[start : start + size])
    del received[: start + size]
    return Reply(int(head[9:12]), body)


@dataclass
class Result:
    """What came back; `lags` is how late the client itself sent, in seconds."""

    seconds: float = 0.0
    latencies: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    lags: list[float] = field(default_factory=list)

    def add(self, kind: str, outcome: str, seconds: float) -> None:
        """Count one answer, or one that did not come."""
        self.latencies[kind, outcome].append(seconds)

    @property
    def count(self) -> int:
        """Return how many requests came to an end."""
        return sum(map(len, self.latencies.values()))

    def outcomes(self) -> Counter[str]:
        """Return how many requests ended how."""
        counts: Counter[str] = Counter()
        for (_, outcome), spent in self.latencies.items():
            counts[outcome] += len(spent)
        return counts

    def rows(self) -> list[dict[str, str | int | float]]:
        """Return kind, outcome, count, rate and milliseconds of each, in order."""
        return [
            {
                "kind": kind,
                "outcome": outcome,
                "count": len(spent),
                "per_second": round(len(spent) / self.seconds, 1) if self.seconds else 0.0,
                **milliseconds(spent),
            }
            for (kind, outcome), spent in sorted(self.latencies.items())
        ]

    def summary(self) -> dict[str, object]:
        """Return everything as one JSON object."""
        lag = milliseconds(self.lags)["p99_ms"] if self.lags else None
        seconds = round(self.seconds, 3)
        return {"seconds": seconds, "client_lag_p99_ms": lag, "answers": self.rows()}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return quantiles in milliseconds.

    >>> milliseconds([0.001, 0.002, 0.003])
    {'p50_ms': 2.0, 'p90_ms': 2.8, 'p99_ms': 2.98, 'max_ms': 3.0}
    """
    found = np.percentile(seconds, list(QUANTILES.values())) * 1000
    return {
        f"{name}_ms": round(float(value), 3) for name, value in zip(QUANTILES, found, strict=True)
    }


class Pool:
    """Connections that are opened when needed and used again, `size` at most."""

    def __init__(self, target: Target, size: int) -> None:
        self.target = target
        self.idle: list[Connection] = []
        self.free = asyncio.Semaphore(size)

    async def fill(self, count: int) -> None:
        """Open connections beforehand; raises OSError."""
        self.idle += await asyncio.gather(*(self.target.connect() for _ in range(count)))

    async def ask(self, request: bytes) -> Reply:
        """Send on a free connection, waiting for one where all are taken; raises OSError."""
        async with self.free:
            connection = self._reused() or await self.target.connect()
            try:
                reply = await connection.ask(request)
            except BaseException:
                connection.close()  # half an answer may still come on it
                raise
            if connection.open:
                self.idle.append(connection)
            return reply

    def _reused(self) -> Connection | None:
        while self.idle:
            if (connection := self.idle.pop()).open:
                return connection
        return None

    def close(self) -> None:
        """Close those that are idle."""
        for connection in self.idle:
            connection.close()


Tick = Callable[[Result], None]


async def send(pool: Pool, shot: Shot, meant: float, result: Result, timeout: float) -> str:
    """Send one request, clock it from the moment it was meant for, and return how it went."""
    try:
        async with asyncio.timeout(timeout):
            outcome = (await pool.ask(shot.request)).outcome
    except TimeoutError:
        outcome = "timeout"
    except OSError:
        outcome = "broken"
    result.add(shot.kind, outcome, time.perf_counter() - meant)
    return outcome


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Return the moments of a Poisson process, in seconds from its start.

    >>> len(arrivals(100, 10, seed=1)), bool(arrivals(100, 10, seed=1).max() < 10)
    (991, True)
    """
    drawn = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.2) + 100)
    moments = np.cumsum(drawn)
    return moments[moments < seconds]


async def open_loop(
    target: Target,
    shots: Iterator[Shot],
    *,
    rate: float,
    seconds: float,
    warm: float = 0.0,
    connections: int = 256,
    timeout: float = 10.0,
    seed: int = 0,
    tick: Tick | None = None,
) -> Result:
    """Send `rate` requests a second on average, whatever comes back; those of `warm` do not count.

    Where more than `connections` are unanswered, further ones wait here, and are charged for it.
    """
    moments = arrivals(rate, warm + seconds, seed)
    pool, result, ignored = Pool(target, connections), Result(), Result()
    await pool.fill(min(connections, 16))
    due: asyncio.Queue[float] = asyncio.Queue()
    start = time.perf_counter() + 0.05
    clock = Metronome(start + moments, due, asyncio.get_running_loop())
    tasks: set[asyncio.Task[str]] = set()
    for moment in moments:
        meant = await due.get()
        counted = result if moment >= warm else ignored
        counted.lags.append(time.perf_counter() - meant)
        task = asyncio.create_task(send(pool, next(shots), meant, counted, timeout))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        result.seconds = time.perf_counter() - start - warm
        if tick:
            tick(result)
    await asyncio.gather(*tasks)
    clock.join()
    pool.close()
    result.seconds = seconds
    return result


class Metronome(threading.Thread):
    """Tells an event loop each moment when it is there.

    A thread, for the loop's own timers count in whole milliseconds: as much as an answer takes.
    """

    def __init__(
        self,
        moments: np.ndarray,
        due: asyncio.Queue[float],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(daemon=True)
        # It must not wait long for the interpreter while the loop reads answers.
        sys.setswitchinterval(0.0005)
        self.moments, self.due, self.loop = moments.tolist(), due, loop
        self.start()

    def run(self) -> None:
        for moment in self.moments:
            if (left := moment - time.perf_counter()) > 0:
                time.sleep(left)
            try:
                self.loop.call_soon_threadsafe(self.due.put_nowait, moment)
            except RuntimeError:  # the loop was stopped by Ctrl-C
                return


async def closed_loop(
    target: Target,
    shots: Iterator[Shot],
    *,
    connections: int,
    seconds: float,
    warm: float = 0.0,
    timeout: float = 10.0,
    tick: Tick | None = None,
) -> Result:
    """Keep every one of `connections` busy; those of the first `warm` seconds do not count."""
    pool, result = Pool(target, connections), Result()
    await pool.fill(connections)
    start = time.perf_counter() + warm

    async def keep_asking() -> None:
        while (meant := time.perf_counter()) < start + seconds:
            counted = result if meant >= start else Result()
            if await send(pool, next(shots), meant, counted, timeout) == "broken":
                await asyncio.sleep(PAUSE)
            result.seconds = max(time.perf_counter() - start, 0.0)
            if tick:
                tick(result)

    await asyncio.gather(*(keep_asking() for _ in range(connections)))
    pool.close()
    return result
