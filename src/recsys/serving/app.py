"""The HTTP application: JSON on the event loop, the model on a few threads beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from recsys.schema import InputError
from recsys.serving import metrics, openapi
from recsys.serving.engine import Engine, UnknownItem, use_one_core
from recsys.serving.messages import (
    Answer,
    AnswerBatch,
    ErrorAnswer,
    MalformedJSON,
    Problem,
    RecommendBatch,
    RecommendRequest,
    SimilarQuery,
    Status,
    converted,
    decoded,
)
from recsys.serving.settings import ServeSettings

log = structlog.get_logger("recsys.serving")
Result = TypeVar("Result")
ENCODER = msgspec.json.Encoder()
REQUEST = msgspec.json.Decoder(RecommendRequest)
BATCH = msgspec.json.Decoder(RecommendBatch)
OTHER = "other"
"""Route label of requests for paths that do not exist: their own text would be without bound."""


class BodyTooLarge(InputError):
    """A body over the limit; none of it was kept."""


REFUSALS: tuple[tuple[type[Exception], int, str], ...] = (
    (MalformedJSON, 400, "malformed_json"),
    (BodyTooLarge, 413, "body_too_large"),
    (UnknownItem, 404, "unknown_item"),
    (InputError, 422, "invalid_request"),
    (ClientDisconnect, 400, "disconnected"),
)
"""Whose fault an exception is: the first that fits decides, and any other is the server's."""
CODES = {404: "not_found", 405: "method_not_allowed"}


class Service:
    """What a running server holds: the engine in use, its threads, its numbers."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.settings = settings
        self.metrics = metrics.Metrics()
        self.pool = ThreadPoolExecutor(settings.threads, "engine", initializer=use_one_core)
        self.stopping = False
        self.use(engine)

    def use(self, engine: Engine) -> None:
        """Answer with `engine` from the next request on."""
        self.engine = engine
        self.metrics.serving(engine.version, str(engine.bundle.manifest["model"]))

    async def run(self, work: Callable[..., Result], *inputs: object) -> Result:
        """Call the engine on one of the service's threads."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *inputs)

    async def recommend(self, requests: list[RecommendRequest]) -> list[Answer]:
        """Check the server's own limits, then answer."""
        for request in requests:
            check_limits(request, self.settings)
        answers = await self.run(self.engine.recommend, requests)
        self.metrics.answered(answers)
        return answers


def check_limits(request: RecommendRequest, settings: ServeSettings) -> None:
    """Raise InputError where a request asks for more than this server was set to give."""
    check_k(request.k, settings)
    if request.history and len(request.history) > settings.max_history:
        raise InputError(
            f"history: {len(request.history)} events are over this server's limit of "
            f"{settings.max_history}; send the newest"
        )


def check_k(k: int, settings: ServeSettings) -> None:
    """Raise InputError where `k` is over what this server was set to give."""
    if k > settings.max_k:
        raise InputError(f"k: {k} is over this server's limit of {settings.max_k}")


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body, or raise BodyTooLarge before holding more than `limit` bytes of it."""
    parts, size = [], 0
    if int(request.headers.get("content-length", 0)) > limit:
        raise _too_large(limit)
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than this server's limit of {limit} bytes")


async def recommend(service: Service, request: Request) -> Response:
    """POST /v1/recommend."""
    asked = decoded(REQUEST, await read_body(request, service.settings.max_body_bytes))
    return respond((await service.recommend([asked]))[0])


async def recommend_batch(service: Service, request: Request) -> Response:
    """POST /v1/recommend/batch."""
    asked = decoded(BATCH, await read_body(request, service.settings.max_body_bytes))
    return respond(AnswerBatch(await service.recommend(asked.requests)))


async def similar(service: Service, request: Request) -> Response:
    """GET /v1/similar/{item_id}."""
    query = converted(dict(request.query_params), SimilarQuery)
    check_k(query.k, service.settings)
    item_id = request.path_params["item_id"]
    answer = await service.run(service.engine.similar, item_id, query.k)
    return respond(answer)


async def item(service: Service, request: Request) -> Response:
    """GET /v1/items/{item_id}."""
    return respond(await service.run(service.engine.item, request.path_params["item_id"]))


async def health(service: Service, request: Request) -> Response:
    """GET /healthz: the process lives."""
    return respond(Status("ok"))


async def ready(service: Service, request: Request) -> Response:
    """GET /readyz: 200 while requests are welcome, 503 from the moment that the server stops."""
    version = service.engine.version
    if service.stopping:
        return respond(Status("stopping", version), 503)
    return respond(Status("ready", version))


async def show_metrics(service: Service, request: Request) -> Response:
    """GET /metrics."""
    return Response(service.metrics.rendered(), headers={"content-type": metrics.CONTENT_TYPE})


async def describe(service: Service, request: Request) -> Response:
    """GET /openapi.json."""
    return Response(openapi.text(), media_type="application/json")


async def docs(service: Service, request: Request) -> Response:
    """GET /docs: the description for people; its files come from this server alone."""
    return HTMLResponse(openapi.PAGE)


Handler = Callable[[Service, Request], Awaitable[Response]]
ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/recommend", recommend),
    ("POST", "/v1/recommend/batch", recommend_batch),
    ("GET", "/v1/similar/{item_id:path}", similar),
    ("GET", "/v1/items/{item_id:path}", item),
    ("GET", "/healthz", health),
    ("GET", "/readyz", ready),
    ("GET", "/metrics", show_metrics),
    ("GET", "/openapi.json", describe),
    ("GET", "/docs", docs),
)


def create_app(engine: Engine, settings: ServeSettings | None = None) -> Starlette:
    """Return the ASGI application that answers with `engine`; `app.state.service` runs it."""
    service = Service(engine, settings or ServeSettings())
    routes = [
        Route(path, _endpoint(service, path, handler), methods=[method])
        for method, path, handler in ROUTES
    ]
    assets = Mount("/docs/assets", StaticFiles(directory=openapi.assets()))
    app = Starlette(
        routes=[*routes, assets],
        exception_handlers={HTTPException: _no_route(service)},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    app.state.service.pool.shutdown()


def _endpoint(
    service: Service, path: str, handler: Handler
) -> Callable[[Request], Awaitable[Response]]:
    route = path.replace(":path", "")

    async def endpoint(request: Request) -> Response:
        started = time.perf_counter()
        outcome, response = await _outcome(service, request, handler)
        service.metrics.requested(route, outcome, time.perf_counter() - started)
        return response

    return endpoint


async def _outcome(service: Service, request: Request, handler: Handler) -> tuple[str, Response]:
    """Return how a request went, in one word, and the response to it."""
    try:
        return "ok", await handler(service, request)
    except Exception as error:
        for kind, status, code in REFUSALS:
            if isinstance(error, kind):
                return code, refuse(status, code, str(error))
        # The trace is for the log; a caller must not learn from it how the server is built.
        log.exception("failed", error=type(error).__name__)
        return "internal", refuse(500, "internal", "the server failed; its log says why")


def _no_route(service: Service) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handler(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = CODES.get(error.status_code, "refused")
        service.metrics.requested(OTHER, code, 0.0)
        message = f"{request.method} {request.url.path[:200]}: {error.detail.lower()}; see /docs"
        return refuse(error.status_code, code, message, error.headers)

    return handler


def respond(
    message: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a message as a JSON response."""
    body = ENCODER.encode(message)
    return Response(body, status, headers=headers, media_type="application/json")


def refuse(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the JSON body that every error has."""
    return respond(ErrorAnswer(Problem(code, message)), status, headers)
