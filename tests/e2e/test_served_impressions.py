"""From what a server showed to a ranker's examples: answers, events that name them, `prepare`."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from recsys.artifacts import Workspace
from recsys.data.dataset import Dataset
from recsys.data.examples import Examples, impressions
from recsys.data.prepare import prepare
from recsys.data.sources.served import Served
from recsys.serving.app import App
from recsys.serving.deployment import Deployer, Record
from recsys.serving.log import AnswerJournal, Shipper
from recsys.serving.service import Service
from recsys.serving.settings import ServeSettings
from recsys.serving.state import open_state
from tiny_bundles import DEVICES, tasks_ranker, write_tiny_bundle

HOUR = 3_600_000
KINDS = ("view", "favourite", "cart", "purchase")


class Shop:
    """A server in this process, with its log."""

    def __init__(self, folder: Path) -> None:
        bundle = write_tiny_bundle(folder / "ranked-1", ranker=tasks_ranker(), featured=True)
        Record(folder).begin(bundle)
        self.log = folder / "log"
        self.state = open_state(f"lmdb:{folder / 'state'}", max_events=50, keep_ms=0, sync=False)
        self.journal = AnswerJournal(self.log)
        self.deployer = Deployer(folder)
        settings = ServeSettings(max_history=50, deadline_ms=60_000)
        parts = {"state": self.state, "journal": self.journal, "log_dir": self.log}
        self.service = Service(self.deployer, settings, **parts)

    def post(self, url: str, body: Any) -> Any:
        """Return what one request is answered with."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(App(self.service), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(url, json=body)

        response = asyncio.run(send())
        assert response.status_code == 200, response.text
        return response.json()

    def close(self) -> None:
        """End the server; its log is whole then."""
        self.service.close()
        self.journal.close()
        assert Shipper(self.log, self.state).round()
        self.state.close()
        self.deployer.close()


def asked(place: int, now: int) -> dict[str, Any]:
    known = {"user_id": f"p{place % 3}"} if place % 4 else {}
    context = {"device": DEVICES[place % 3], "budget": place + 0.5}
    return {**known, "k": 5, "now": now, "context": context, "explore": 0.4 * (place % 2)}


def visited(shop: Shop, start: int) -> list[tuple[Any, Any, Any]]:
    """Return requests, answers, and the one event that followed from each, of another item each.

    The event's type turns with the answers, and a view says how long it took.
    """
    seen = []
    for place in range(12):
        request = asked(place, start + place * 60_000)
        answer = shop.post("/v1/recommend", request)
        chosen = answer["items"][place % 5]["item_id"]
        done = {"item_id": chosen, "event_type": KINDS[place % 4]}
        if done["event_type"] == "view":
            done["value"] = 1.5 + place
        whose = {"user_id": f"p{place % 3}", "answer_id": answer["answer_id"]}
        shop.post("/v1/events", whose | done | {"timestamp": request["now"] + 5_000})
        seen.append((request, answer, done))
    return seen


def test_impressions_equal_what_was_shown(tmp_path: Path) -> None:
    start = int(time.time() * 1000) - 3 * HOUR
    with closing(Shop(tmp_path)) as shop:
        seen = visited(shop, start)
        # This one is too new to have an outcome, though the newest event is later still.
        shop.post("/v1/recommend", asked(1, start + 2 * HOUR))
        last = {"user_id": "p0", "item_id": seen[0][2]["item_id"]}
        shop.post("/v1/events", last | {"timestamp": start + 2 * HOUR + 1})
    settings = {"name": "shop", "path": str(shop.log)}
    rule = {"rule": "leave_one_out"}
    dataset = prepare(settings, Served(), rule, Workspace(tmp_path / "workspace"))
    assert dataset.manifest["dropped"]["answers too new to have an outcome"] == 1
    examples = impressions(dataset)
    assert len(examples) == len(seen)
    for place, one in enumerate(seen):
        check_request(dataset, examples, place, *one)


def check_request(
    dataset: Dataset, examples: Examples, place: int, request: Any, answer: Any, done: Any
) -> None:
    users = [*dataset.users["user_id"].to_pylist(), None]
    assert users[examples.users[place]] == request.get("user_id")
    assert examples.times[place] == request["now"]
    said = {name: column[place].as_py() for name, column in examples.context.items()}
    assert said == request["context"]
    rows = slice(examples.offsets[place], examples.offsets[place + 1])
    ids = np.array(["", *dataset.items["item_id"].to_pylist()])
    items = [item["item_id"] for item in answer["items"]]
    assert ids[examples.items[rows]].tolist() == items
    assert examples.positions[rows].tolist() == [0, 1, 2, 3, 4]
    chances = [item.get("propensity", np.nan) for item in answer["items"]]
    np.testing.assert_allclose(examples.propensities[rows], chances, rtol=1e-6)
    assert np.isfinite(chances).all() == (request["explore"] > 0)
    chosen = np.array([item == done["item_id"] for item in items])
    for task in KINDS:
        reached = task in ("view", done["event_type"])
        assert examples.label(task)[rows].tolist() == (chosen & reached).tolist(), task
    seconds = np.where(chosen, done.get("value", np.nan), np.nan).astype(np.float32)
    np.testing.assert_array_equal(examples.label("dwell")[rows], seconds)
