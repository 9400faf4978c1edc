"""The HTTP protocol against impatient, endless, greedy and silent callers, over real sockets."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import uvicorn

from recsys.serving.guard import Refusal
from recsys.serving.protocol import (
    BodyTooLarge,
    BodyTooSlow,
    Disconnected,
    Patience,
    Receive,
    Scope,
    Send,
    allow_open_files,
    patient,
    read_body,
)

HEAD_SECONDS, LIMIT = 0.25, 200_000
GET = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n"
BIG = b"x" * 8_000_000


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the length of the body; `/slow` takes its time and `/big` much room."""
    if scope["type"] != "http":
        return
    length = dict(scope["headers"]).get(b"content-length")
    try:
        body = await read_body(receive, length.decode() if length else None, LIMIT, HEAD_SECONDS)
    except Refusal as refusal:
        return await answer(send, refusal.status, refusal.code.encode(), refusal.headers)
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * HEAD_SECONDS)
    await answer(send, 200, BIG if scope["path"] == "/big" else str(len(body)).encode(), {})


async def answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    raw = [(b"content-length", str(len(body)).encode())]
    raw += [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class Serving:
    """uvicorn in a thread, on a free port."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http=patient(patience),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            timeout_keep_alive=1,
            timeout_graceful_shutdown=5,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True
        )
        self.address = self.listener.getsockname()

    def __enter__(self) -> Serving:
        self.thread.start()
        self.ask(GET)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=5)

    def ask(self, request: bytes) -> tuple[int, bytes]:
        with self.connect() as caller:
            caller.sendall(request)
            return read_answer(caller)


def read_answer(caller: socket.socket) -> tuple[int, bytes]:
    """Return status and body of one answer; status 0 for a connection closed without one."""
    head = b""
    while b"\r\n\r\n" not in head:
        part = caller.recv(1)
        if not part:
            assert head == b""
            return 0, b""
        head += part
    headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    body, length = b"", int(headers[b"content-length"])
    while len(body) < length:
        part = caller.recv(length - len(body))
        assert part
        body += part
    return int(head.split()[1]), body


def closed_after(caller: socket.socket) -> float:
    """Return the seconds until the server closes, having sent nothing more."""
    started = time.perf_counter()
    with suppress(ConnectionResetError):
        assert caller.recv(1) == b""
    return time.perf_counter() - started


def patience(head_seconds: float = HEAD_SECONDS) -> Patience:
    return Patience(head_seconds=head_seconds, head_bytes=4_096, connections=5)


@pytest.fixture(scope="module")
def one_for_all() -> Iterator[Serving]:
    with Serving(patience()) as running:
        yield running


@pytest.fixture
def serving(one_for_all: Serving) -> Serving:
    """A server that has refused nobody yet, and holds no connection."""
    while one_for_all.server.server_state.connections:
        time.sleep(0.005)
    one_for_all.patience.refused.clear()
    return one_for_all


@pytest.fixture
def own_server() -> Iterator[Serving]:
    """A server to stop."""
    with Serving(patience(head_seconds=2.0)) as running:
        yield running


def test_usual_callers_notice_nothing(serving: Serving) -> None:
    assert serving.ask(GET) == (200, b"0")
    post = b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\n"
    assert serving.ask(post + b"hello") == (200, b"5")
    with serving.connect() as caller:
        for _ in range(3):
            caller.sendall(post)
            time.sleep(0.05)
            caller.sendall(b"hello")
            assert read_answer(caller) == (200, b"5")
        caller.sendall(GET + post + b"world" + GET)
        assert [read_answer(caller) for _ in range(3)] == [(200, b"0"), (200, b"5"), (200, b"0")]
    assert serving.patience.refused == {}


def test_an_answer_may_take_longer_than_a_head(serving: Serving) -> None:
    slow = GET.replace(b"GET /", b"GET /slow")
    with serving.connect() as caller:
        caller.sendall(slow + GET[:10])
        assert read_answer(caller) == (200, b"0")
        caller.sendall(GET[10:])
        assert read_answer(caller) == (200, b"0")


@pytest.mark.parametrize("first", [b"", b"G", b"\r\n", GET[:-2]])
def test_a_head_that_never_ends_is_given_up(serving: Serving, first: bytes) -> None:
    with serving.connect() as caller:
        started = time.perf_counter()
        caller.sendall(first)
        check_refusal(read_answer(caller), 408, "head_too_slow")
        assert HEAD_SECONDS * 0.9 < time.perf_counter() - started < 3 * HEAD_SECONDS
        assert closed_after(caller) < 2
    assert serving.patience.refused == {"head_too_slow": 1}


def check_refusal(answered: tuple[int, bytes], status: int, code: str) -> None:
    assert answered[0] == status
    error = json.loads(answered[1])["error"]
    assert error["code"] == code
    assert error["message"]


def test_bytes_that_trickle_in_buy_no_time(serving: Serving) -> None:
    with serving.connect() as caller:
        caller.sendall(GET)
        assert read_answer(caller)[0] == 200
        started = time.perf_counter()
        for byte in b"GET / HTTP/1.1\r\nx: " + b"y" * 1000:
            caller.sendall(bytes([byte]))
            caller.settimeout(0.02)
            try:
                caller.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                pass
        assert HEAD_SECONDS * 0.9 < time.perf_counter() - started < 3 * HEAD_SECONDS
        caller.settimeout(5)
        check_refusal(read_answer(caller), 408, "head_too_slow")


def test_empty_lines_do_not_keep_a_connection(serving: Serving) -> None:
    with serving.connect() as caller:
        caller.sendall(GET)
        assert read_answer(caller)[0] == 200
        caller.sendall(b"\r\n")
        assert read_answer(caller)[0] in (0, 408)


@pytest.mark.parametrize("before", [b"", GET])
@pytest.mark.parametrize("whole", [True, False])
def test_a_head_that_is_too_large_is_refused(serving: Serving, before: bytes, whole: bool) -> None:
    for large in (b"GET / HTTP/1.1\r\nx: " + b"y" * 5_000, b"GET /" + b"z" * 5_000):
        rest = (b" HTTP/1.1" if large[4:6] == b"/z" else b"") + b"\r\n\r\n" if whole else b""
        with serving.connect() as caller:
            if before:
                caller.sendall(before)
                assert read_answer(caller)[0] == 200
            caller.sendall(large + rest)
            check_refusal(read_answer(caller), 431, "head_too_large")
            assert closed_after(caller) < 2
    assert serving.patience.refused == {"head_too_large": 2}


def test_a_large_head_behind_another_request_gets_the_second_answer(serving: Serving) -> None:
    large = b"GET / HTTP/1.1\r\nx: " + b"y" * 5_000 + b"\r\n\r\n"
    with serving.connect() as caller:
        caller.sendall(GET + large)
        assert read_answer(caller) == (200, b"0")
        check_refusal(read_answer(caller), 431, "head_too_large")


def test_a_head_just_under_the_limit_and_a_large_body_pass(serving: Serving) -> None:
    head = b"POST / HTTP/1.1\r\ncontent-length: 100000\r\nx: " + b"y" * 4_000 + b"\r\n\r\n"
    request = head + b"b" * 100_000
    with serving.connect() as caller:
        caller.sendall(request + request)
        assert [read_answer(caller) for _ in range(2)] == [(200, b"100000")] * 2


def test_a_caller_that_goes_on_sending_still_reads_why(serving: Serving) -> None:
    with serving.connect() as caller:
        for _ in range(20):
            caller.sendall(b"x: " + b"y" * 1_000)
            time.sleep(0.005)
        assert read_answer(caller)[0] in (400, 431)


def test_what_is_no_http_is_refused_like_everything_else(serving: Serving) -> None:
    check_refusal(serving.ask(b"not HTTP\r\n\r\n"), 400, "malformed_request")
    check_refusal(serving.ask(b"\x16\x03\x01\x02\x00\x01\x00"), 400, "malformed_request")


@pytest.mark.parametrize(
    ("head", "body", "status", "code"),
    [
        (b"content-length: 10", b"12345", 408, b"body_too_slow"),
        (b"transfer-encoding: chunked", b"5\r\n12345\r\n", 408, b"body_too_slow"),
        (b"content-length: 200001", b"", 413, b"body_too_large"),
        (b"transfer-encoding: chunked", b"30d41\r\n" + b"x" * 200_001, 413, b"body_too_large"),
    ],
)
def test_bodies_that_do_not_end_or_are_too_large(
    serving: Serving, head: bytes, body: bytes, status: int, code: bytes
) -> None:
    with serving.connect() as caller:
        caller.sendall(b"POST / HTTP/1.1\r\n" + head + b"\r\n\r\n" + body)
        assert read_answer(caller) == (status, code)
        assert closed_after(caller) < 3 * HEAD_SECONDS


def test_a_body_that_trickles_in_after_its_answer_buys_no_time(serving: Serving) -> None:
    with serving.connect() as caller:
        caller.sendall(b"POST / HTTP/1.1\r\ncontent-length: 500000\r\n\r\n")
        assert read_answer(caller) == (413, b"body_too_large")
        started = time.perf_counter()
        with suppress(OSError):
            while time.perf_counter() - started < 5:
                caller.sendall(b"x")
                time.sleep(0.02)
        assert time.perf_counter() - started < 4 * HEAD_SECONDS


def test_a_body_that_comes_whole_after_its_answer_keeps_the_connection(serving: Serving) -> None:
    with serving.connect() as caller:
        caller.sendall(b"POST / HTTP/1.1\r\ncontent-length: 300000\r\n\r\n")
        assert read_answer(caller) == (413, b"body_too_large")
        caller.sendall(b"x" * 300_000 + GET)
        assert read_answer(caller) == (200, b"0")


def test_more_connections_than_the_limit_are_turned_away(serving: Serving) -> None:
    held = [serving.connect() for _ in range(5)]
    try:
        for caller in held:
            caller.sendall(GET)
            assert read_answer(caller) == (200, b"0")
        check_refusal(serving.ask(GET), 503, "too_many_connections")
        held.pop().close()
        time.sleep(0.1)
        assert serving.ask(GET) == (200, b"0")
        assert serving.patience.refused == {"too_many_connections": 1}
    finally:
        for caller in held:
            caller.close()


def test_a_flood_of_connections_leaves_nothing_behind(serving: Serving) -> None:
    held = [serving.connect() for _ in range(100)]
    answered = [caller.recv(12) for caller in held[5:]]
    assert answered.count(b"HTTP/1.1 503") > 80
    for caller in held:
        caller.close()
    limit = time.perf_counter() + 3
    while serving.patience.lingering and time.perf_counter() < limit:
        time.sleep(0.01)
    assert serving.patience.lingering == 0
    assert serving.ask(GET) == (200, b"0")


def test_a_caller_that_does_not_read_is_let_go(serving: Serving) -> None:
    with serving.connect() as caller:
        caller.sendall(GET.replace(b"GET /", b"GET /big"))
        assert caller.recv(12) == b"HTTP/1.1 200"
        time.sleep(HEAD_SECONDS + 1.5)
        left, limit = 0, time.perf_counter() + 5
        try:
            while part := caller.recv(1 << 20):
                left += len(part)
                assert time.perf_counter() < limit
        except ConnectionResetError:
            pass
        assert left < len(BIG)
    assert serving.ask(GET) == (200, b"0")


def test_draining_ends_connections_with_their_answers(own_server: Serving) -> None:
    with own_server.connect() as idle, own_server.connect() as caller:
        caller.sendall(GET.replace(b"GET /", b"GET /slow"))
        idle.sendall(GET)
        assert read_answer(idle) == (200, b"0")
        own_server.patience.draining = True
        idle.sendall(GET)
        assert read_answer(idle) == (200, b"0")
        assert closed_after(idle) < 0.3
        assert read_answer(caller) == (200, b"0")


def test_stopping_waits_for_a_head_that_is_coming_in(own_server: Serving) -> None:
    with own_server.connect() as caller:
        caller.sendall(GET[:10])
        time.sleep(0.1)
        own_server.server.should_exit = True
        time.sleep(0.15)
        caller.sendall(GET[10:])
        assert read_answer(caller) == (200, b"0")
        assert closed_after(caller) < 0.3


def received(*messages: Any) -> Receive:
    waiting = list(messages)

    async def receive() -> Any:
        if not waiting:
            await asyncio.sleep(60)
        return waiting.pop(0)

    return receive


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_bodies_are_put_together() -> None:
    whole = received(part(b"ab"), part(b""), part(b"cd", more=False))
    assert asyncio.run(read_body(whole, None, 4, 1)) == b"abcd"
    assert asyncio.run(read_body(received(part(b"", more=False)), "0", 4, 1)) == b""


@pytest.mark.parametrize(
    ("receive", "length", "expected"),
    [
        (received(part(b"abc"), part(b"de", more=False)), None, BodyTooLarge),
        (received(), "5", BodyTooLarge),
        (received(part(b"abc")), "4", BodyTooSlow),
        (received(part(b"abc"), {"type": "http.disconnect"}), "4", Disconnected),
    ],
)
def test_bodies_that_are_not_whole(
    receive: Receive, length: str | None, expected: type[Refusal]
) -> None:
    with pytest.raises(expected):
        asyncio.run(read_body(receive, length, 4, 0.05))


@pytest.mark.parametrize(
    ("limits", "asked", "given", "expected"),
    [
        ((1024, 4096), 700, None, 700),
        ((1024, 4096), 2_000, (2256, 4096), 2_000),
        ((1024, 4096), 10_000, (4096, 4096), 3_840),
        ((1024, -1), 10_000, (10_256, -1), 10_000),
        ((-1, -1), 10_000, None, 10_000),
    ],
)
def test_as_many_connections_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[int, int],
    asked: int,
    given: tuple[int, int] | None,
    expected: int,
) -> None:
    set_to: list[tuple[int, int]] = []
    assert resource.RLIM_INFINITY == -1
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    assert allow_open_files(asked) == expected
    assert set_to == ([given] if given else [])
