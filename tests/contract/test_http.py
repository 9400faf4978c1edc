"""The HTTP application: the engine's answers, and an error with a cause for everything else."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest

from recsys.serving import openapi
from recsys.serving.app import ROUTES, App
from recsys.serving.deployment import Deployer, Record
from recsys.serving.engine import Engine
from recsys.serving.explain_messages import ExplainAnswer
from recsys.serving.guard import Guard, Keys
from recsys.serving.messages import Answer, RecommendRequest
from recsys.serving.service import REASONING, Service
from recsys.serving.settings import ServeSettings
from recsys.serving.state import open_state
from recsys.serving.trial import arm_of
from tiny_bundles import ODD_IDS, write_tiny_bundle

SETTINGS = ServeSettings(max_body_bytes=4096, max_k=200, max_history=50)
CHECKOUT = Path(__file__).parents[2]


KEYS = """
shop   read,events  a-secret-of-the-shop
viewer read         a-secret-of-viewers
boss   admin        a-secret-of-the-boss
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny-1")


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine.load(bundle)


@pytest.fixture
def service(bundle: Path, tmp_path: Path) -> Iterator[Service]:
    """A service with paths, without keys."""
    yield from made(bundle, tmp_path)


@pytest.fixture
def guarded(bundle: Path, tmp_path: Path) -> Iterator[Service]:
    """A service with keys."""
    yield from made(bundle, tmp_path, guard=Guard(Keys.read(variable=KEYS)))


def made(bundle: Path, folder: Path, **parts: Any) -> Iterator[Service]:
    Record(folder).begin(bundle)
    deployer = Deployer(folder)
    state = open_state(f"lmdb:{folder / 'state'}", max_events=50, keep_ms=0, sync=False)
    service = Service(deployer, SETTINGS, state=state, **parts)
    yield service
    service.close()
    state.close()
    deployer.close()


