"""A typed client of the HTTP API, for a thread or an event loop: `Client` and `AsyncClient`.

    from recsys.client import Client, Event

    with Client("http://127.0.0.1:8000") as shop:
        shop.post_events([Event(user_id="u1", item_id="i7", event_type="cart")])
        for item in shop.recommend(user_id="u1", k=5).items:
            print(item.item_id, item.score)

It needs httpx and msgspec, nothing of the server. Both clients follow the same steps, made by
`attempts`, which itself neither sleeps nor sends.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Generic, Literal, NamedTuple, TypedDict, TypeVar, Unpack, cast
from urllib.parse import quote
from uuid import uuid4

import httpx
import msgspec

from recsys import __version__
from recsys.schema import InputError
from recsys.serving.explain_messages import ExplainAnswer, ExplainRequest
from recsys.serving.item_messages import ItemAdded, ItemRemoved, ItemsAnswer, NewItem
from recsys.serving.messages import (
    Answer,
    AnswerBatch,
    Boosts,
    ErasedAnswer,
    ErrorAnswer,
    Event,
    EventsAnswer,
    HistoryEvent,
    ItemAnswer,
    RankAnswer,
    RankRequest,
    RecommendBatch,
    Recommended,
    RecommendRequest,
    SimilarAnswer,
    Status,
    UserAnswer,
    Weights,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "Boosts",
    "Client",
    "Event",
    "ExplainAnswer",
    "HistoryEvent",
    "RankAnswer",
    "RankRequest",
    "RecommendRequest",
    "Recommended",
    "RecsysError",
    "Weights",
]
Result = TypeVar("Result")
Value = str | int | float | bool | list[str] | None
"""What a request's context may hold."""
TIMEOUT = 10.0
RETRIES = 3
CONNECT_SECONDS = 2.0
"""A replica that does not take the connection for so long is given up: the next may."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
PASSING = frozenset({429, 503})
"""Statuses that another try may change: overloaded, not ready."""
BROKEN = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)


class RecsysError(Exception):
    """The server refused, or did not answer.

    `code` is the server's word for programs ("unknown_item"), or "unreachable", "timeout" or
    "unexpected_answer" where none came from it; `status` is the HTTP status, 0 without an answer.

    >>> print(RecsysError("unknown_item", "no item 'i0'", 404))
    no item 'i0' (unknown_item, status 404)
    """

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(code, message, status)
        self.code, self.message, self.status = code, message, status

    def __str__(self) -> str:
        answered = f", status {self.status}" if self.status else ""
        return f"{self.message} ({self.code}{answered})"


class Asked(TypedDict, total=False):
    """The arguments of `recommend`: the fields of `RecommendRequest`, which explains them."""

    user_id: str | None
    history: Sequence[str | HistoryEvent] | None
    k: int
    exclude_seen: bool
    exclude_items: Sequence[str]
    allow_categories: Sequence[str] | None
    deny_categories: Sequence[str]
    max_per_category: int | None
    boosts: Boosts
    now: int | float | str | None
    weights: Weights
    deadline_ms: float | None
    context: Mapping[str, Value]
    diversity: float
    explore: float | None


class Ranking(TypedDict, total=False):
    """The arguments of `rank` beside its items: the other fields of `RankRequest`."""

    user_id: str | None
    history: Sequence[str | HistoryEvent] | None
    context: Mapping[str, Value]
    weights: Weights
    k: int | None
    now: int | float | str | None
    deadline_ms: float | None


class Explaining(TypedDict, total=False):
    """The arguments of `explain` beside its items: the other fields of `ExplainRequest`."""

    user_id: str | None
    history: Sequence[str | HistoryEvent] | None
    context: Mapping[str, Value]
    weights: Weights
    now: int | float | str | None
    by: Literal["item", "category"]
    reasons: int


class About(TypedDict, total=False):
    """The arguments of `add_item` beside the id: the other fields of `NewItem`."""

    vector: Sequence[float] | None
    like: Sequence[str]
    features: Mapping[str, Value]
    bundle: str | None


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One request and the kind of message that answers it."""

    method: str
    path: str
    answer: type[Result]
    body: bytes | None = None


