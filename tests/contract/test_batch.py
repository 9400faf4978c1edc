"""Everyone's recommendations as files: the server's answers, whole after any death."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from recsys.artifacts import Workspace, write_manifest
from recsys.cli import main
from recsys.schema import InputError
from recsys.serving.batch import Batch, run
from recsys.serving.batch_settings import BatchSettings, Shard
from recsys.serving.engine import Engine
from recsys.serving.messages import HistoryEvent, RecommendRequest
from tiny_bundles import tasks_ranker, write_tiny_bundle

NOW = 1_700_400_000
ASKED = RecommendRequest(k=7, now=NOW)
FEW = {"part_users": 8, "batch": 3}
Open = Callable[..., Batch]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "tiny", num_users=30)


@pytest.fixture
def opened(tmp_path: Path, bundle: Path) -> Open:
    """Open a batch of parts of 8 users of the tiny bundle, into `out`."""

    def make(request: RecommendRequest = ASKED, path: Path = bundle, **settings: Any) -> Batch:
        chosen = {"out": str(tmp_path / "out"), **FEW, **settings}
        return Batch.open(path, request, BatchSettings(**chosen), Workspace(tmp_path / "home"))

    return make


def rows(out: Path) -> Iterator[dict[str, Any]]:
    for part in sorted(out.glob("*.parquet")):
        yield from pq.read_table(part).to_pylist()


def content(out: Path) -> dict[str, bytes]:
    return {part.name: part.read_bytes() for part in sorted(out.glob("*.parquet"))}


def served(engine: Engine, request: RecommendRequest) -> tuple[list[str], list[float], str]:
    """Return what a server answers to one request alone."""
    answer = engine.recommend([request])[0]
    return [i.item_id for i in answer.items], [i.score for i in answer.items], answer.source


def check(out: Path, engine: Engine, request_of: Callable[[str], RecommendRequest]) -> int:
    """Compare every row with the server's answer; return how many there are."""
    count = 0
    for row in rows(out):
        items, scores, source = served(engine, request_of(row["user_id"]))
        assert (row["items"], row["source"]) == (items, source)
        assert row["scores"] == pytest.approx(scores, rel=1e-6)
        count += 1
    return count


