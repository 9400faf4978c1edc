"""The HTTP application: routes, who may call them, and what each outcome looks like."""

from __future__ import annotations

import time
from typing import cast

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from recsys.schema import InputError
from recsys.serving import metrics, openapi
from recsys.serving.admin import ADMIN_ROUTES
from recsys.serving.asgi import Header, Receive, Reply, Request, Route, Routes, Scope, Send, reply
from recsys.serving.explain_messages import ExplainRequest
from recsys.serving.guard import Refusal
from recsys.serving.intake import Conflict, single
from recsys.serving.items import ITEM_ROUTES
from recsys.serving.messages import (
    MAX_EVENTS,
    AnswerBatch,
    ErasedAnswer,
    ErrorAnswer,
    Event,
    EventType,
    KeptEvent,
    MalformedJSON,
    Problem,
    RankRequest,
    RecommendBatch,
    RecommendRequest,
    SimilarQuery,
    Status,
    UserAnswer,
    converted,
    decoded,
)
from recsys.serving.reading import UnknownItem
from recsys.serving.service import Overloaded, Service, check_k
from recsys.serving.state import StateUnavailable

log = structlog.get_logger("recsys.serving")
REQUEST = msgspec.json.Decoder(RecommendRequest)
BATCH = msgspec.json.Decoder(RecommendBatch)
RANK = msgspec.json.Decoder(RankRequest)
EXPLAIN = msgspec.json.Decoder(ExplainRequest)
EVENT = msgspec.json.Decoder(Event)
EVENTS = msgspec.json.Decoder(list[Event])
OTHER = "other"
"""Route label of requests for paths that do not exist: their own text would be without bound."""

REFUSALS: tuple[tuple[type[Exception], int, str], ...] = (
    (MalformedJSON, 400, "malformed_json"),
    (UnknownItem, 404, "unknown_item"),
    (Conflict, 409, "conflict"),
    (InputError, 422, "invalid_request"),
)
"""Whose fault an exception is: the first that fits decides, and any other is the server's."""


RETRY: tuple[Header, ...] = ((b"retry-after", b"1"),)


async def recommend(service: Service, request: Request) -> Reply:
    """POST /v1/recommend."""
    asked = decoded(REQUEST, await service.body(request))
    request.answers = await service.recommend([asked])
    return reply(request.answers[0])


async def recommend_batch(service: Service, request: Request) -> Reply:
    """POST /v1/recommend/batch."""
    asked = decoded(BATCH, await service.body(request))
    if request.caller:
        service.guard.charge(request.caller, len(asked.requests) - 1)
    request.answers = await service.recommend(asked.requests)
    return reply(AnswerBatch(request.answers))


async def rank(service: Service, request: Request) -> Reply:
    """POST /v1/rank: a caller's own items."""
    answer = await service.rank(decoded(RANK, await service.body(request)))
    request.answers = [answer]
    return reply(answer)


async def explain(service: Service, request: Request) -> Reply:
    """POST /v1/explain: why items score as they do."""
    return reply(await service.explain(decoded(EXPLAIN, await service.body(request))))


async def similar(service: Service, request: Request) -> Reply:
    """GET /v1/similar/{item_id}."""
    query = converted(request.query(), SimilarQuery)
    check_k(query.k, service.settings)
    return reply(await service.aside_run(service.similar, request.tail, query.k))


async def item(service: Service, request: Request) -> Reply:
    """GET /v1/items/{item_id}."""
    return reply(await service.aside_run(service.item, request.tail))


async def post_events(service: Service, request: Request) -> Reply:
    """POST /v1/events: one event as an object, or many as an array."""
    body = await service.body(request)
    if not body.lstrip().startswith(b"["):
        return reply(single(await service.take([decoded(EVENT, body)])))
    events = decoded(EVENTS, body)
    if len(events) > MAX_EVENTS:
        raise InputError(f"{len(events)} events in one post; send at most {MAX_EVENTS} at a time")
    return reply(await service.take(events))


async def user(service: Service, request: Request) -> Reply:
    """GET /v1/users/{user_id}: what is kept of a person."""
    return reply(await service.aside_run(_kept, service, request.tail))


async def erase_user(service: Service, request: Request) -> Reply:
    """DELETE /v1/users/{user_id}: forget a person, in the paths and in the log."""
    return reply(await service.aside_run(_erased, service, request.tail))


def _kept(service: Service, user_id: str) -> UserAnswer:
    state = service.users()
    before = state.path(user_id).erased_before
    events = [
        KeptEvent(
            e.item_id, cast(EventType, e.event_type), e.timestamp, e.event_id, e.value, e.answer_id
        )
        for e in state.kept(user_id)
    ]
    known = service.engine.reader.stored_events(user_id, before)
    return UserAnswer(user_id, events, known, before or None)


def _erased(service: Service, user_id: str) -> ErasedAnswer:
    events = service.users().erase(user_id, service.clock())
    rows = service.erase_logged(user_id)
    return ErasedAnswer(user_id, events, rows)


async def health(service: Service, request: Request) -> Reply:
    """GET /healthz: the process lives."""
    return reply(Status("ok"))


async def ready(service: Service, request: Request) -> Reply:
    """GET /readyz: 200 while requests are welcome, 503 from the moment that the server stops."""
    version = service.engine.version
    if service.stopping:
        return reply(Status("stopping", version), 503)
    return reply(Status("ready", version))


