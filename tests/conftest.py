"""A small log with a known answer: everyone walks the same ring of items, from another start."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from ranked_shop import RANKER, RETRIEVER, SHOP
from recsys.artifacts import Workspace
from redis_server import RedisServer

# Before anything loads OpenMP: models this small train faster on one thread than on several.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure: examples are bounded in number, not in time.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

ITEMS, USERS, EVENTS = 30, 120, 12
DAY = 86_400
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def ring_rows() -> list[dict[str, object]]:
    """User u's event e is item (u + e) mod ITEMS, an hour after the last; aisles are halves."""
    types = ("view", "cart", "view", "purchase")
    return [
        {
            "user_id": f"u{user}",
            "item_id": f"i{(user + event) % ITEMS}",
            "timestamp": 1_700_000_000 + user * 60 + event * 3600,
            "event_type": types[event % 4],
        }
        for user in range(USERS)
        for event in range(EVENTS)
    ]


@pytest.fixture(autouse=True)
def no_store_of_another_test() -> Iterator[None]:
    """Lightning's logger tells the process where MLflow is: each test begins without."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def ring_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log as CSV, with an item table beside it."""
    folder = tmp_path_factory.mktemp("ring")
    rows = ring_rows()
    with (folder / "events.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with (folder / "items.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "title", "category"])
        for item in range(ITEMS):
            writer.writerow([f"i{item}", f"Item {item}", "left" if item < ITEMS // 2 else "right"])
    return folder / "events.csv"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty workspace that the command also uses."""
    monkeypatch.setenv("RECSYS_HOME", str(tmp_path / "workspace"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Workspace()


@pytest.fixture(scope="session")
def trained_shop(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a synthetic shop, its retriever `first` and its ranker `second`."""
    from recsys.cli import main

    root = tmp_path_factory.mktemp("shop") / "workspace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(root))
        assert main(["train", *SHOP, *RETRIEVER, "name=first"]) == 0
        assert main(["train", *SHOP, *RANKER, "ranking.retriever=first", "name=second"]) == 0
        return Workspace()


@pytest.fixture
def ranked(trained_shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The trained shop's workspace, which the command uses, too; what a test adds to it stays."""
    monkeypatch.setenv("RECSYS_HOME", str(trained_shop.root))
    return trained_shop


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A real redis-server that keeps what it acknowledged."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder, appendonly="yes", appendfsync="always") as server:
        yield server


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; its tests skip where there is none."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}")
    return DATA
