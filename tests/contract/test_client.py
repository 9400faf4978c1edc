"""Both clients against a small server that fails as told: tries, pauses, errors, what is sent."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

import httpx
import pytest

from recsys.client import (
    Asked,
    AsyncClient,
    Boosts,
    Call,
    Client,
    Event,
    Explaining,
    Ranking,
    RankRequest,
    RecommendRequest,
    RecsysError,
    Reply,
    Try,
    Wait,
    attempts,
    waiting,
)
from recsys.schema import InputError
from recsys.serving.explain_messages import ExplainRequest
from recsys.serving.messages import ItemAnswer
from tiny_bundles import ODD_IDS

ANSWER: dict[str, Any] = {
    "items": [{"item_id": "i3", "score": 0.5}],
    "source": "model",
    "bundle": "b",
    "timings_ms": {},
    "answer_id": "a1",
    "new_in_a_later_version": 1,
}
REFUSED = {"error": {"code": "overloaded", "message": "too much to do"}}
DROP, HANG = "drop", "hang"


class Seen(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Server:
    """A real server on a free port that answers from a script and remembers what it was sent."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.seen: list[Seen] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.listener = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.sockets[0].getsockname()[1]}"

    def answers(self, *script: Any) -> None:
        """Set what comes next: DROP, HANG, or a status, a body and headers."""
        self.script[:], self.seen[:] = script, []

    def stop(self) -> None:
        self._call(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def _end(self) -> None:
        self.listener.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except asyncio.IncompleteReadError:
            pass  # the client closed a kept connection
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = first.split()
        self.seen.append(Seen(method, path, headers, body))
        told = self.script.pop(0)
        if told == DROP:
            return False
        if told == HANG:
            await asyncio.sleep(60)
        writer.write(response(*told))
        return True


def response(status: int, body: Any, headers: str = "") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n{headers}\r\n"
    return head.encode() + content


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Server:
    running.answers()
    return running


Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, server: Server) -> Ask:
    """Return a function that calls a method of a fresh client of this kind."""

    # Reading the certificates of all authorities takes longer than a test.
    async def asynchronous(method: str, *given: Any, **options: Any) -> Any:
        asked = options.pop("asked", {})
        options |= {"url": options.get("url", server.url)}
        async with AsyncClient(http=httpx.AsyncClient(verify=False), **options) as client:
            return await getattr(client, method)(*given, **asked)

    def synchronous(method: str, *given: Any, **options: Any) -> Any:
        asked = options.pop("asked", {})
        options |= {"url": options.get("url", server.url)}
        with Client(http=httpx.Client(verify=False), **options) as client:
            return getattr(client, method)(*given, **asked)

    if request.param == "sync":
        return synchronous
    return lambda *given, **options: asyncio.run(asynchronous(*given, **options))


def test_fails_twice_then_answers(ask: Ask, server: Server) -> None:
    server.answers((503, REFUSED), (429, REFUSED, "retry-after: 0\r\n"), (200, ANSWER))
    answer = ask("recommend", key="a key", asked={"user_id": "u1", "k": 3})
    assert [item.item_id for item in answer.items] == ["i3"]
    assert answer.answer_id == "a1"
    assert len(server.seen) == 3
    sent = server.seen[2]
    assert (sent.method, sent.path) == ("POST", "/v1/recommend")
    assert json.loads(sent.body) == {"user_id": "u1", "k": 3}
    assert sent.headers["authorization"] == "Bearer a key"
    assert sent.headers["host"] == server.url.removeprefix("http://")


def test_retry_after_is_waited_for(ask: Ask, server: Server) -> None:
    server.answers((429, REFUSED, "Retry-After: 0.3\r\n"), (200, ANSWER))
    started = time.monotonic()
    ask("recommend")
    assert 0.3 <= time.monotonic() - started < 2


def test_a_repeated_post_holds_the_same_events(ask: Ask, server: Server) -> None:
    server.answers(DROP, (503, REFUSED), (200, {"accepted": 2}))
    events = [Event("u1", "i1"), Event("u1", "i2", event_id="mine", timestamp=1_700_000_000)]
    before = int(time.time() * 1000)
    assert ask("post_events", events).accepted == 2
    bodies = [seen.body for seen in server.seen]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1
    first, second = json.loads(bodies[0])
    assert len(bytes.fromhex(first["event_id"])) == 16
    assert before <= first["timestamp"] <= time.time() * 1000
    assert (second["event_id"], second["timestamp"]) == ("mine", 1_700_000_000)
    server.answers((200, {"accepted": 1}))
    ask("post_events", events[:1])
    assert json.loads(server.seen[0].body)[0]["event_id"] != first["event_id"]


