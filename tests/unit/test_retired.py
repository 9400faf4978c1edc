"""Items that have no event left: kept in the vocabulary, and answered with no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys.artifacts import Workspace
from recsys.cli import main
from recsys.data.dataset import Dataset
from recsys.index.bundle import Bundle
from recsys.serving.deployment import self_test
from recsys.serving.engine import Engine
from recsys.serving.item_feed import ItemFeed
from recsys.serving.item_log import Changes, ItemChange
from recsys.serving.messages import RecommendRequest

DAY = 86_400
OLD, NEW = 30, 20
"""Items of the first days; i0 to i9 are seen on those alone."""


def events(path: Path, days: range) -> str:
    """Walks over a ring of items; from day 2 on without the first ten."""
    lines = ["user_id,item_id,timestamp"]
    for day in days:
        first = 0 if day < 2 else OLD - NEW
        for user in range(40):
            moment = 1_700_000_000 + day * DAY + user * 60
            steps = ((user + 2 * day + e) % (OLD - first) + first for e in range(4))
            lines += [f"u{user},i{item},{moment + 900 * e}" for e, item in enumerate(steps)]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a dataset whose first days have expired."""
    root = tmp_path_factory.mktemp("retired")
    logs = events(root / "a.csv", range(3)), events(root / "b.csv", range(3, 7))
    small = "trainer=cpu model.dim=8 trainer.max_epochs=1 batches.size=16 logger=csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(root / "home"))
        first = ["prepare", "data=events", f"data.path={logs[0]}", "split=days", "data.name=a"]
        assert main(first) == 0
        grow = ["grow.onto=latest", "grow.keep_days=4.5", "grow.retire=true"]
        assert main(["prepare", "data=events", f"data.path={logs[1]}", *grow]) == 0
        assert main(["train", *small.split(), "name=run"]) == 0
        assert main(["export", "run", "registry.register=false"]) == 0
        return Workspace().find("bundle").resolve()


def test_who_is_retired_is_in_the_dataset_and_in_the_bundle(bundle: Path) -> None:
    dataset = Dataset(bundle.parents[1] / "datasets" / "latest")
    ids = np.array(["", *dataset.items["item_id"].to_pylist()])
    gone = {f"i{item}" for item in range(OLD - NEW)}
    assert dataset.num_items == OLD
    assert set(ids[dataset.retired]) == gone
    assert dataset.manifest["grown"]["retired"] == len(gone)
    np.testing.assert_array_equal(Bundle.open(bundle).retired, dataset.retired)


def test_nobody_is_answered_with_what_is_retired(bundle: Path) -> None:
    engine = Engine.load(bundle)
    self_test(engine)
    gone = {f"i{item}" for item in range(OLD - NEW)}
    left = {f"i{item}" for item in range(OLD - NEW, OLD)}
    for asked in (RecommendRequest(k=OLD), RecommendRequest(history=["i12", "i13"], k=OLD)):
        answered = {item.item_id for item in engine.recommend([asked])[0].items}
        assert not answered & gone
        assert len(answered) >= len(left) - 2
    assert not {item.item_id for item in engine.similar("i15", OLD).items} & gone
    answer = engine.recommend([RecommendRequest(history=["i3"], k=5)])[0]
    assert answer.history_used == 1, "what somebody did with it still says something"
    assert not {item.item_id for item in answer.items} & gone


class Told:
    """A log of items that says what it is given."""

    every = 0.0

    def __init__(self, changes: list[ItemChange]) -> None:
        self.changes = changes

    def since(self, number: int) -> Changes:
        return Changes(len(self.changes), self.changes[number:])


def test_one_that_is_added_again_is_answered_with(bundle: Path) -> None:
    engine = Engine.load(bundle)
    change = ItemChange("i3", removed=False, moment=0, number=1)
    view = ItemFeed(Told([change])).view(engine)
    asked = RecommendRequest(k=OLD)
    answered = {item.item_id for item in engine.recommend([asked], view=view)[0].items}
    assert "i3" in answered
    assert "i4" not in answered


def test_retiring_needs_something_that_expires(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECSYS_HOME", str(bundle.parents[1]))
    log = str(bundle.parents[2] / "b.csv")
    wrong = ["prepare", "data=events", f"data.path={log}", "grow.onto=latest", "grow.retire=true"]
    assert main(wrong) == 2
    assert "no effect without grow.keep_days" in capsys.readouterr().err
