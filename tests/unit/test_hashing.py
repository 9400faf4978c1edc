"""Hashed tables: which rows an id has, how ids collide, and what a training with them says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from recsys.artifacts import Workspace, read_manifest
from recsys.cli import main
from recsys.models.hashing import Collisions, Hashed, HashedTable
from recsys.optimizers import LazyAdam
from recsys.schema import InputError

DAY = 86_400
SMALL = "trainer=cpu model.dim=8 trainer.max_epochs=2 batches.size=16 logger=csv"
HASHED = f"{SMALL} embedding=hashed embedding.rows=16"


def test_a_vector_is_the_sum_of_the_rows_and_padding_has_none() -> None:
    table = Hashed(rows=50, hashes=3)(200, 4)
    ids = torch.tensor([[7, 0], [199, 7]])
    vectors = table(ids)
    for row, column in ((0, 0), (1, 0), (1, 1)):
        places = table.places(ids[row, column])
        assert places.shape == (3,)
        torch.testing.assert_close(vectors[row, column], table.rows.weight[places].sum(0))
    assert not vectors[0, 1].any()
    torch.testing.assert_close(table.weight[ids], vectors)
    vectors.sum().backward()
    touched = table.rows.weight.grad.abs().sum(1).nonzero().ravel()
    assert set(touched.tolist()) == set(table.places(torch.tensor([7, 199])).ravel().tolist())


def test_rows_follow_from_the_id_alone() -> None:
    """A grown table, another seed, another process: the same rows."""
    few = Hashed(rows=1_000)(10, 4)
    torch.manual_seed(5)
    many = Hashed(rows=1_000)(100_000, 8)
    ids = torch.arange(10)
    assert few.places(ids).equal(many.places(ids))
    assert few.places(torch.tensor([1, 2])).tolist() == [[613, 699], [227, 859]]


def test_ids_spread_evenly_over_the_rows() -> None:
    table = Hashed(rows=997)(200_001, 4)
    for hashed in table.places(torch.arange(1, 200_001)).T:
        counts = torch.bincount(hashed, minlength=997).double()
        # A fair draw has a chi-square of 996 give or take 45.
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 996 + 6 * 45


@pytest.mark.parametrize(
    ("ids", "rows", "hashes"), [(40, 5, 2), (300, 40, 2), (30, 4, 1), (9, 90, 3)]
)
def test_collisions_are_counted_as_by_hand(ids: int, rows: int, hashes: int) -> None:
    table = HashedTable(ids + 1, 2, rows, hashes)
    each = {i: table.places(torch.tensor(i)).tolist() for i in range(1, ids + 1)}
    crowd = Counter(row for places in each.values() for row in places)
    alike = Counter(tuple(sorted(places)) for places in each.values())
    found = Collisions.of(table)
    assert (found.ids, found.rows, found.crowd) == (ids, rows, max(crowd.values()))
    assert found.twins == sum(alike[tuple(sorted(places))] > 1 for places in each.values())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"rows": 1}, r"embedding.rows=1: expected 2 to"), ({"hashes": 9}, r"expected 1 to 8")],
)
def test_what_makes_no_table_is_refused(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Hashed(**wrong)


def test_rows_alone_move_by_lazy_adam() -> None:
    table = Hashed(rows=5_000)(100_000, 4)
    before = table.rows.weight.detach().clone()
    LazyAdam.prepare(table)
    optimizer = LazyAdam(table.parameters(), lr=0.1)
    table(torch.tensor([3, 77_777])).sum().backward()
    optimizer.step()
    moved = (table.rows.weight != before).any(1).nonzero().ravel()
    assert set(moved.tolist()) == set(table.places(torch.tensor([3, 77_777])).ravel().tolist())


def events(path: Path, days: range) -> str:
    """Steps along a ring; from day 4 on it has four more items."""
    lines = ["user_id,item_id,timestamp"]
    for day in days:
        ring = 24 + 4 * (day >= 4)
        for user in range(40):
            moment = 1_700_000_000 + day * DAY + user * 60
            lines += [
                f"u{user},i{(user + 3 * day + e) % ring},{moment + e * 3600}" for e in range(3)
            ]
    path.write_text("\n".join(lines))
    return str(path)


def test_trained_exported_grown_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECSYS_HOME", str(tmp_path / "home"))
    first, more = events(tmp_path / "a.csv", range(4)), events(tmp_path / "b.csv", range(4, 6))
    assert (
        main(["prepare", "data=events", f"data.path={first}", "split=days", "data.name=old"]) == 0
    )
    assert main(["train", *HASHED.split(), "name=hashed"]) == 0
    said = capsys.readouterr().err
    run = read_manifest(Workspace().find("run", "hashed"), "run")
    facts = run["collisions"]["items"]
    assert f"items: 24 ids share 16 rows, at most {facts['crowd']} one of them; " in said
    assert (facts["ids"], facts["rows"]) == (24, 16)
    assert main(["export", "hashed", "registry.register=false"]) == 0
    assert main(["recommend", "--history", "i3,i4", "--top-k", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["items"]) == 3
    assert main(["prepare", "data=events", f"data.path={more}", "grow.onto=latest"]) == 0
    assert main(["train", "resume_from=hashed", "data.dataset=latest", "name=more"]) == 0
    assert "items: 28 ids share 16 rows" in capsys.readouterr().err


def test_no_start_that_gives_each_item_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECSYS_HOME", str(tmp_path / "home"))
    log = events(tmp_path / "a.csv", range(4))
    assert main(["prepare", "data=events", f"data.path={log}", "data.name=old"]) == 0
    assert main(["train", *HASHED.split(), "item_start=cooccurrence"]) == 2
    assert "use embedding=dense, or item_start=random" in capsys.readouterr().err
    assert not Workspace().folder("run").exists() or not list(Workspace().folder("run").iterdir())