def test_gives_up_after_the_retries(ask: Ask, server: Server) -> None:
    server.answers(*[(503, REFUSED, "retry-after: 0\r\n")] * 9)
    with pytest.raises(RecsysError, match="too much to do") as caught:
        ask("recommend", retries=2)
    assert (caught.value.code, caught.value.status) == ("overloaded", 503)
    assert len(server.seen) == 3


def test_no_pause_past_the_deadline(ask: Ask, server: Server) -> None:
    server.answers(*[(503, REFUSED, "retry-after: 5\r\n")] * 9)
    started = time.monotonic()
    with pytest.raises(RecsysError, match="too much to do"):
        ask("recommend", timeout=2)
    assert time.monotonic() - started < 1
    assert len(server.seen) == 1


def test_a_server_that_hangs(ask: Ask, server: Server) -> None:
    server.answers(*[HANG] * 9)
    with pytest.raises(RecsysError, match="in time") as caught:
        ask("item", "i1", timeout=0.2)
    assert (caught.value.code, caught.value.status) == ("timeout", 0)
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500, 502])
def test_other_errors_are_not_tried_again(ask: Ask, server: Server, status: int) -> None:
    server.answers(*[(status, {"error": {"code": "a_word", "message": "a sentence"}})] * 9)
    with pytest.raises(RecsysError) as caught:
        ask("recommend")
    error = caught.value
    assert (error.code, error.message, error.status) == ("a_word", "a sentence", status)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("status", "body"), [(404, b"<html>"), (200, b"<html>"), (200, {"items": 3}), (301, b"")]
)
def test_another_server_than_ours(ask: Ask, server: Server, status: int, body: Any) -> None:
    server.answers((status, body))
    with pytest.raises(RecsysError) as caught:
        ask("recommend")
    assert (caught.value.code, caught.value.status) == ("unexpected_answer", status)


def test_nobody_listens(ask: Ask) -> None:
    with pytest.raises(RecsysError, match=r"no answer from http://127\.0\.0\.1:1") as caught:
        ask("recommend", url="http://127.0.0.1:1", retries=1)
    assert caught.value.code == "unreachable"
    assert ask("ready", url="http://127.0.0.1:1") is False


def test_ready_asks_once(ask: Ask, server: Server) -> None:
    server.answers((503, {"status": "stopping"}), (200, {"status": "ready"}), (401, REFUSED))
    assert ask("ready") is False
    assert ask("ready") is True
    assert [seen.path for seen in server.seen] == ["/readyz"] * 2
    with pytest.raises(RecsysError):
        ask("ready")


@pytest.mark.parametrize("name", [*ODD_IDS, "..", ".", "a/../../b", "%2F"])
def test_any_id_arrives(ask: Ask, server: Server, name: str) -> None:
    kept = {"user_id": name, "events": [], "bundle_events": 2}
    server.answers(
        (200, kept),
        (200, {"user_id": name, "events": 3, "log_rows": 4}),
        (200, {"item_id": name, "items": [], "bundle": "b", "timings_ms": {}}),
        (200, {"item_id": name, "count": 7, "features": {}, "bundle": "b"}),
    )
    assert ask("user", name).bundle_events == 2
    assert ask("erase_user", name).log_rows == 4
    assert ask("similar", name, asked={"k": 5}).item_id == name
    assert ask("item", name).count == 7
    paths = [seen.path.partition("?")[0] for seen in server.seen]
    prefixes = ["/v1/users/", "/v1/users/", "/v1/similar/", "/v1/items/"]
    assert [unquote(path) for path in paths] == [prefix + name for prefix in prefixes]
    assert [seen.method for seen in server.seen] == ["GET", "DELETE", "GET", "GET"]
    assert server.seen[2].path.endswith("?k=5")


def test_connections_of_its_own(server: Server) -> None:
    server.answers((200, ANSWER), (200, ANSWER))
    with Client(server.url + "/") as client:
        assert client.recommend(history=["i1", "i2"]).source == "model"
        assert client.recommend(boosts=Boosts(items={"i1": 0.5})).bundle == "b"
    assert json.loads(server.seen[0].body) == {"history": ["i1", "i2"]}
    assert json.loads(server.seen[1].body) == {"boosts": {"items": {"i1": 0.5}}}
    assert "authorization" not in server.seen[0].headers


def test_batch(ask: Ask, server: Server) -> None:
    server.answers((200, {"answers": [ANSWER, ANSWER]}))
    answers = ask("recommend_batch", [RecommendRequest(user_id="u1"), RecommendRequest(k=2)])
    assert [answer.answer_id for answer in answers] == ["a1", "a1"]
    assert json.loads(server.seen[0].body) == {"requests": [{"user_id": "u1"}, {"k": 2}]}