async def show_metrics(service: Service, request: Request) -> Reply:
    """GET /metrics."""
    service.gauge()
    rendered = await service.aside_run(service.metrics.rendered)
    return Reply(rendered, headers=((b"content-type", metrics.CONTENT_TYPE.encode()),))


async def describe(service: Service, request: Request) -> Reply:
    """GET /openapi.json."""
    return Reply(openapi.text().encode())


async def docs(service: Service, request: Request) -> Reply:
    """GET /docs: the description for people; its files come from this server alone."""
    return Reply(openapi.PAGE.encode(), headers=((b"content-type", b"text/html; charset=utf-8"),))


ROUTES: list[Route[Service]] = [
    Route("POST", "/v1/recommend", recommend, "read"),
    Route("POST", "/v1/recommend/batch", recommend_batch, "read"),
    Route("POST", "/v1/rank", rank, "read"),
    Route("POST", "/v1/explain", explain, "read"),
    Route("GET", "/v1/similar/{item_id}", similar, "read"),
    Route("GET", "/v1/items/{item_id}", item, "read"),
    Route("POST", "/v1/events", post_events, "events"),
    Route("GET", "/v1/users/{user_id}", user, "admin"),
    Route("DELETE", "/v1/users/{user_id}", erase_user, "admin"),
    *ITEM_ROUTES,
    *ADMIN_ROUTES,
    Route("GET", "/metrics", show_metrics, "read"),
    Route("GET", "/healthz", health),
    Route("GET", "/readyz", ready),
    Route("GET", "/openapi.json", describe),
    Route("GET", "/docs", docs),
]
"""Every route with the scope that a key needs for it; those without one are open."""
ASSETS = "/docs/assets"
MODELLED = frozenset(("/v1/recommend", "/v1/recommend/batch", "/v1/rank", "/v1/explain"))
"""Paths that are turned away before anything is done for them while no further one can wait."""


class App:
    """The ASGI application over one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.routes: Routes[Service] = Routes(ROUTES)
        self.assets = StaticFiles(directory=openapi.assets())
        self.overloaded = refusal(Overloaded())[1].messages()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started, path = time.perf_counter(), scope["path"]
        if path in MODELLED and self.service.full:
            self.service.metrics.turned_away(path)
            await send(self.overloaded[0])
            return await send(self.overloaded[1])
        if path.startswith(ASSETS + "/"):
            return await self._asset(scope, receive, send)
        request = Request(scope, receive)
        if found := self.routes.find(scope["method"], path):
            name, request.tail = found[0].path, found[1]
            outcome, answer = await self._outcome(found[0], request)
        else:
            name, (outcome, answer) = OTHER, self._nowhere(scope["method"], path)
        seconds = time.perf_counter() - started
        self.service.metrics.requested(name, outcome, seconds)
        if self.service.tracer:
            parent = request.header(b"traceparent")
            said = (parent or b"").decode("latin-1") or None
            self.service.tracer.record(name, outcome, time.time(), seconds, request.answers, said)
        await answer.send(send)

    async def _outcome(self, route: Route[Service], request: Request) -> tuple[str, Reply]:
        """Return how a request went, in one word, and the reply to it."""
        try:
            if route.scope:
                authorization = (request.header(b"authorization") or b"").decode("latin-1")
                query = request.scope["query_string"]
                request.caller = self.service.guard.allow(authorization, query, route.scope)
            return "ok", await route.handler(self.service, request)
        except Exception as error:
            return refusal(error)

    def _nowhere(self, method: str, path: str) -> tuple[str, Reply]:
        if methods := self.routes.methods(path):
            allow = ((b"allow", ", ".join(methods).encode()),)
            said = f"{method} {path[:200]}: method not allowed; see /docs"
            return "method_not_allowed", refuse(405, "method_not_allowed", said, allow)
        return "not_found", refuse(404, "not_found", f"{method} {path[:200]}: not found; see /docs")

    async def _asset(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner = {**scope, "path": scope["path"][len(ASSETS) :], "root_path": ""}
        try:
            await self.assets(inner, receive, send)
        except HTTPException:
            await self._nowhere(scope["method"], scope["path"])[1].send(send)


def refusal(error: Exception) -> tuple[str, Reply]:
    """Return an exception's word, and the reply that it becomes."""
    if isinstance(error, Refusal):
        headers = tuple((k.encode(), v.encode()) for k, v in error.headers.items())
        return error.code, refuse(error.status, error.code, str(error), headers)
    if isinstance(error, StateUnavailable):
        log.error("state_unavailable", reason=str(error))
        said = "the store of users' paths and of items is not available; nothing of this was kept"
        return "state_unavailable", refuse(503, "state_unavailable", said, RETRY)
    for kind, status, code in REFUSALS:
        if isinstance(error, kind):
            return code, refuse(status, code, str(error))
    # The trace is for the log; a caller must not learn from it how the server is built.
    log.exception("failed", error=type(error).__name__)
    return "internal", refuse(500, "internal", "the server failed; its log says why")


def refuse(status: int, code: str, message: str, headers: tuple[Header, ...] = ()) -> Reply:
    """Return the JSON body that every error has."""
    return reply(ErrorAnswer(Problem(code, message)), status, headers)
