"""The HTTP application: the engine's answers, and an error with a cause for everything else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from starlette.applications import Starlette

from recsys.serving import openapi
from recsys.serving.app import create_app
from recsys.serving.engine import Engine
from recsys.serving.messages import Answer, RecommendRequest
from recsys.serving.settings import ServeSettings
from tiny_bundles import ODD_IDS, write_tiny_bundle

SETTINGS = ServeSettings(max_body_bytes=4096, max_k=200, max_history=50)
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny-1"))


@pytest.fixture
def app(engine: Engine) -> Starlette:
    return create_app(engine, SETTINGS)


@pytest.fixture
def call(app: Starlette) -> Callable[..., httpx.Response]:
    """Return a function that makes one request in this process."""

    async def send(method: str, url: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, url, **options)

    return lambda *given, **options: asyncio.run(send(*given, **options))


def problem(response: httpx.Response, status: int, code: str) -> str:
    """Check the shape of an error answer and return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"code", "message"}
    assert error["code"] == code
    assert "Traceback" not in response.text
    assert str(CHECKOUT) not in response.text
    return str(error["message"])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"user_id": "u3", "k": 20},
        {"user_id": "nobody"},
        {"history": ["i9", {"item_id": "i10", "event_type": "cart", "timestamp": 1.7e9}]},
        {"history": ["名前", "gone"], "k": 200, "exclude_seen": False},
        {"user_id": None, "history": None, "deny_categories": ["hats"], "now": "2025-01-01"},
    ],
)
def test_the_answer_is_the_engines(
    call: Callable[..., httpx.Response], engine: Engine, body: dict[str, Any]
) -> None:
    response = call("POST", "/v1/recommend", json=body)
    assert response.status_code == 200
    answer = msgspec.json.decode(response.content, type=Answer)
    own = engine.recommend([msgspec.convert(body, RecommendRequest)])[0]
    assert msgspec.structs.replace(answer, timings_ms={}) == (
        msgspec.structs.replace(own, timings_ms={})
    )
    assert set(answer.timings_ms) == {"history", "encode", "search", "answer"}


def test_a_batch_is_answered_in_its_order(call: Callable[..., httpx.Response]) -> None:
    requests = [{"user_id": "u3"}, {}, {"history": ["i9"], "k": 3}]
    answers = call("POST", "/v1/recommend/batch", json={"requests": requests}).json()["answers"]
    assert [(a["source"], len(a["items"])) for a in answers] == (
        [("model", 10), ("popular", 10), ("model", 3)]
    )
    message = problem(
        call("POST", "/v1/recommend/batch", json={"requests": [{}, {"k": 0}]}),
        *(422, "invalid_request"),
    )
    assert message.startswith("requests[1].k:")


@pytest.mark.parametrize("item_id", [*ODD_IDS[:-1], "i9"])
def test_similar_and_item_by_odd_ids(call: Callable[..., httpx.Response], item_id: str) -> None:
    path = quote(item_id, safe="")
    similar = call("GET", f"/v1/similar/{path}", params={"k": 4}).json()
    assert (similar["item_id"], len(similar["items"])) == (item_id, 4)
    item = call("GET", f"/v1/items/{path}").json()
    assert (item["item_id"], item["bundle"]) == (item_id, "tiny-1")
    assert set(item["features"]) == {"title", "category", "price"}


@pytest.mark.parametrize(
    ("body", "status", "code", "part"),
    [
        ("", 400, "malformed_json", "the body is empty"),
        ("{nope", 400, "malformed_json", "the body is not JSON"),
        ("[" * 4000, 422, "invalid_request", "expected object, got array"),
        ('{"k": 0}', 422, "invalid_request", "k: expected int >= 1"),
        ('{"weights": {"recency": 2}}', 422, "invalid_request", "weights.recency: expected"),
        ('{"weights": {"recency": 1}}', 422, "invalid_request", "train with model=trajectory"),
        ('{"k": 1000000000}', 422, "invalid_request", "k: expected int <= 1000"),
        ('{"k": 201}', 422, "invalid_request", "k: 201 is over this server's limit of 200"),
        ('{"user_id": 7}', 422, "invalid_request", "user_id: expected str | null, got int"),
        ('{"exclud_seen": 1}', 422, "invalid_request", "did you mean 'exclude_seen'?"),
        (json.dumps({"history": ["x"] * 51}), 422, "invalid_request", "51 events are over"),
        (json.dumps({"user_id": "x" * 4096}), 413, "body_too_large", "limit of 4096 bytes"),
    ],
)
def test_wrong_bodies(
    call: Callable[..., httpx.Response], body: str, status: int, code: str, part: str
) -> None:
    message = problem(call("POST", "/v1/recommend", content=body), status, code)
    assert part in message