KINDS: dict[str, tuple[dict[str, Any], RecommendRequest]] = {
    "exact": ({}, ASKED),
    "inverted lists": ({"index": "ivf_flat"}, ASKED),
    "an order alone": ({"has_time": False, "inputs": ("items", "lengths", "gaps")}, ASKED),
    "seen kept": ({}, replace(ASKED, exclude_seen=False)),
    "filters": ({}, replace(ASKED, allow_categories=["hats"], exclude_items=["i22", "i26"])),
    "ranked": ({"ranker": tasks_ranker(), "featured": True}, ASKED),
    "context": (
        {"ranker": tasks_ranker(), "featured": True},
        replace(ASKED, context={"device": "phone", "budget": 3.0}),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_everyone_is_answered_as_by_the_server(kind: str, tmp_path: Path, opened: Open) -> None:
    made, request = KINDS[kind]
    path = write_tiny_bundle(tmp_path / "another", num_users=30, **made)
    one = opened(request, path)
    run(one)
    assert one.finish()["users"] == 30
    assert check(one.out, Engine.load(path), lambda user: replace(request, user_id=user)) == 30


def test_ties_go_the_servers_way(tmp_path: Path, opened: Open) -> None:
    path = write_tiny_bundle(tmp_path / "tied", num_users=30, alike=4)
    one = opened(path=path)
    run(one)
    first = next(rows(one.out))
    assert len(set(first["scores"])) < len(first["scores"])
    assert check(one.out, Engine.load(path), lambda user: replace(ASKED, user_id=user)) == 30


def test_the_second_stage_is_used_unless_it_is_declined(tmp_path: Path, opened: Open) -> None:
    path = write_tiny_bundle(tmp_path / "both", ranker=tasks_ranker(), featured=True)
    for chosen, name in ((None, "as served"), (True, "asked"), (False, "declined")):
        run(opened(path=path, rank=chosen, out=str(tmp_path / name)))
    assert content(tmp_path / "as served") == content(tmp_path / "asked")
    plain = Engine.load(path, ranked=False)
    asked = check(tmp_path / "declined", plain, lambda user: replace(ASKED, user_id=user))
    assert asked == 20
    assert content(tmp_path / "asked") != content(tmp_path / "declined")


def test_exact_search_takes_the_place_of_the_index(tmp_path: Path, opened: Open) -> None:
    path = write_tiny_bundle(tmp_path / "lists", index="ivf_flat", effort=1)
    flat = write_tiny_bundle(tmp_path / "flat")
    run(opened(path=path, exact=True, out=str(tmp_path / "exact")))
    run(opened(path=flat, out=str(tmp_path / "as flat")))
    assert [*rows(tmp_path / "exact")] == [*rows(tmp_path / "as flat")]


@pytest.mark.parametrize("threads", [1, 3])
def test_files_do_not_depend_on_threads(threads: int, tmp_path: Path, opened: Open) -> None:
    run(opened(out=str(tmp_path / "one"), threads=1))
    run(opened(out=str(tmp_path / "some"), threads=threads))
    assert content(tmp_path / "one") == content(tmp_path / "some")
    assert len(content(tmp_path / "one")) == 4


KILLED = """
import os, signal, sys
from recsys.serving import batch
after, real = int(sys.argv.pop(1)), batch.written

def written(scratch, tables, schema):
    if len(list(scratch.parent.glob("*.parquet"))) == after:
        scratch.write_bytes(b"PAR1 half of a part")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(scratch, tables, schema)

batch.written = written
from recsys.cli import main
main(sys.argv[1:])
"""


def command(bundle: Path, out: Path, *more: str) -> list[str]:
    few = ["--part-users", "8", "--batch", "3", "--threads", "1", "--top-k", "7"]
    return ["recommend", "--all-users", str(bundle), "--out", str(out), *few, *more]


@pytest.mark.parametrize("after", [0, 2])
def test_killed_in_a_part_it_goes_on_to_the_same_bytes(
    after: int, bundle: Path, tmp_path: Path
) -> None:
    typed = command(bundle, tmp_path / "killed")
    died = subprocess.run([sys.executable, "-c", KILLED, str(after), *typed], check=False)
    assert died.returncode == -signal.SIGKILL
    assert len(content(tmp_path / "killed")) == after
    assert list((tmp_path / "killed").glob(".part-*"))
    there = {part.name: part.stat().st_ino for part in (tmp_path / "killed").glob("*.parquet")}
    assert main(typed) == 0  # it keeps the moment that the one who died answered for
    kept = {name: (tmp_path / "killed" / name).stat().st_ino for name in there}
    assert kept == there
    moment = json.loads((tmp_path / "killed" / "plan.json").read_text())["request"]["now"]
    assert main([*command(bundle, tmp_path / "whole"), "--now", str(moment)]) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert names == ["manifest.json", *(f"part-0000{n}.parquet" for n in range(4)), "plan.json"]


def test_a_whole_folder_is_checked_and_left_alone(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = command(bundle, tmp_path / "out", "--json")
    assert main(typed) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["users"] == 30
    assert re.search(r"30 of 30 users, [\d,]+ users/s, 0:00:00 left", said.err)
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert main(typed) == 0
    assert "nothing: it was whole" in capsys.readouterr().out
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    part = tmp_path / "out" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    assert main(typed) == 2
    assert f"{part}: content differs" in capsys.readouterr().err


def start(typed: list[str], rank: int, world: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
    typed = [sys.executable, "-m", "recsys.cli", *typed]
    return subprocess.Popen(typed, env=environment, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_folder_and_the_last_one_finishes(
    bundle: Path, tmp_path: Path, opened: Open
) -> None:
    shared = tmp_path / "shared"
    both = [start(command(bundle, shared), rank, 2) for rank in range(2)]
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert any("recommendations for 30 users" in text for text in said)
    manifest = json.loads((shared / "manifest.json").read_text())
    assert (manifest["parts"], manifest["users"]) == (4, 30)
    alone = opened(replace(ASKED, now=manifest["request"]["now"]))
    run(alone)
    assert content(shared) == content(alone.out)


def test_a_share_alone_names_what_is_missing(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = command(bundle, tmp_path / "out")
    assert main([*typed, "--shard", "1/2"]) == 0
    assert "2 of 4 are others' to write" in capsys.readouterr().out
    assert [*content(tmp_path / "out")] == ["part-00001.parquet", "part-00003.parquet"]
    assert main([*typed, "--finish"]) == 2
    assert "2 of 4 parts are missing, the first are part-00000.parquet" in capsys.readouterr().err
    assert main([*typed, "--shard", "0/2"]) == 0
    assert "recommendations for 30 users (16 of them now)" in capsys.readouterr().out


@pytest.mark.parametrize("said", ["2/2", "1", "-1/2", "a/b"])
def test_a_share_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(InputError, match="expected i/n, i from 0 to n - 1"):
        Shard.of(said)


def write_dataset(path: Path, items: list[str], has_time: bool = True) -> Path:
    """Write a dataset of 9 users, u0 to u4 the tiny bundle's; user u saw items u to u + 3."""
    path.mkdir()
    ids = [*(f"u{user}" for user in range(5)), *(f"new{user}" for user in range(4))]
    pq.write_table(pa.table({"item_id": items}), path / "items.parquet")
    pq.write_table(pa.table({"user_id": ids}), path / "users.parquet")
    (path / "events").mkdir()
    seen = (np.arange(len(ids))[:, None] + np.arange(4)) % len(items) + 1
    times = (1_700_000_000_000 + np.arange(seen.size) * 3_600_000).astype(np.int64)
    arrays = {
        "items": seen.ravel().astype(np.int32),
        "types": (np.arange(seen.size) % 4 + 1).astype(np.int8),
        "times": times if has_time else np.arange(seen.size) % 4,
        "offsets": np.arange(len(ids) + 1) * 4,
    }
    for name, array in arrays.items():
        np.save(path / "events" / f"{name}.npy", array)
    sizes = {"num_users": len(ids), "num_items": len(items), "num_events": seen.size}
    write_manifest(path, "dataset", has_time=has_time, **sizes)
    return path


@pytest.mark.parametrize("has_time", [True, False])
def test_users_of_a_dataset_are_answered_by_what_it_holds(
    has_time: bool, tmp_path: Path, opened: Open
) -> None:
    """As a server does with that history given, where some items are not the bundle's."""
    items = ["i30", "gone", "i9", "i12", "lost", "i60", "i15"]
    data = write_dataset(tmp_path / "later", items, has_time)
    made = {"ranker": tasks_ranker(), "featured": True, "has_time": has_time}
    path = write_tiny_bundle(tmp_path / "another", **made)
    one = opened(path=path, dataset=str(data))
    run(one)
    manifest = one.finish()
    events = {
        name: np.load(data / "events" / f"{name}.npy") for name in ("items", "types", "times")
    }
    unknown = int(np.isin(events["items"], [2, 5]).sum())
    assert (manifest["unknown_events"], manifest["people"]["unknown_items"]) == (unknown, 2)
    users = [row["user_id"] for row in rows(one.out)]
    names = ("view", "favourite", "cart", "purchase")

    def asked(user: str) -> RecommendRequest:
        places = range(users.index(user) * 4, users.index(user) * 4 + 4)
        columns = (events[name][list(places)].tolist() for name in ("items", "types", "times"))
        history = [
            HistoryEvent(items[item - 1], names[kind - 1], moment if has_time else None)
            for item, kind, moment in zip(*columns, strict=True)
        ]
        return replace(ASKED, user_id=user, history=history)

    assert check(one.out, Engine.load(path), asked) == 9


def test_users_of_a_file_in_its_order(tmp_path: Path, opened: Open, bundle: Path) -> None:
    file = tmp_path / "users.txt"
    file.write_text("user_id\nu7\nnobody\n\nu3\nu7\nelse\n")
    one = opened(users=str(file))
    run(one)
    manifest = one.finish()
    assert manifest["people"]["unknown_users"] == {"count": 2, "first": ["nobody", "else"]}
    assert (manifest["users"], manifest["popular"]) == (4, 2)
    assert [row["user_id"] for row in rows(one.out)] == ["u7", "nobody", "u3", "else"]
    assert [row["source"] for row in rows(one.out)] == ["model", "popular", "model", "popular"]
    assert check(one.out, Engine.load(bundle), lambda user: replace(ASKED, user_id=user)) == 4
    few = opened(users=str(file), skip_unknown=True, out=str(tmp_path / "known"))
    run(few)
    assert [row["user_id"] for row in rows(few.out)] == ["u7", "u3"]


def wrong(tmp_path: Path, name: str) -> dict[str, Any]:
    """Return the settings of one mistake."""
    out, file = tmp_path / "out", tmp_path / "users.txt"
    if name == "another bundle":
        return {"path": write_tiny_bundle(tmp_path / "another", num_users=30, num_items=119)}
    if name == "other files":
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.jpg").touch()
        return {"out": str(tmp_path / "photos")}
    if name == "other users":
        file.write_text("u1\n")
        return {"users": str(file)}
    if name == "nobody":
        file.write_text("x\ny\n")
        return {"users": str(file), "skip_unknown": True}
    if name == "no users":
        file.write_text("\n")
        return {"users": str(file)}
    if name == "no column":
        table = pa.table({"person": ["u1"]})
        pq.write_table(table, tmp_path / "users.parquet")
        return {"users": str(tmp_path / "users.parquet")}
    if name == "other items":
        return {
            "dataset": str(write_dataset(tmp_path / "other", ["x", "y"])),
            "out": str(out / "d"),
        }
    if name == "no times":
        data = write_dataset(tmp_path / "untimed", ["i9", "i10"], has_time=False)
        return {"dataset": str(data), "out": str(out / "d")}
    return {
        "another k": {"request": replace(ASKED, k=8)},
        "another moment": {"request": replace(ASKED, now=NOW + 1)},
        "seen kept": {"request": replace(ASKED, exclude_seen=False)},
        "other parts": {"part_users": 9},
        "more than there are": {"request": replace(ASKED, k=121)},
        "no second stage": {"rank": True},
        "no such dataset": {"dataset": "nope"},
    }[name]


MISTAKES = {
    "another bundle": r"bundle\.version was tiny, now another.*choose another --out",
    "another k": r"request\.k was 7, now 8; choose another --out",
    "another moment": r"request\.now was \d+, now \d+; choose another --out",
    "seen kept": r"request\.exclude_seen was not given, now False",
    "other parts": r"settings\.part_users was 8, now 9",
    "other users": r"people\.count was 30, now 1",
    "other files": "holds other files, such as cat.jpg; .* choose another --out",
    "more than there are": "top-k=121 is more than the 120 items of bundle tiny",
    "no second stage": "--rank has no effect on bundle tiny: it has no second stage",
    "nobody": "none of its 2 users is known, such as x, y; leave out --skip-unknown",
    "no users": "names no user; expected an id a line",
    "no column": "no column 'user_id'; found person",
    "no such dataset": "no dataset named 'nope'",
    "other items": "bundle tiny knows none of its 2 items; name the dataset that",
    "no times": "dataset untimed has no times, and bundle tiny reads them",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_suit_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, opened: Open
) -> None:
    run(opened())
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match=MISTAKES[name]):
        opened(**wrong(tmp_path, name))
    assert content(tmp_path / "out") == before


def test_a_full_disk_leaves_the_parts_before_it(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recsys.cli import explain
    from recsys.serving import parts

    one, real = opened(threads=1), parts.synced

    def full(path: Path) -> None:
        if path.name.startswith(".part-00002"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "synced", full)
        with pytest.raises(OSError, match="No space") as met:
            run(one)
    assert "no space left on the device" in str(explain(met.value))
    # A later part may have been begun before the command heard of it, and is then whole.
    assert {"part-00000.parquet", "part-00001.parquet"} <= set(content(one.out))
    assert "part-00002.parquet" not in content(one.out)
    assert not list(one.out.glob(".part-*"))
    run(opened(out=str(tmp_path / "roomy")))
    run(opened())
    assert content(one.out) == content(tmp_path / "roomy")


def test_a_part_of_something_else_is_named(opened: Open) -> None:
    one = opened()
    run(one)
    one.path(2).write_bytes(b"no Parquet at all")
    with pytest.raises(InputError, match=r"part-00002\.parquet: not a whole part; delete it"):
        one.finish()


FLAGS = {
    ("--out", "x"): "--out has no effect on one answer; add --all-users",
    ("--exact",): "--exact has no effect on one answer",
    ("--all-users", "--user", "u1"): "leave out --user and --history",
    ("--all-users", "--skip-unknown"): "skip_unknown has no effect without a file of users",
    ("--all-users", "-k", "1001"): "k: ",
    ("--all-users", "--context", "device"): "--context device: expected NAME=VALUE",
    ("--all-users", "--context", "device=phone"): "context: device has no effect on bundle tiny",
    ("--context", "device=phone"): "context: device has no effect on bundle tiny",
    ("--all-users", "--users", "none.txt"): "none.txt: No such file",
}


@pytest.mark.parametrize("words", FLAGS)
def test_flags_that_do_not_go_together(
    words: tuple[str, ...],
    bundle: Path,
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["recommend", str(bundle), *words]) == 2
    assert FLAGS[words] in capsys.readouterr().err
    assert not list(workspace.root.rglob("part-*"))


def test_one_answer_reads_a_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_bundle(tmp_path / "both", ranker=tasks_ranker(), featured=True)
    typed = ["recommend", "--bundle", str(path), "--user", "u1", "--now", str(NOW), "--json"]
    answers = []
    for more in ([], ["--context", "device=tablet", "budget=9"]):
        assert main([*typed, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["items"])
    context = {"device": "tablet", "budget": 9}
    request = RecommendRequest(user_id="u1", now=NOW, context=context)
    items, scores, _ = served(Engine.load(path), request)
    assert ([i["item_id"] for i in answers[1]], [i["score"] for i in answers[1]]) == (items, scores)
    assert answers[0] != answers[1]


def test_it_needs_no_torch(bundle: Path, tmp_path: Path) -> None:
    heavy = ("torch", "hydra", "pytorch_lightning", "mlflow", "duckdb")
    code = f"""
import sys
from recsys.cli import main
assert main(sys.argv[1:]) == 0
loaded = [name for name in {heavy} if name in sys.modules]
assert not loaded, loaded
"""
    typed = command(bundle, tmp_path / "out")
    subprocess.run([sys.executable, "-c", code, *typed], check=True)