def caller(service: Service) -> Callable[..., httpx.Response]:
    """Return a function that makes one request in this process."""

    async def send(method: str, url: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(App(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, url, **options)

    return lambda *given, **options: asyncio.run(send(*given, **options))


@pytest.fixture
def call(service: Service) -> Callable[..., httpx.Response]:
    return caller(service)


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


def test_a_posted_event_is_a_reason_at_once(call: Callable[..., httpx.Response]) -> None:
    asked = {"items": ["i13", "gone"], "user_id": "new", "reasons": 1}
    for item in ("i10", "i9"):  # the tiny encoder reads the last
        call("POST", "/v1/events", json={"user_id": "new", "item_id": item}).raise_for_status()
        answer = call("POST", "/v1/explain", json=asked).json()
        assert [item["item_id"] for item in answer["items"]] == ["i13"]
        assert answer["items"][0]["reasons"][0]["name"] == item
    assert (answer["source"], answer["history_used"]) == ("retrieval", 2)
    assert answer["ignored"]["first_items"] == ["gone"]
    ranked = call("POST", "/v1/rank", json={"items": ["i13"], "user_id": "new"}).json()
    assert answer["items"][0]["score"] == ranked["items"][0]["score"]


def test_who_asks_why_too_often_is_refused_and_all_else_goes_on(
    service: Service, call: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    explain, go_on = service.engine.explain, threading.Event()

    def slowly(*given: Any) -> ExplainAnswer:
        go_on.wait(30)
        return explain(*given)

    monkeypatch.setattr(service.engine, "explain", slowly)

    async def many() -> list[int]:
        transport = httpx.ASGITransport(App(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"items": ["i9"], "user_id": "u1"}
            asking = [
                asyncio.create_task(client.post("/v1/explain", json=body))
                for _ in range(REASONING + 2)
            ]
            await asyncio.sleep(0.1)
            assert (await client.post("/v1/recommend", json={})).status_code == 200
            go_on.set()
            return [(await task).status_code for task in asking]

    assert sorted(asyncio.run(many())) == [200] * REASONING + [429] * 2
    assert call("POST", "/v1/explain", json={"items": ["i9"]}).status_code == 200


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"items": ["i9"], "by": "itm"}, "unknown by 'itm'; did you mean 'item'?"),
        ({"items": []}, "items: expected `array` of length >= 1"),
        ({"items": ["gone"]}, "knows none of the 1 given"),
        ({"items": ["i9"], "k": 3}, "unknown field 'k'; expected one of"),
        ({"items": ["i9"], "history": ["i9"] * 60}, "over this server's limit of"),
    ],
)
def test_what_is_wrong_with_a_question_why(
    call: Callable[..., httpx.Response], asked: dict[str, Any], said: str
) -> None:
    answer = call("POST", "/v1/explain", json=asked)
    assert said.replace("`", "") in problem(answer, 422, "invalid_request")


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
    assert arm_of(answer.answer_id) == "champion"
    assert msgspec.structs.replace(answer, timings_ms={}, answer_id="") == (
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
        ("PUT", "/v1/items/i9", 405, "method_not_allowed"),
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
    service: Service, call: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError(f"secret in {CHECKOUT}")

    monkeypatch.setattr(service.engine, "recommend", broken)
    message = problem(call("POST", "/v1/recommend", json={}), 500, "internal")
    assert "secret" not in message


def test_health_and_readiness(service: Service, call: Callable[..., httpx.Response]) -> None:
    assert call("GET", "/healthz").json() == {"status": "ok"}
    assert call("GET", "/readyz").json() == {"status": "ready", "bundle": "tiny-1"}
    service.stopping = True
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
        'recsys_answers_total{arm="champion",source="model"} 1.0',
        'recsys_answers_total{arm="champion",source="popular"} 1.0',
        'recsys_stage_seconds_count{stage="encode"} 2.0',
        'recsys_request_seconds_count{route="/v1/recommend"} 3.0',
        'recsys_bundle{arm="champion",model="trajectory",version="tiny-1"} 1.0',
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


def test_the_description_names_every_route() -> None:
    described = {
        (method.upper(), path)
        for path, operations in openapi.document()["paths"].items()
        for method in operations
    }
    own = {("GET", "/openapi.json"), ("GET", "/docs")}
    assert {(route.method, route.path) for route in ROUTES} - own == described


def test_the_description_on_disk_is_current() -> None:
    file = CHECKOUT / "serving" / "openapi.json"
    assert file.read_text(encoding="utf-8") == openapi.text(), (
        "write it again: python -m recsys.serving.openapi > serving/openapi.json"
    )


def test_a_posted_event_changes_the_next_answer(call: Callable[..., httpx.Response]) -> None:
    event = {"user_id": "new", "item_id": "i10", "event_id": "e1", "event_type": "cart"}
    assert call("POST", "/v1/events", json=event).json() == {"accepted": 1}
    answer = call("POST", "/v1/recommend", json={"user_id": "new"}).json()
    assert (answer["source"], answer["history_used"]) == ("model", 1)
    assert {item["category"] for item in answer["items"]} == {"hats"}
    assert call("POST", "/v1/events", json=event).json() == {"accepted": 0, "repeated": 1}
    kept = call("GET", "/v1/users/new").json()["events"]
    assert [(one["event_id"], one["event_type"]) for one in kept] == [("e1", "cart")]
    other = {**event, "item_id": "i11"}
    problem(call("POST", "/v1/events", json=other), 409, "conflict")
    assert call("DELETE", "/v1/users/new").json() == {
        "user_id": "new",
        "events": 1,
        "log_rows": 0,
    }
    assert call("POST", "/v1/recommend", json={"user_id": "new"}).json()["source"] == "popular"


def test_late_and_unordered_events_are_used_in_their_order(
    call: Callable[..., httpx.Response],
) -> None:
    now = time.time()
    events = [
        {"user_id": "new", "item_id": item, "timestamp": now - ago}
        for item, ago in (("i9", 10), ("i11", 5), ("i10", 7))
    ]
    assert call("POST", "/v1/events", json=events).json()["accepted"] == 3
    kept = call("GET", "/v1/users/new").json()["events"]
    assert [one["item_id"] for one in kept] == ["i9", "i10", "i11"]
    answer = call("POST", "/v1/recommend", json={"user_id": "new"}).json()
    assert {item["category"] for item in answer["items"]} == {"books"}


@pytest.mark.parametrize(
    ("event", "part"),
    [
        ({"timestamp": 4102444800}, "lies ahead of this server's clock"),
        ({"timestamp": 0}, "1970-01-01T00:00:00+00:00 is more than the 400 days ago"),
        ({"timestamp": "soon"}, "is not a moment"),
        ({"event_type": "vew"}, "unknown event type 'vew'; did you mean 'view'?"),
        ({"itm": "x"}, "unknown field 'itm'; did you mean 'item_id'?"),
        ({"user_id": ""}, "user_id: expected str of length >= 1"),
    ],
)
def test_events_that_cannot_be(
    call: Callable[..., httpx.Response], event: dict[str, Any], part: str
) -> None:
    body = {"user_id": "new", "item_id": "i9", **event}
    message = problem(call("POST", "/v1/events", json=body), 422, "invalid_request")
    assert part in message
    assert call("GET", "/v1/users/new").json()["events"] == []


def test_a_post_of_many_says_which_were_refused(call: Callable[..., httpx.Response]) -> None:
    good = {"user_id": "new", "item_id": "i9", "event_id": "e1"}
    events = [good, {**good, "event_id": "e2", "timestamp": 0}, {**good, "item_id": "unheard"}]
    answer = call("POST", "/v1/events", json=events).json()
    assert (answer["accepted"], [one["place"] for one in answer["refused"]]) == (1, [1, 2])
    assert [one["code"] for one in answer["refused"]] == ["invalid_event", "conflict"]
    answer = call("POST", "/v1/events", json={**good, "event_id": "e3", "item_id": "unheard"})
    assert answer.json() == {"accepted": 1, "unknown_items": 1}


def test_too_many_events_in_one_post(bundle: Path, tmp_path: Path) -> None:
    one = b'{"user_id":"u","item_id":"i"}'
    for service in made(bundle, tmp_path):
        service.settings = dataclasses.replace(SETTINGS, max_body_bytes=1 << 22)
        body = b"[" + b",".join([one] * 100_000) + b"]"
        message = problem(
            caller(service)("POST", "/v1/events", content=body), 422, "invalid_request"
        )
        assert message == "100000 events in one post; send at most 10000 at a time"


def test_a_clock_that_is_set_back_does_not_turn_the_path_round(
    service: Service, call: Callable[..., httpx.Response]
) -> None:
    now = time.time()
    for wall, item in ((now, "i9"), (now - 3600, "i10")):
        service.clock.wall = lambda wall=wall: wall
        call("POST", "/v1/events", json={"user_id": "new", "item_id": item})
    kept = call("GET", "/v1/users/new").json()["events"]
    assert [one["item_id"] for one in kept] == ["i9", "i10"]


@pytest.mark.parametrize(
    ("method", "path", "key", "status", "code"),
    [
        ("POST", "/v1/recommend", None, 401, "unauthorised"),
        ("POST", "/v1/recommend", "no-such-secret-here", 401, "unauthorised"),
        ("POST", "/v1/events", "a-secret-of-viewers", 403, "forbidden"),
        ("GET", "/admin/bundles", "a-secret-of-the-shop", 403, "forbidden"),
        ("DELETE", "/v1/users/u1", "a-secret-of-viewers", 403, "forbidden"),
        ("POST", "/v1/recommend?api_key=a-secret-of-the-shop", None, 400, "key_in_query"),
    ],
)
def test_who_may_not(
    guarded: Service, method: str, path: str, key: str | None, status: int, code: str
) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    message = problem(caller(guarded)(method, path, headers=headers), status, code)
    assert "a-secret-of" not in message


def test_who_may(guarded: Service) -> None:
    call = caller(guarded)
    shop = {"authorization": "Bearer a-secret-of-the-shop"}
    assert call("POST", "/v1/recommend", json={}, headers=shop).status_code == 200
    event = {"user_id": "u1", "item_id": "i9"}
    assert call("POST", "/v1/events", json=event, headers=shop).status_code == 200
    boss = {"authorization": "Bearer a-secret-of-the-boss"}
    assert call("GET", "/admin/bundles", headers=boss).json()["champion"] == "tiny-1"
    assert call("GET", "/readyz").status_code == 200


def test_past_the_queue_requests_are_turned_away(
    service: Service, call: Callable[..., httpx.Response]
) -> None:
    service.lanes.pending = SETTINGS.queue
    response = call("POST", "/v1/recommend", json={})
    problem(response, 429, "overloaded")
    assert response.headers["retry-after"] == "1"
    service.lanes.pending = 0
    assert call("POST", "/v1/recommend", json={}).status_code == 200


def test_so_are_those_that_would_wait_too_long(
    service: Service, call: Callable[..., httpx.Response]
) -> None:
    """Few wait, but what answers take of late is much: 2 requests of 30 ms."""
    service.lanes.pending, service.lanes.pace = 2, 0.03 * SETTINGS.threads
    problem(call("POST", "/v1/recommend", json={}), 429, "overloaded")
    service.lanes.pending = 1
    assert not service.full
    service.lanes.pending, service.lanes.pace = 0, 60.0
    assert call("POST", "/v1/recommend", json={}).status_code == 200, "nobody waits"


def test_what_is_late_is_popular(
    service: Service, call: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = service.engine.recommend

    def slowly(*given: Any) -> list[Answer]:
        time.sleep(0.3)
        return slow(*given)

    monkeypatch.setattr(service.engine, "recommend", slowly)
    body = {"user_id": "u1", "deadline_ms": 20}
    answer = call("POST", "/v1/recommend", json=body).json()
    assert (answer["source"], answer["fallback"], len(answer["items"])) == (
        ("popular", "deadline", 10)
    )
    assert "i9" not in answer["items"]
    text = call("GET", "/metrics").text
    assert 'recsys_fallbacks_total{reason="deadline"} 1.0' in text


def test_bundles_are_changed_and_returned_to(
    service: Service, call: Callable[..., httpx.Response], tmp_path: Path
) -> None:
    other = write_tiny_bundle(tmp_path / "tiny-2", num_items=130)
    done = call("POST", "/admin/bundles", json={"bundle": str(other), "why": "newer"}).json()
    assert (done["champion"], done["previous"]) == ("tiny-2", "tiny-1")
    assert call("POST", "/v1/recommend", json={}).json()["bundle"] == "tiny-2"
    assert call("POST", "/admin/bundles/rollback").json()["champion"] == "tiny-1"
    body = {"bundle": str(tmp_path / "none")}
    problem(call("POST", "/admin/bundles", json=body), 422, "invalid_request")
    body = {"bundle": str(other), "generation": 1}
    assert "generation 1 was expected" in problem(
        call("POST", "/admin/bundles", json=body), 422, "invalid_request"
    )
    assert call("GET", "/admin/bundles").json()["champion"] == "tiny-1"