def test_a_body_without_a_stated_length_is_cut_off_at_the_limit(
    call: Callable[..., httpx.Response],
) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(50_000):
            read += 1
            yield b" " * 1024

    message = problem(call("POST", "/v1/recommend", content=endless()), 413, "body_too_large")
    assert "4096" in message
    assert read <= 6


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/recommend/", 404, "not_found"),
        ("GET", "/v1/recommend", 405, "method_not_allowed"),
        ("DELETE", "/v1/items/i9", 405, "method_not_allowed"),
        ("GET", "/v1/similar/gone", 404, "unknown_item"),
        ("GET", "/v1/similar/", 404, "unknown_item"),
        ("GET", "/v1/items/gone", 404, "unknown_item"),
        ("GET", "/v1/similar/i9?k=0", 422, "invalid_request"),
        ("GET", "/v1/similar/i9?k=x", 422, "invalid_request"),
        ("GET", "/v1/similar/i9?K=5", 422, "invalid_request"),
        ("GET", "/v1/similar/i9?k=201", 422, "invalid_request"),
        ("GET", "/docs/assets/none.js", 404, "not_found"),
        ("GET", "/docs/assets/../../secret", 404, "not_found"),
    ],
)
def test_wrong_paths_and_methods(
    call: Callable[..., httpx.Response], method: str, path: str, status: int, code: str
) -> None:
    response = call(method, path)
    problem(response, status, code)
    if status == 405:
        assert response.headers["allow"]


def test_our_own_failure_says_nothing_of_the_inside(
    app: Starlette, call: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(requests: object) -> None:
        raise RuntimeError(f"secret in {CHECKOUT}")

    monkeypatch.setattr(app.state.service.engine, "recommend", broken)
    message = problem(call("POST", "/v1/recommend", json={}), 500, "internal")
    assert "secret" not in message


def test_health_and_readiness(app: Starlette, call: Callable[..., httpx.Response]) -> None:
    assert call("GET", "/healthz").json() == {"status": "ok"}
    assert call("GET", "/readyz").json() == {"status": "ready", "bundle": "tiny-1"}
    app.state.service.stopping = True
    response = call("GET", "/readyz")
    assert (response.status_code, response.json()["status"]) == (503, "stopping")


def test_metrics_count_by_route_and_outcome(call: Callable[..., httpx.Response]) -> None:
    call("POST", "/v1/recommend", json={"user_id": "u1"})
    call("POST", "/v1/recommend", json={})
    call("POST", "/v1/recommend", json={"k": 0})
    call("GET", "/v1/similar/gone")
    call("GET", "/somewhere/else")
    text = call("GET", "/metrics").text
    for line in (
        'recsys_requests_total{outcome="ok",route="/v1/recommend"} 2.0',
        'recsys_requests_total{outcome="invalid_request",route="/v1/recommend"} 1.0',
        'recsys_requests_total{outcome="unknown_item",route="/v1/similar/{item_id}"} 1.0',
        'recsys_requests_total{outcome="not_found",route="other"} 1.0',
        'recsys_answers_total{source="model"} 1.0',
        'recsys_answers_total{source="popular"} 1.0',
        'recsys_stage_seconds_count{stage="encode"} 2.0',
        'recsys_request_seconds_count{route="/v1/recommend"} 3.0',
        'recsys_bundle{model="trajectory",version="tiny-1"} 1.0',
    ):
        assert line in text
    assert "somewhere" not in text


def test_docs_come_from_this_server_alone(call: Callable[..., httpx.Response]) -> None:
    page = call("GET", "/docs").text
    assert "//" not in page.replace("<!doctype", "")
    for asset in ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png"):
        assert f"docs/assets/{asset}" in page
        assert call("GET", f"/docs/assets/{asset}").status_code == 200
    assert call("GET", "/openapi.json").json() == openapi.document()


def test_the_description_names_every_route(app: Starlette) -> None:
    served = {r.path.replace(":path", "") for r in app.routes} - (
        {"/openapi.json", "/docs", "/docs/assets"}
    )
    assert served == set(openapi.document()["paths"])


def test_the_description_on_disk_is_current() -> None:
    file = CHECKOUT / "serving" / "openapi.json"
    assert file.read_text(encoding="utf-8") == openapi.text(), (
        "write it again: python -m recsys.serving.openapi > serving/openapi.json"
    )