def test_rank(ask: Ask, server: Server) -> None:
    items = [{"item_id": "i2", "score": 0.5, "probabilities": {"view": 0.5}}, {"item_id": "i1"}]
    server.answers((200, {"items": items, "source": "model", "bundle": "b", "timings_ms": {}}))
    answer = ask("rank", ["i1", "i2"], asked={"user_id": "u1", "context": {"device": "phone"}})
    assert [item.item_id for item in answer.items] == ["i2", "i1"]
    assert answer.items[0].probabilities == {"view": 0.5}
    body = {"items": ["i1", "i2"], "user_id": "u1", "context": {"device": "phone"}}
    assert (server.seen[0].path, json.loads(server.seen[0].body)) == ("/v1/rank", body)


def test_explain(ask: Ask, server: Server) -> None:
    reason = {"name": "i7", "events": 2, "event_types": ["view", "cart"], "effect": 0.5}
    items = [{"item_id": "i1", "score": 0.75, "reasons": [reason], "context": {"device": -0.25}}]
    server.answers((200, {"items": items, "source": "model", "bundle": "b", "timings_ms": {}}))
    answer = ask("explain", ["i1"], asked={"user_id": "u1", "by": "item", "reasons": 1})
    assert (answer.items[0].reasons[0].effect, answer.items[0].context) == (0.5, {"device": -0.25})
    body = {"items": ["i1"], "user_id": "u1", "reasons": 1}
    assert (server.seen[0].path, json.loads(server.seen[0].body)) == ("/v1/explain", body)


def test_items_are_added_removed_and_listed(ask: Ask, server: Server) -> None:
    server.answers(
        (200, {"item_id": "a/b", "by": "like", "number": 3, "bundle": "b"}),
        (200, {"item_id": "a/b", "number": 4, "repeated": False}),
        (200, {"bundle": "b", "newest": 4, "items": []}),
    )
    added = ask("add_item", "a/b", asked={"like": ["i7"], "features": {"title": "A"}})
    assert (added.by, added.number) == ("like", 3)
    assert ask("remove_item", "a/b").number == 4
    assert ask("items", asked={"after": 2}).newest == 4
    posted, removed, listed = server.seen
    assert (posted.method, posted.path) == ("POST", "/v1/items")
    body = {"item_id": "a/b", "like": ["i7"], "features": {"title": "A"}}
    assert json.loads(posted.body) == body
    assert (removed.method, removed.path) == ("DELETE", "/v1/items/a%2Fb")
    assert listed.path == "/v1/items?after=2&limit=1000"
    with pytest.raises(TypeError, match="vectr"):
        ask("add_item", "x", asked={"vectr": [1.0]})


def test_misspelt_argument(ask: Ask) -> None:
    with pytest.raises(TypeError, match="hystory"):
        ask("recommend", asked={"hystory": ["i1"]})


def test_arguments_are_the_fields_of_a_request() -> None:
    assert tuple(Asked.__annotations__) == RecommendRequest.__struct_fields__
    for arguments, request in ((Ranking, RankRequest), (Explaining, ExplainRequest)):
        assert {"items", *arguments.__annotations__} == {*request.__struct_fields__}


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://shop", "http://", "http://[::1", ""])
def test_no_address(url: str) -> None:
    with pytest.raises(InputError, match="expected such as http://"):
        Client(url)


def test_empty_id(ask: Ask) -> None:
    with pytest.raises(InputError, match="an id is missing after /v1/users/"):
        ask("erase_user", "")


def test_steps_by_hand() -> None:
    """Three tries within five seconds: the second pause no longer fits."""
    now = 0.0
    steps = attempts(Call("GET", "/v1/items/i", ItemAnswer), 5, 5.0, lambda: now)
    assert next(steps) == Try(5.0)
    now = 1.0
    assert steps.send(Reply(503, "2", b"")) == Wait(2.0)
    now = 3.0
    assert next(steps) == Try(2.0)
    with pytest.raises(RecsysError, match="status 429"):
        steps.send(Reply(429, "2", b""))


def test_pauses_grow_to_a_bound() -> None:
    for number, longest in enumerate([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]):
        pauses = [waiting(number, None) for _ in range(200)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
    assert waiting(0, "nonsense") <= 0.05
    assert waiting(0, "-1") <= 0.05
    assert waiting(0, "Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_import_is_light() -> None:
    code = "import sys, recsys.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    heavy = {"faiss", "onnxruntime", "torch", "numpy", "pyarrow", "starlette", "prometheus_client"}
    assert heavy.isdisjoint(loaded.decode().split())
