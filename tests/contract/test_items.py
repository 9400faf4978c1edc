"""Items added and removed while the server runs: in every answer from then on, or in none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from test_http import SETTINGS, caller, problem

from recsys.artifacts import Workspace
from recsys.serving.deployment import Deployer, Record
from recsys.serving.guard import Guard, Keys
from recsys.serving.service import Service
from recsys.serving.state import open_state
from redis_server import RedisServer
from serving_process import running
from tiny_bundles import item_vectors, tasks_ranker, write_tiny_bundle

N, D = 120, 8
VECTORS_ND = item_vectors(N, D)
Call = Callable[..., httpx.Response]
SHOES = (3 * VECTORS_ND[8]).tolist()
"""What lies where i9 does, which is a shoe, and further out."""
NEW = {"title": "New", "category": "shoes", "price": 2.5}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny-1")


@pytest.fixture(params=["lmdb", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "lmdb":
        return f"lmdb:{tmp_path / 'state'}"
    server: RedisServer = request.getfixturevalue("redis")
    return f"{server.url}?timeout_ms=5000"


@pytest.fixture
def service(bundle: Path, address: str, tmp_path: Path) -> Iterator[Service]:
    yield from serving(bundle, address, tmp_path / "one")


def serving(bundle: Path, address: str, folder: Path, **parts: Any) -> Iterator[Service]:
    folder.mkdir(exist_ok=True)
    Record(folder).begin(bundle)
    deployer = Deployer(folder)
    state = open_state(address, max_events=50, keep_ms=0, sync=False)
    service = Service(deployer, SETTINGS, state=state, **parts)
    service.items.clock = iter(range(10**9)).__next__  # each look is a second after the last
    yield service
    service.close()
    state.close()
    deployer.close()


@pytest.fixture
def call(service: Service) -> Call:
    return caller(service)


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def ask(call: Call, **request: Any) -> list[str]:
    return ids(call("POST", "/v1/recommend", json={"history": ["i9"], **request}))


def add(call: Call, item_id: str = "new", **item: Any) -> dict[str, Any]:
    response = call("POST", "/v1/items", json={"item_id": item_id, **item})
    assert response.status_code == 200, response.text
    return dict(response.json())


def remove(call: Call, item_id: str) -> dict[str, Any]:
    response = call("DELETE", f"/v1/items/{item_id}")
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_a_new_item_is_in_the_next_answer_and_a_removed_one_in_none(call: Call) -> None:
    before = ask(call, k=20)
    assert add(call, vector=SHOES, features=NEW) == {
        **{"item_id": "new", "by": "vector", "number": 1, "bundle": "tiny-1"}
    }
    answer = call("POST", "/v1/recommend", json={"history": ["i9"], "k": 20}).json()["items"]
    assert answer[0]["item_id"] == "new"
    assert (answer[0]["title"], answer[0]["category"]) == ("New", "shoes")
    assert [item["item_id"] for item in answer[1:]] == before[:-1]
    assert remove(call, before[0]) == {"item_id": before[0], "number": 2, "repeated": False}
    assert ask(call, k=19) == ["new", *before[1:-1]]
    assert remove(call, before[0])["repeated"]
    remove(call, "new")
    assert ask(call, k=19) == before[1:]
    assert add(call, before[0])["by"] == "bundle"
    assert ask(call, k=20) == before


def test_by_what_it_is_like(call: Call) -> None:
    found = add(call, like=["i9", "i13", "gone"])
    assert (found["by"], found["ignored"]) == ("like", ["gone"])
    answer = call("POST", "/v1/recommend", json={"history": ["i9"], "k": 200}).json()["items"]
    score = next(item["score"] for item in answer if item["item_id"] == "new")
    assert score == pytest.approx(float(VECTORS_ND[[8, 12]].mean(axis=0) @ VECTORS_ND[8]))
    assert ids(call("GET", "/v1/similar/new?k=200"))[-1] not in ("i9", "i13")
    assert "new" in ids(call("GET", "/v1/similar/i9?k=50"))


def test_posted_again_it_takes_the_place_of_what_was_posted(call: Call) -> None:
    add(call, vector=SHOES)
    add(call, vector=(-np.array(SHOES)).tolist(), features={"title": "Other"})
    assert "new" not in ask(call, k=100)
    assert call("GET", "/v1/items/new").json()["features"] == {"title": "Other"}
    listed = call("GET", "/v1/items").json()
    assert [(one["item_id"], one["number"]) for one in listed["items"]] == [("new", 2)]


def test_rules_and_filters_know_it(call: Call) -> None:
    add(call, vector=SHOES, features=NEW)
    add(call, "hat", vector=SHOES, features={"category": ["hats", "gifts"]})
    assert ask(call, allow_categories=["shoes"])[0] == "new"
    assert ask(call, allow_categories=["gifts"]) == ["hat"]
    assert not {"new", "hat"} & {*ask(call, deny_categories=["shoes", "gifts"], k=200)}
    assert ask(call, exclude_items=["new"])[0] == "hat"
    capped = ask(call, max_per_category=1, k=4)
    assert {*capped[:2]} == {"hat", "new"}
    assert ask(call, boosts={"items": {"new": -50}}, k=200)[-1] == "new"
    assert ask(call, boosts={"categories": {"gifts": 50}})[0] == "hat"
    assert ask(call, diversity=0.5)[0] in ("new", "hat")
    ranked = call("POST", "/v1/rank", json={"items": ["i10", "new"], "history": ["i9"]})
    assert ids(ranked) == ["new", "i10"]
    remove(call, "i10")
    again = call("POST", "/v1/rank", json={"items": ["i10", "new"], "history": ["i9"]}).json()
    assert [item["item_id"] for item in again["items"]] == ["new"]
    assert again["ignored"]["first_items"] == ["i10"]
    assert call("GET", "/v1/items/i10").status_code == 404
    assert "i10" not in ask(call, boosts={"items": {"i10": 90}, "categories": {"hats": 1}})


def test_who_saw_it_is_not_shown_it_again(call: Call) -> None:
    add(call, vector=SHOES)
    answer = call("POST", "/v1/recommend", json={"history": ["i9", "new"]}).json()
    assert "new" not in [item["item_id"] for item in answer["items"]]
    assert answer["history_used"] == 1  # no encoder has read of it
    assert call("POST", "/v1/events", json={"user_id": "ann", "item_id": "i9"}).status_code == 200
    assert ids(call("POST", "/v1/recommend", json={"user_id": "ann"}))[0] == "new"
    assert call("POST", "/v1/events", json={"user_id": "ann", "item_id": "new"}).status_code == 200
    assert "new" not in ids(call("POST", "/v1/recommend", json={"user_id": "ann"}))
    remove(call, "i9")
    assert ask(call, exclude_seen=False)[0] == "new"  # a removed item is still of the history


def test_newcomers_see_new_items_last_and_removed_ones_never(call: Call) -> None:
    popular = ids(call("POST", "/v1/recommend", json={"k": 5}))
    add(call, vector=SHOES, features={"category": "gifts"})
    remove(call, popular[0])
    assert ids(call("POST", "/v1/recommend", json={"k": 4})) == popular[1:]
    everything = ids(call("POST", "/v1/recommend", json={"k": 200}))
    assert everything[-1] == "new"
    assert len(everything) == N
    gifts = {"allow_categories": ["gifts"]}
    assert ids(call("POST", "/v1/recommend", json=gifts)) == ["new"]


def test_another_worker_and_a_restart_know_it(
    service: Service, bundle: Path, address: str, tmp_path: Path
) -> None:
    other = serving(bundle, address, tmp_path / "two")
    call, beside = caller(service), caller(next(other))
    assert "new" not in ask(beside)
    add(call, vector=SHOES)
    remove(call, "i13")
    assert ask(beside)[0] == "new"
    assert "i13" not in ask(beside, k=100)
    next(other, None)
    later = serving(bundle, address, tmp_path / "three")
    assert ask(caller(next(later)))[0] == "new"
    next(later, None)


def test_after_a_swap_the_bundles_own_vector_goes_first(
    service: Service, call: Call, tmp_path: Path
) -> None:
    """A vector is of one encoder; what an item is like holds with any."""
    add(call, "alien", vector=SHOES)
    add(call, "kin", like=["i9"])
    add(call, "i125", vector=SHOES, like=["i9"])
    remove(call, "i13")
    larger = write_tiny_bundle(tmp_path / "tiny-2", num_items=130)
    assert call("POST", "/admin/bundles", json={"bundle": str(larger)}).status_code == 200
    found = ask(call, k=200)
    assert "alien" not in found
    assert {"kin", "i125"} <= {*found}
    assert "i13" not in found
    listed = call("GET", "/v1/items").json()["items"]
    states = {one["item_id"]: one["state"] for one in listed}
    assert states == {"alien": "stale", "kin": "added", "i125": "held", "i13": "removed"}
    assert call("POST", "/admin/items/prune").json() == {"forgotten": 1, "left": 3}
    assert call("POST", "/admin/bundles/rollback").status_code == 200
    assert ask(call)[0] in ("alien", "i125")


def test_listed_by_parts(call: Call) -> None:
    for name in "abc":
        add(call, name, like=["i9"])
    first = call("GET", "/v1/items?limit=2").json()
    assert (first["newest"], [one["item_id"] for one in first["items"]]) == (3, ["a", "b"])
    rest = call("GET", f"/v1/items?after={first['items'][-1]['number']}").json()["items"]
    assert [one["item_id"] for one in rest] == ["c"]
    metrics = call("GET", "/metrics").text
    assert "recsys_items_added 3.0" in metrics


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"vector": [1.0] * 7}, "vector: 7 numbers, expected 8"),
    ({"vector": [1.0] * 7 + [1e39]}, r"vector\[7\]: 1e\+39 is not a finite float32"),
    ({}, "new, and bundle tiny-1 does not hold it; send a vector"),
    ({"like": ["x", "y"]}, "knows none of the 2 in like"),
    ({"vector": SHOES, "features": {"titel": "x"}}, "no 'titel'; did you mean 'title'"),
    ({"vector": SHOES, "features": {"title": 3}}, "features.title: expected text, found 3"),
    ({"vector": SHOES, "features": {"category": [3]}}, "features.category: expected text"),
    ({"vector": SHOES, "bundle": "older"}, "made for 'older', but tiny-1 answers"),
    ({"vectors": SHOES}, "unknown field 'vectors'; did you mean 'vector'"),
]


@pytest.mark.parametrize(("item", "message"), WRONG)
@pytest.mark.parametrize("address", ["lmdb"], indirect=True)
def test_what_cannot_be_added(call: Call, item: dict[str, Any], message: str) -> None:
    response = call("POST", "/v1/items", json={"item_id": "new", **item})
    assert re.search(message, problem(response, 422, "invalid_request"))
    assert call("GET", "/v1/items").json()["newest"] == 0


@pytest.mark.parametrize("address", ["lmdb"], indirect=True)
def test_not_a_number_is_not_json(call: Call) -> None:
    body = b'{"item_id": "new", "vector": [NaN]}'
    problem(call("POST", "/v1/items", content=body), 400, "malformed_json")


@pytest.mark.parametrize("address", ["lmdb"], indirect=True)
def test_an_unknown_item_cannot_be_removed(call: Call) -> None:
    said = problem(call("DELETE", "/v1/items/nothing"), 404, "unknown_item")
    assert "no item 'nothing', nor was it added" in said


@pytest.mark.parametrize("address", ["lmdb"], indirect=True)
def test_too_many_beside_one_index(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.serving.items.MAX_ADDED", 1)
    add(call, "a", like=["i9"])
    add(call, "a", like=["i10"])
    response = call("POST", "/v1/items", json={"item_id": "b", "like": ["i9"]})
    assert "fewer than 1: train with them" in problem(response, 422, "invalid_request")


@pytest.mark.parametrize("address", ["lmdb"], indirect=True)
def test_a_key_for_items_alone(bundle: Path, address: str, tmp_path: Path) -> None:
    keys = Keys.read(variable="stock items a-secret-of-the-stock\nshop read a-secret-of-the-shop")
    guarded = serving(bundle, address, tmp_path / "guarded", guard=Guard(keys))
    call = caller(next(guarded))
    stock = {"authorization": "Bearer a-secret-of-the-stock"}
    shop = {"authorization": "Bearer a-secret-of-the-shop"}
    body = {"item_id": "new", "like": ["i9"]}
    assert call("POST", "/v1/items", json=body, headers=stock).status_code == 200
    problem(call("POST", "/v1/items", json=body, headers=shop), 403, "forbidden")
    problem(call("DELETE", "/v1/items/i9", headers=shop), 403, "forbidden")
    problem(call("POST", "/admin/items/prune", headers=stock), 403, "forbidden")
    assert call("GET", "/v1/items", headers=stock).json()["items"][0]["by"] == "stock"
    next(guarded, None)


@pytest.mark.parametrize("address", ["lmdb"], indirect=True)
def test_a_ranker_ranks_it_by_what_it_knows(address: str, tmp_path: Path) -> None:
    ranked = write_tiny_bundle(tmp_path / "ranked", ranker=tasks_ranker(), featured=True)
    server = serving(ranked, address, tmp_path / "ranking")
    call = caller(next(server))
    add(call, vector=SHOES, features=NEW)
    answer = call("POST", "/v1/recommend", json={"history": ["i9"], "k": 30}).json()
    assert "fallback" not in answer
    assert "new" in [item["item_id"] for item in answer["items"]]
    next(server, None)


def test_all_workers_see_it_with_their_next_answer(bundle: Path, tmp_path: Path) -> None:
    """Two processes: new connections go to either; from the reply on, none answers as before."""
    workspace = Workspace(tmp_path / "workspace")
    with running(workspace, "--bundle", str(bundle), "--workers", "2") as server:
        post = {"item_id": "new", "vector": SHOES}
        assert httpx.post(f"{server.url}/v1/items", json=post, timeout=30).status_code == 200

        def firsts() -> set[str]:
            asked = {"history": ["i9"], "k": 1}
            answers = (
                httpx.post(f"{server.url}/v1/recommend", json=asked, timeout=30) for _ in range(12)
            )
            return {ids(answer)[0] for answer in answers}

        assert firsts() == {"new"}
        assert httpx.delete(f"{server.url}/v1/items/new", timeout=30).status_code == 200
        assert "new" not in firsts()