class Reply(NamedTuple):
    """What a server sent; `retry_after` as in its header."""

    status: int
    retry_after: str | None
    body: bytes


class Try(NamedTuple):
    """A step: send the request, and give up after `seconds`."""

    seconds: float


class Wait(NamedTuple):
    """A step: do nothing for `seconds`."""

    seconds: float


READY = Call("GET", "/readyz", Status)
Met = Reply | RecsysError | None
Steps = Generator[Try | Wait, Met, Result]


def attempts(
    call: Call[Result],
    retries: int,
    timeout: float,
    clock: Callable[[], float] = time.monotonic,
) -> Steps[Result]:
    """Yield what to do next, take what came of it, and return the answer or raise RecsysError.

    A broken connection, 429 and 503 are tried again, `retries` times at most and only where the
    pause and another try fit into `timeout` seconds, counted from the first try.

    >>> steps = attempts(Call("GET", "/v1/items/i1", ItemAnswer), 3, 10.0, lambda: 0.0)
    >>> next(steps)
    Try(seconds=10.0)
    >>> steps.send(Reply(503, "2", b""))
    Wait(seconds=2.0)
    """
    ends = clock() + timeout
    for number in range(retries + 1):
        met = yield Try(max(ends - clock(), 0.001))
        if isinstance(met, Reply) and met.status == 200:
            return read(met.body, call.answer)
        error = met if isinstance(met, RecsysError) else refused(met)
        pause = waiting(number, met.retry_after if isinstance(met, Reply) else None)
        if number == retries or not passing(error) or clock() + pause >= ends:
            raise error
        yield Wait(pause)
    raise AssertionError("the last try returns or raises")


def passing(error: RecsysError) -> bool:
    """Return whether another try may succeed."""
    return error.code == "unreachable" or error.status in PASSING


def waiting(number: int, retry_after: str | None, now: float | None = None) -> float:
    """Return how many seconds to pause after try `number`, from 0: as told, else ever longer.

    `retry_after` is seconds or an HTTP date; `now` seconds since 1970. Without it the pause has
    jitter, so that clients that failed together do not come back together.

    >>> waiting(0, "1.5"), waiting(0, "Wed, 21 Oct 2015 07:28:00 GMT", now=1445412477.0)
    (1.5, 3.0)
    >>> 0.1 <= waiting(2, None) <= 0.2
    True
    """
    if retry_after and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", retry_after):
        return float(retry_after)
    with suppress(ValueError):  # neither seconds nor a date is the same as nothing
        if retry_after:
            date = parsedate_to_datetime(retry_after).timestamp()
            return max(date - (time.time() if now is None else now), 0.0)
    return random.uniform(0.5, 1) * min(FIRST_PAUSE * 2**number, LONGEST_PAUSE)


def read(body: bytes, kind: type[Result]) -> Result:
    """Return the message in a 200 answer; raise RecsysError where something else is in it."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecsysError(
            "unexpected_answer", f"expected {kind.__name__}, not {body[:80]!r}: {error}", 200
        ) from error


def refused(reply: Reply | None) -> RecsysError:
    """Return the error that an answer other than 200 tells of.

    >>> refused(Reply(502, None, b"<html>Bad Gateway</html>"))
    RecsysError('unexpected_answer', "not this API's error: b'<html>Bad Gateway</html>'", 502)
    """
    assert reply
    try:
        problem = msgspec.json.decode(reply.body, type=ErrorAnswer).error
        return RecsysError(problem.code, problem.message, reply.status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        met = f"not this API's error: {reply.body[:80]!r}"
        return RecsysError("unexpected_answer", met, reply.status)


def unanswered(error: httpx.TransportError, url: str) -> RecsysError:
    """Return the error of a request that no answer came to; only "unreachable" is tried again."""
    about = str(error) or type(error).__name__
    if isinstance(error, BROKEN):
        return RecsysError("unreachable", f"no answer from {url}: {about}", 0)
    if isinstance(error, httpx.TimeoutException):
        return RecsysError("timeout", f"no answer from {url} in time: {about}", 0)
    return RecsysError("unsent", f"cannot ask {url}: {about}", 0)


def asking(asked: Asked) -> RecommendRequest:
    """Return the request of `recommend`'s arguments; a misspelt one is a TypeError."""
    # A Sequence encodes as a list does; the Struct's type says what the server decodes.
    return RecommendRequest(**cast("dict[str, object]", asked))  # type: ignore[arg-type]


def recommending(request: RecommendRequest) -> Call[Answer]:
    """Return the call of one recommendation."""
    return Call("POST", "/v1/recommend", Answer, msgspec.json.encode(request))


def recommending_batch(requests: Sequence[RecommendRequest]) -> Call[AnswerBatch]:
    """Return the call of several recommendations."""
    body = msgspec.json.encode(RecommendBatch(list(requests)))
    return Call("POST", "/v1/recommend/batch", AnswerBatch, body)


def ranking(items: Sequence[str], asked: Ranking) -> Call[RankAnswer]:
    """Return the call that has items ranked; a misspelt argument is a TypeError."""
    request = RankRequest(items=list(items), **cast("dict[str, object]", asked))  # type: ignore[arg-type]
    return Call("POST", "/v1/rank", RankAnswer, msgspec.json.encode(request))


def explaining(items: Sequence[str], asked: Explaining) -> Call[ExplainAnswer]:
    """Return the call that asks why; a misspelt argument is a TypeError."""
    request = ExplainRequest(items=list(items), **cast("dict[str, object]", asked))  # type: ignore[arg-type]
    return Call("POST", "/v1/explain", ExplainAnswer, msgspec.json.encode(request))


def posting(events: Sequence[Event]) -> Call[EventsAnswer]:
    """Return the call that posts events, each with an id and a moment, so that it can be repeated.

    The moment too: an event without one happens when the server reads it, at each try anew, and
    the same id with another moment is another event.
    """
    body = msgspec.json.encode([_repeatable(event) for event in events])
    return Call("POST", "/v1/events", EventsAnswer, body)


def adding(item_id: str, about: About) -> Call[ItemAdded]:
    """Return the call that adds an item; a misspelt argument is a TypeError."""
    item = NewItem(item_id, **cast("dict[str, object]", about))  # type: ignore[arg-type]
    return Call("POST", "/v1/items", ItemAdded, msgspec.json.encode(item))


def _repeatable(event: Event) -> Event:
    moment = int(time.time() * 1000) if event.timestamp is None else event.timestamp
    event_id = event.event_id or uuid4().hex
    return msgspec.structs.replace(event, event_id=event_id, timestamp=moment)


def readiness(met: Reply | RecsysError) -> bool:
    """Return what `/readyz` says; raise RecsysError where it is no such server, or not in time."""
    if isinstance(met, Reply) and met.status in (200, 503):
        return met.status == 200
    error = met if isinstance(met, RecsysError) else refused(met)
    if error.code == "unreachable":
        return False
    raise error


def path(prefix: str, name: str, query: str = "") -> str:
    """Return a path with an id in it; dots are escaped too, or `..` would leave the prefix.

    >>> path("/v1/items/", "a/../b ?")
    '/v1/items/a%2F%2E%2E%2Fb%20%3F'
    """
    if not name:
        raise InputError(f"an id is missing after {prefix}; give one that is not empty")
    return prefix + quote(name, safe="").replace(".", "%2E") + query


def address(url: str) -> str:
    """Return a server's address without a slash at its end; raise InputError where it is none."""
    try:
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host and not parsed.query:
            return url.rstrip("/")
    except httpx.InvalidURL:
        pass
    raise InputError(f"{url!r} is not a server's address; expected such as http://127.0.0.1:8000")


def headers(key: str | None) -> dict[str, str]:
    """Return what is sent with each request."""
    named = {"user-agent": f"recsys/{__version__}", "content-type": "application/json"}
    return {**named, "authorization": f"Bearer {key}"} if key else named


class _Asking:
    """What both clients know of their server, and how a request to it is written."""

    def __init__(self, url: str, key: str | None, timeout: float, retries: int) -> None:
        self.url, self.timeout, self.retries = address(url), timeout, retries
        self._headers = headers(key)

    def _steps(self, call: Call[Result]) -> Steps[Result]:
        return attempts(call, self.retries, self.timeout)

    def _request(self, call: Call[Result], step: Try) -> httpx.Request:
        limits = httpx.Timeout(step.seconds, connect=min(step.seconds, CONNECT_SECONDS))
        return httpx.Request(
            call.method,
            self.url + call.path,
            headers=self._headers,
            content=call.body,
            extensions={"timeout": limits.as_dict()},
        )


def _reply(response: httpx.Response) -> Reply:
    return Reply(response.status_code, response.headers.get("retry-after"), response.content)


class Client(_Asking):
    """Asks one server, or the load balancer before several; threads may share it.

    `timeout` is in seconds for a whole call, its tries and the pauses between them; `retries` of
    a broken connection, 429 and 503. Every method raises RecsysError. `http` replaces the
    connections: `httpx.Client(verify=…)` for a certificate of your own.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        http: httpx.Client | None = None,
    ) -> None:
        super().__init__(url, key, timeout, retries)
        self._http = http or httpx.Client()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def recommend(self, **asked: Unpack[Asked]) -> Answer:
        """Return items for a `user_id`, for a `history`, or for a newcomer."""
        return self._make(recommending(asking(asked)))

    def recommend_batch(self, requests: Sequence[RecommendRequest]) -> list[Answer]:
        """Return one answer a request, in their order."""
        return self._make(recommending_batch(requests)).answers

    def rank(self, items: Sequence[str], **asked: Unpack[Ranking]) -> RankAnswer:
        """Return items of your own, best first for a `user_id` or a `history`."""
        return self._make(ranking(items, asked))

    def explain(self, items: Sequence[str], **asked: Unpack[Explaining]) -> ExplainAnswer:
        """Return why items score as they do for a `user_id` or a `history`."""
        return self._make(explaining(items, asked))

    def post_events(self, events: Sequence[Event]) -> EventsAnswer:
        """Report what people did; once it returns, accepted events are durable.

        Events without an id or a moment get theirs here, so that a repeated try changes nothing.
        """
        return self._make(posting(events))

    def user(self, user_id: str) -> UserAnswer:
        """Return what the server keeps of a user."""
        return self._make(Call("GET", path("/v1/users/", user_id), UserAnswer))

    def erase_user(self, user_id: str) -> ErasedAnswer:
        """Erase a user; where a try was repeated, the counts are those of the last."""
        return self._make(Call("DELETE", path("/v1/users/", user_id), ErasedAnswer))

    def similar(self, item_id: str, k: int = 10) -> SimilarAnswer:
        """Return the items nearest to one."""
        return self._make(Call("GET", path("/v1/similar/", item_id, f"?k={k}"), SimilarAnswer))

    def item(self, item_id: str) -> ItemAnswer:
        """Return what the bundle knows about an item."""
        return self._make(Call("GET", path("/v1/items/", item_id), ItemAnswer))

    def add_item(self, item_id: str, **about: Unpack[About]) -> ItemAdded:
        """Have an item answered with from now on; again, to replace what was said of it."""
        return self._make(adding(item_id, about))

    def remove_item(self, item_id: str) -> ItemRemoved:
        """Have an item answered with no more."""
        return self._make(Call("DELETE", path("/v1/items/", item_id), ItemRemoved))

    def items(self, after: int = 0, limit: int = 1_000) -> ItemsAnswer:
        """Return which items were added and removed, in their order."""
        return self._make(Call("GET", f"/v1/items?after={after}&limit={limit}", ItemsAnswer))

    def ready(self) -> bool:
        """Return whether the server takes requests now; a server that is not there does not."""
        return readiness(self._send(READY, Try(self.timeout)))

    def _make(self, call: Call[Result]) -> Result:
        steps, met = self._steps(call), None
        try:
            while True:
                met = self._do(call, steps.send(met))
        except StopIteration as end:
            return cast(Result, end.value)

    def _do(self, call: Call[Result], step: Try | Wait) -> Reply | RecsysError | None:
        if isinstance(step, Try):
            return self._send(call, step)
        time.sleep(step.seconds)
        return None

    def _send(self, call: Call[Result], step: Try) -> Reply | RecsysError:
        try:
            return _reply(self._http.send(self._request(call, step)))
        except httpx.TransportError as error:
            return unanswered(error, self.url)


class AsyncClient(_Asking):
    """As `Client`, for an event loop."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        super().__init__(url, key, timeout, retries)
        self._http = http or httpx.AsyncClient()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def recommend(self, **asked: Unpack[Asked]) -> Answer:
        """Return items for a `user_id`, for a `history`, or for a newcomer."""
        return await self._make(recommending(asking(asked)))

    async def recommend_batch(self, requests: Sequence[RecommendRequest]) -> list[Answer]:
        """Return one answer a request, in their order."""
        return (await self._make(recommending_batch(requests))).answers

    async def rank(self, items: Sequence[str], **asked: Unpack[Ranking]) -> RankAnswer:
        """Return items of your own, best first for a `user_id` or a `history`."""
        return await self._make(ranking(items, asked))

    async def explain(self, items: Sequence[str], **asked: Unpack[Explaining]) -> ExplainAnswer:
        """Return why items score as they do for a `user_id` or a `history`."""
        return await self._make(explaining(items, asked))

    async def post_events(self, events: Sequence[Event]) -> EventsAnswer:
        """Report what people did; once it returns, accepted events are durable.

        Events without an id or a moment get theirs here, so that a repeated try changes nothing.
        """
        return await self._make(posting(events))

    async def user(self, user_id: str) -> UserAnswer:
        """Return what the server keeps of a user."""
        return await self._make(Call("GET", path("/v1/users/", user_id), UserAnswer))

    async def erase_user(self, user_id: str) -> ErasedAnswer:
        """Erase a user; where a try was repeated, the counts are those of the last."""
        return await self._make(Call("DELETE", path("/v1/users/", user_id), ErasedAnswer))

    async def similar(self, item_id: str, k: int = 10) -> SimilarAnswer:
        """Return the items nearest to one."""
        call = Call("GET", path("/v1/similar/", item_id, f"?k={k}"), SimilarAnswer)
        return await self._make(call)

    async def item(self, item_id: str) -> ItemAnswer:
        """Return what the bundle knows about an item."""
        return await self._make(Call("GET", path("/v1/items/", item_id), ItemAnswer))

    async def add_item(self, item_id: str, **about: Unpack[About]) -> ItemAdded:
        """Have an item answered with from now on; again, to replace what was said of it."""
        return await self._make(adding(item_id, about))

    async def remove_item(self, item_id: str) -> ItemRemoved:
        """Have an item answered with no more."""
        return await self._make(Call("DELETE", path("/v1/items/", item_id), ItemRemoved))

    async def items(self, after: int = 0, limit: int = 1_000) -> ItemsAnswer:
        """Return which items were added and removed, in their order."""
        call = Call("GET", f"/v1/items?after={after}&limit={limit}", ItemsAnswer)
        return await self._make(call)

    async def ready(self) -> bool:
        """Return whether the server takes requests now; a server that is not there does not."""
        return readiness(await self._send(READY, Try(self.timeout)))

    async def _make(self, call: Call[Result]) -> Result:
        steps, met = self._steps(call), None
        try:
            while True:
                met = await self._do(call, steps.send(met))
        except StopIteration as end:
            return cast(Result, end.value)

    async def _do(self, call: Call[Result], step: Try | Wait) -> Reply | RecsysError | None:
        if isinstance(step, Try):
            return await self._send(call, step)
        await asyncio.sleep(step.seconds)
        return None

    async def _send(self, call: Call[Result], step: Try) -> Reply | RecsysError:
        try:
            return _reply(await self._http.send(self._request(call, step)))
        except httpx.TransportError as error:
            return unanswered(error, self.url)
