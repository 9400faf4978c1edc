"""Bundles are tested before they serve, swapped whole, followed everywhere, and never lost."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest

from recsys.index.bundle import FILES, Bundle
from recsys.schema import InputError
from recsys.serving import deployment, promote
from recsys.serving.deployment import (
    Bounds,
    Deployer,
    Deployment,
    Placed,
    Record,
    load_verified,
    self_test,
)
from recsys.serving.engine import Engine
from recsys.serving.messages import HistoryEvent, RecommendRequest, milliseconds
from tiny_bundles import START, item_ids, write_tiny_bundle

DIMS = {"a": 8, "b": 6, "c": 5}
"""Bundles of other widths have other vectors, so each answers in its own way."""
ASKED = RecommendRequest(history=["i9", "i12"], k=10)


def write_tested_bundle(path: Path, **sizes: Any) -> Path:
    """Write a tiny bundle with the self-tests that `recsys export` would store."""
    write_tiny_bundle(path, **sizes)
    engine = Engine.load(path)
    ids = item_ids(30)
    entries = []
    for user in range(3):
        history = ids[user + 1 : user + 4]
        times = [START + place * 1000 for place in range(3)]
        events = [
            HistoryEvent(i, "view", milliseconds(t)) for i, t in zip(history, times, strict=True)
        ]
        request = RecommendRequest(history=events, exclude_seen=False, now=times[-1] + 1)
        entries.append(
            {
                "user_id": f"u{user}",
                "history": history,
                "event_types": ["view"] * 3,
                "timestamps": times,
                "now": times[-1] + 1,
                "top": [item.item_id for item in engine.recommend([request])[0].items],
            }
        )
    change_manifest(path, self_test=entries)
    return path


def change_manifest(path: Path, **facts: Any) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def items(engine: Engine) -> list[str]:
    return [item.item_id for item in engine.recommend([ASKED])[0].items]


def wait_for(true: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for name, dim in DIMS.items():
        write_tested_bundle(folder / name, dim=dim)
    return folder


@pytest.fixture
def bundles(originals: Path, tmp_path: Path) -> Path:
    """Bundles a, b and c to spoil at will."""
    shutil.copytree(originals, tmp_path / "bundles")
    return tmp_path / "bundles"


@pytest.fixture
def state(tmp_path: Path, bundles: Path) -> Path:
    """A state directory that a is deployed in."""
    Record(tmp_path / "serving").begin(bundles / "a")
    return tmp_path / "serving"


@pytest.fixture
def deployer(state: Path) -> Iterator[Deployer]:
    deployer = Deployer(state, every=0.02)
    yield deployer
    deployer.close()


@pytest.fixture
def other(state: Path, deployer: Deployer) -> Iterator[Deployer]:
    """The deployer of another worker."""
    other = Deployer(state, every=0.02)
    yield other
    other.close()


# Loading


def test_a_good_bundle_is_loaded_once(bundles: Path) -> None:
    engine = load_verified(bundles / "a")
    assert engine.version == "a"
    assert load_verified(str(bundles / "a")) is engine
    (bundles / "link").symlink_to("a")
    assert load_verified(bundles / "link") is engine
    os.utime(bundles / "a" / "encoder.onnx")
    assert load_verified(bundles / "a") is not engine


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte(bundles: Path, name: str) -> None:
    kept = load_verified(bundles / "a")
    content = bytearray((bundles / "a" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundles / "a" / name).unlink()
    (bundles / "a" / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: content differs from its manifest"):
        load_verified(bundles / "a")
    assert items(kept)


@pytest.mark.parametrize("name", FILES)
def test_truncated(bundles: Path, name: str) -> None:
    with (bundles / "a" / name).open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    with pytest.raises(InputError, match=f"{name}: content differs from its manifest"):
        load_verified(bundles / "a")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_half_copied(bundles: Path, name: str) -> None:
    (bundles / "a" / name).unlink()
    with pytest.raises(InputError, match=f"{name}.*(missing|in it)|no {name}"):
        load_verified(bundles / "a")


def test_another_schema_version(bundles: Path) -> None:
    change_manifest(bundles / "a", schema_version=2)
    with pytest.raises(InputError, match=r"schema version 2; this recsys .* reads version 1"):
        load_verified(bundles / "a")


def test_a_manifest_that_is_no_json(bundles: Path) -> None:
    (bundles / "a" / "manifest.json").write_text('{"kind": "bun')
    with pytest.raises(InputError, match="not JSON"):
        load_verified(bundles / "a")


def test_a_manifest_that_makes_no_sense(bundles: Path) -> None:
    change_manifest(bundles / "a", max_length="many")
    with pytest.raises(InputError, match=r"cannot be loaded.*export it again"):
        load_verified(bundles / "a")


def test_a_self_test_with_another_answer(bundles: Path) -> None:
    entries = json.loads((bundles / "a" / "manifest.json").read_text())["self_test"]
    top = entries[2]["top"]
    top[0], top[5] = top[5], top[0]
    change_manifest(bundles / "a", self_test=entries)
    with pytest.raises(InputError, match=f"self-test 2 failed: answered .*, expected {top[0]}"):
        load_verified(bundles / "a")


def test_a_self_test_of_another_bundle(bundles: Path) -> None:
    entries = json.loads((bundles / "b" / "manifest.json").read_text())["self_test"]
    change_manifest(bundles / "a", self_test=entries)
    with pytest.raises(InputError, match="self-test 0 failed"):
        load_verified(bundles / "a")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a bundle: no manifest\.json"):
        load_verified(tmp_path / "nowhere")


def scored(top: list[str], **scores: float) -> Any:
    """An engine that knows these items with these scores, and whose self-test expects `top`."""
    ranked = sorted(scores, key=lambda item: -scores[item])

    def recommend(requests: list[RecommendRequest]) -> list[Any]:
        shown = [SimpleNamespace(item_id=i, score=scores[i]) for i in ranked[: requests[0].k]]
        return [SimpleNamespace(items=shown)]

    entry = {"user_id": "u", "history": ["x"], "event_types": ["view"], "top": top}
    entry |= {"timestamps": None, "now": None}
    bundle = SimpleNamespace(path="here", manifest={"self_test": [entry]})
    return SimpleNamespace(bundle=bundle, recommend=recommend)


@pytest.mark.parametrize(
    ("top", "passes"),
    [
        (["a", "b", "c"], True),
        (["b", "a", "c"], True),  # a and b score alike
        (["a", "b", "d"], True),  # c and d do, across the cut
        (["a", "c", "b"], False),
        (["a", "b", "e"], False),
        (["a", "b", "unknown"], False),
        (["a", "b"], True),
        (["a", "b", "c", "d", "e", "f"], False),  # more than the engine has
    ],
)
def test_only_ties_may_swap(top: list[str], passes: bool) -> None:
    engine = scored(top, a=2.000005, b=2.0, c=1.0, d=0.999995, e=0.9998)
    if passes:
        self_test(engine)
    else:
        with pytest.raises(InputError, match="self-test 0 failed"):
            self_test(engine)


@pytest.mark.parametrize(
    "moment", [0, 1, 5_000, 99_999_999_999, 100_000_000_000, START + 7, 253_402_300_799_998]
)
def test_moments_of_self_tests_are_kept_to_the_millisecond(moment: int) -> None:
    given = deployment.moment(moment)
    assert given is not None
    assert milliseconds(given) == moment


def test_deleted_while_loaded(bundles: Path) -> None:
    engine = load_verified(bundles / "a")
    before = items(engine), engine.similar("i9"), engine.recommend([RecommendRequest("u1")])
    shutil.rmtree(bundles / "a")
    assert items(engine) == before[0]
    assert engine.similar("i9").items == before[1].items
    assert engine.recommend([RecommendRequest("u1")])[0].items == before[2][0].items
    with pytest.raises(InputError, match="not a bundle"):
        load_verified(bundles / "a")


# The record


def placed(name: str) -> Placed:
    return Placed(f"/bundles/{name}", name, f"print of {name}")


A, B, C = placed("a"), placed("b"), placed("c")


def test_edits_of_the_record() -> None:
    first = Deployment(A)
    assert first.deployed(A) == first
    second = first.deployed(B)
    assert (second.champion, second.previous) == (B, A)
    assert (second.rolled_back().champion, second.rolled_back().previous) == (A, B)
    tried = second.challenged(C, "canary", 0.1)
    assert (tried.challenger, tried.mode, tried.share, tried.trial) == (C, "canary", 0.1, 2)
    assert tried.challenged(C, "canary", 0.5).trial == 2
    promoted = tried.promoted()
    assert (promoted.champion, promoted.previous) == (C, B)
    for ended in (promoted, tried.stopped(), tried.deployed(A), tried.rolled_back()):
        assert (ended.challenger, ended.mode, ended.share, ended.trial) == (None, "off", 0.0, 0)


def test_another_trial_has_another_number() -> None:
    tried = msgspec.structs.replace(Deployment(A).challenged(B, "shadow", 0), generation=5)
    assert tried.challenged(B, "shadow", 0).trial == tried.trial == 2
    assert tried.challenged(B, "canary", 0.1).trial == 6
    assert tried.challenged(C, "shadow", 0).trial == 6


def test_edits_that_cannot_be() -> None:
    with pytest.raises(InputError, match="no bundle before a to return to"):
        Deployment(A).rolled_back()
    with pytest.raises(InputError, match="no bundle challenges a"):
        Deployment(A).promoted()
    with pytest.raises(InputError, match="a is the champion"):
        Deployment(A).challenged(A, "shadow", 0)
    with pytest.raises(InputError, match=r"share=1\.5 is out of range; expected 0 to 1"):
        Deployment(A).challenged(B, "canary", 1.5)


def test_each_change_is_noted(state: Path) -> None:
    record = Record(state)
    assert [change.what for change in record.read().history] == ["start"]
    for _ in range(30):
        record.change(lambda old: old.deployed(B if old.champion != B else C), "deploy", "me", "y")
    read = record.read()
    assert (read.generation, len(read.history)) == (31, 20)
    last = read.history[-1]
    assert (last.generation, last.champion, last.by, last.why) == (31, "c", "me", "y")


def test_an_edit_without_effect_is_not_written(state: Path) -> None:
    before = (state / "deployment.json").stat()
    same = Record(state).change(lambda old: old.deployed(old.champion), "deploy")
    after = (state / "deployment.json").stat()
    assert same.generation == 1
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_change_that_expects_another_generation(state: Path) -> None:
    with pytest.raises(InputError, match="generation 3 was expected, but it is 1: start came"):
        Record(state).change(lambda old: old.deployed(B), "deploy", expected=3)
    assert Record(state).read().generation == 1
    assert Record(state).change(lambda old: old.deployed(B), "", expected=1).generation == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "not a deployment record"),
        ('{"champion": {"pa', "not a deployment record"),
        ("[]", "not a deployment record"),
        ('{"format": 2, "winner": "x"}', "of format 2; this recsys reads format 1"),
        ('{"champion": "x"}', "of format None"),
        ('{"format": 1, "champion": "x"}', "not a deployment record"),
    ],
)
def test_records_that_cannot_be_read(state: Path, body: str, message: str) -> None:
    (state / "deployment.json").write_text(body)
    with pytest.raises(InputError, match=message + ".*move it away"):
        Record(state).read()


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bundle is deployed yet"):
        Record(tmp_path).read()
    with pytest.raises(InputError, match="no bundle is deployed yet"):
        Deployer(tmp_path)


WRITER = """
import sys
from pathlib import Path
from recsys.serving.deployment import Placed, Record
record = Record(Path(sys.argv[1]))
for turn in range(40):
    bundle = Placed("/b", "b", f"{sys.argv[2]} {turn}")
    record.change(lambda old: old.deployed(bundle), "deploy", sys.argv[2])
"""


def test_writers_of_several_processes_lose_no_change(state: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(state)]
    writers = [subprocess.Popen([*command, name]) for name in ("one", "two", "three")]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    read = Record(state).read()
    assert read.generation == 1 + 3 * 40
    assert [change.generation for change in read.history] == list(range(102, 122))


def test_threads_lose_no_change_either(state: Path) -> None:
    def write(number: int) -> None:
        bundle = Placed("/b", "b", str(number))
        Record(state).change(lambda old: old.deployed(bundle), "deploy")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(100)))
    assert Record(state).read().generation == 101


def test_a_start_that_names_what_it_named_before_changes_nothing(
    state: Path, bundles: Path
) -> None:
    record = Record(state)
    assert record.begin(bundles / "b").champion.version == "b"
    record.change(Deployment.rolled_back, "rollback")
    assert record.begin(bundles / "b").champion.version == "a"  # the rollback stands
    assert record.begin(None).champion.version == "a"
    assert record.begin(bundles / "c").champion.version == "c"
    shutil.rmtree(bundles / "c")
    with pytest.raises(InputError, match="not a bundle"):
        record.begin(bundles / "c")


def test_a_start_in_place_of_a_champion_that_is_gone(state: Path, bundles: Path) -> None:
    record = Record(state)
    record.change(lambda old: old.deployed(Placed.of(Bundle.open(bundles / "b"))), "deploy")
    shutil.rmtree(bundles / "b")
    assert record.begin(bundles / "a").champion.version == "a"


def test_a_damaged_bundle_does_not_begin(state: Path, bundles: Path) -> None:
    (bundles / "b" / "index.faiss").write_bytes(b"")
    with pytest.raises(InputError, match="content differs"):
        Record(state).begin(bundles / "b")
    assert Record(state).read().champion.version == "a"


# Deploying


def versions(deployer: Deployer) -> tuple[str, str | None, str | None]:
    """Champion, previous and challenger in use."""
    roster = deployer.current
    return (
        roster.champion.version,
        roster.previous.version if roster.previous else None,
        roster.challenger.version if roster.challenger else None,
    )


def test_deploy_and_roll_back(deployer: Deployer, bundles: Path) -> None:
    first = deployer.current.champion
    record = deployer.deploy(bundles / "b", by="ops", why="better")
    assert versions(deployer) == ("b", "a", None)
    assert deployer.current.previous is first
    assert (record.generation, deployer.current.generation) == (2, 2)
    assert (record.history[-1].by, record.history[-1].why) == ("ops", "better")
    deployer.rollback()
    assert versions(deployer) == ("a", "b", None)
    assert deployer.current.champion is first


def test_a_trial_from_shadow_to_champion(deployer: Deployer, bundles: Path) -> None:
    bounds = Bounds(min_answers=7)
    deployer.challenge(bundles / "b", "shadow", bounds=bounds)
    assert versions(deployer) == ("a", None, "b")
    assert (deployer.current.mode, deployer.current.bounds) == ("shadow", bounds)
    deployer.challenge(bundles / "b", "canary", 0.25)
    assert (deployer.current.mode, deployer.current.share) == ("canary", 0.25)
    assert deployer.current.bounds == bounds
    challenger = deployer.current.challenger
    deployer.promote_challenger()
    assert versions(deployer) == ("b", "a", None)
    assert deployer.current.champion is challenger
    assert deployer.current.mode == "off"


def test_a_trial_that_is_stopped(deployer: Deployer, bundles: Path) -> None:
    deployer.challenge(bundles / "b", "canary", 0.5)
    deployer.stop_challenge()
    assert versions(deployer) == ("a", None, None)
    deployer.stop_challenge()
    assert deployer.record.generation == 3


def test_other_processes_follow(deployer: Deployer, other: Deployer, bundles: Path) -> None:
    told: list[str] = []
    other.on_change(lambda roster: told.append(roster.champion.version))
    deployer.deploy(bundles / "b")
    deployer.challenge(bundles / "c", "canary", 0.5)
    wait_for(lambda: other.current.generation == 3)
    assert versions(other) == ("b", "a", "c")
    deployer.rollback()
    wait_for(lambda: other.current.generation == 4)
    assert versions(other) == ("a", "b", None)
    assert told[-1] == "a"


def spoil(kind: str, path: Path) -> None:
    match kind:
        case "flipped":
            content = bytearray((path / "index.faiss").read_bytes())
            content[-1] ^= 1
            (path / "index.faiss").write_bytes(content)
        case "truncated":
            os.truncate(path / "item_vectors.safetensors", 100)
        case "half-copied":
            (path / "users.parquet").unlink()
        case "schema":
            change_manifest(path, schema_version=99)
        case "self-test":
            entries = json.loads((path / "manifest.json").read_text())["self_test"]
            entries[0]["top"].reverse()
            change_manifest(path, self_test=entries)
        case "gone":
            shutil.rmtree(path)


SPOILT = ("flipped", "truncated", "half-copied", "schema", "self-test", "gone")


@pytest.mark.parametrize("kind", SPOILT)
def test_a_bad_bundle_never_replaces_a_good_one(
    deployer: Deployer, bundles: Path, kind: str
) -> None:
    roster, record = deployer.current, deployer.file.path.read_bytes()
    spoil(kind, bundles / "b")
    for change in (deployer.deploy, deployer.challenge):
        with pytest.raises(InputError):
            change(bundles / "b")
    assert deployer.current is roster
    assert deployer.file.path.read_bytes() == record
    assert items(deployer.current.champion)
    deployer.deploy(bundles / "c")
    assert versions(deployer) == ("c", "a", None)


@pytest.mark.parametrize("kind", SPOILT)
def test_what_cannot_be_followed_leaves_the_old_one(
    deployer: Deployer, bundles: Path, kind: str
) -> None:
    good = Placed.of(Bundle.open(bundles / "b"))
    spoil(kind, bundles / "b")
    deployer.file.change(lambda old: old.deployed(good), "deploy", "elsewhere")
    wait_for(lambda: bool(deployer.report().failures))
    report = deployer.report()
    assert (report.champion, report.generation) == ("a", 1)
    assert str(bundles / "b") in report.failures[-1].message
    assert items(deployer.current.champion)


def test_what_could_not_be_followed_is_tried_again(
    deployer: Deployer, bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "RETRY", (0.1, 0.2))
    good = Placed.of(Bundle.open(bundles / "b"))
    (bundles / "b").rename(bundles / "aside")
    deployer.file.change(lambda old: old.deployed(good), "deploy")
    wait_for(lambda: bool(deployer.failures) and deployer.failures[0].times > 1)
    assert len(deployer.failures) == 1
    (bundles / "aside").rename(bundles / "b")
    wait_for(lambda: versions(deployer)[0] == "b")


def test_content_changed_since_it_was_deployed(
    deployer: Deployer, other: Deployer, bundles: Path
) -> None:
    shutil.rmtree(bundles / "b")
    good = Placed(str(bundles / "b"), "b", "another fingerprint")
    shutil.copytree(bundles / "c", bundles / "b")
    deployer.file.change(lambda old: old.deployed(good), "deploy")
    wait_for(lambda: bool(other.failures))
    assert "but another fingerprint was deployed from there" in other.failures[-1].message
    assert versions(other)[0] == "a"


@pytest.mark.parametrize("body", ["", '{"format": 9}', None])
def test_a_record_that_turns_unreadable(deployer: Deployer, state: Path, body: str | None) -> None:
    if body is None:
        (state / "deployment.json").unlink()
    else:
        (state / "deployment.json").write_text(body)
    wait_for(lambda: bool(deployer.failures))
    assert versions(deployer)[0] == "a"
    assert items(deployer.current.champion)


def test_a_champion_deleted_in_use(deployer: Deployer, bundles: Path) -> None:
    wanted = items(deployer.current.champion)
    shutil.rmtree(bundles / "a")
    deployer.challenge(bundles / "b", "canary", 0.5)  # which needs the champion no second time
    assert items(deployer.current.champion) == wanted
    deployer.deploy(bundles / "c")
    with pytest.raises(InputError, match="not a bundle"):
        deployer.rollback()
    assert versions(deployer) == ("c", "a", None)


def test_a_start_with_a_damaged_champion_takes_the_one_before(
    state: Path, bundles: Path, deployer: Deployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployer.deploy(bundles / "b")
    aside = (bundles / "b").rename(bundles / "aside")
    monkeypatch.setattr(deployment, "RETRY", (0.1, 0.2))
    late = Deployer(state, every=0.02)
    try:
        assert versions(late) == ("a", None, None)
        assert "b: not a bundle" in late.report().failures[0].message
        aside.rename(bundles / "b")
        wait_for(lambda: versions(late)[0] == "b")
    finally:
        late.close()


def test_a_start_with_nothing_to_load(state: Path, bundles: Path) -> None:
    shutil.rmtree(bundles / "a")
    with pytest.raises(InputError, match="not a bundle"):
        Deployer(state)


def test_without_a_previous_one_in_memory(state: Path, bundles: Path) -> None:
    lean = Deployer(state, keep_previous=False, every=0.02)
    try:
        lean.deploy(bundles / "b")
        assert versions(lean) == ("b", None, None)
        lean.rollback()
        assert versions(lean) == ("a", None, None)
    finally:
        lean.close()


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(
    deployer: Deployer, bundles: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployer.challenge(bundles / "c", "canary", 0.5)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"No space left on device\); nothing was changed"):
        deployer.deploy(bundles / "b")
    assert versions(deployer) == ("a", None, "c")
    deployer.return_to_champion(deployer.current.trial, "slow")  # alone, but at once
    assert versions(deployer) == ("a", None, None)
    assert Record(state).read().challenger is not None
    assert sorted(path.name for path in state.iterdir()) == [
        ".deployment.json.lock",
        "deployment.json",
    ]


def test_return_to_the_champion_once_for_all(
    deployer: Deployer, other: Deployer, bundles: Path
) -> None:
    deployer.challenge(bundles / "b", "canary", 0.5)
    trial = deployer.current.trial
    wait_for(lambda: other.current.trial == trial)
    for one in (deployer, other, deployer):
        one.return_to_champion(trial, "errors: 30 of 50")
    assert deployer.record.generation == 3
    assert deployer.record.history[-1].why == "errors: 30 of 50"
    deployer.challenge(bundles / "b", "canary", 0.5)
    other.return_to_champion(trial, "a verdict on the trial before")
    assert versions(deployer) == ("a", None, "b")


def test_swaps_under_load(deployer: Deployer, other: Deployer, bundles: Path) -> None:
    wanted = {name: items(load_verified(bundles / name)) for name in DIMS}
    assert len({tuple(top) for top in wanted.values()}) == 3
    stop = threading.Event()
    met: list[tuple[str, list[str]]] = []

    def ask(of: Deployer) -> None:
        while not stop.is_set():
            roster = of.current
            answer = roster.champion.recommend([ASKED])[0]
            met.append((answer.bundle, [item.item_id for item in answer.items]))

    threads = [threading.Thread(target=ask, args=(of,)) for of in (deployer, deployer, other)]
    for thread in threads:
        thread.start()
    for turn in range(30):
        deployer.deploy(bundles / "bca"[turn % 3])
    wait_for(lambda: other.current.generation == deployer.current.generation)
    stop.set()
    for thread in threads:
        thread.join()
    assert all(top == wanted[version] for version, top in met)
    assert {version for version, _ in met} == set(DIMS)


def test_memory_after_many_swaps(deployer: Deployer, bundles: Path) -> None:
    seen = [weakref.ref(deployer.current.champion)]
    process, sizes = psutil.Process(), {}
    gc.disable()  # an engine must go without the collector's help
    try:
        for turn in range(1, 101):
            deployer.deploy(bundles / "bca"[turn % 3])
            seen.append(weakref.ref(deployer.current.champion))
            sizes[turn] = process.memory_info().rss
    finally:
        gc.enable()
    assert sum(one() is not None for one in seen) == 2  # champion and the one before
    assert sizes[100] < 1.05 * sizes[10]


# An alias, and the command


class Alias:
    """Stands for MLflow: what the alias means, or how it fails."""

    def __init__(self, path: Path) -> None:
        self.error, self.asked = "", 0
        self.means(path)

    def means(self, path: Path) -> None:
        self.placed = Placed.of(Bundle.open(path, verify=False))

    def __call__(self, uri: str) -> Placed:
        self.asked += 1
        if self.error:
            raise InputError(self.error)
        return self.placed


@pytest.fixture
def alias(bundles: Path) -> Alias:
    return Alias(bundles / "b")


@pytest.fixture
def watch(deployer: Deployer, alias: Alias) -> Iterator[promote.AliasWatch]:
    watch = promote.AliasWatch(deployer, "models:/shop@champion", every=3600, ask=alias)
    wait_for(lambda: alias.asked == 1 and versions(deployer)[0] == "b")
    yield watch
    watch.close()


def test_an_alias_is_followed(
    deployer: Deployer, watch: promote.AliasWatch, alias: Alias, bundles: Path
) -> None:
    assert deployer.record.history[-1].by == "models:/shop@champion"
    alias.means(bundles / "c")
    watch.look()
    assert versions(deployer)[0] == "c"


def test_a_rollback_stands_until_the_alias_moves(
    deployer: Deployer, watch: promote.AliasWatch, alias: Alias, bundles: Path
) -> None:
    deployer.rollback()
    watch.look()
    assert versions(deployer)[0] == "a"
    alias.means(bundles / "c")
    watch.look()
    assert versions(deployer)[0] == "c"


def test_a_registry_that_fails(
    deployer: Deployer, watch: promote.AliasWatch, alias: Alias, bundles: Path
) -> None:
    alias.error = "the registry is away"
    alias.means(bundles / "c")
    watch.look()
    assert (versions(deployer)[0], watch.error) == ("b", "the registry is away")
    alias.error = ""
    watch.look()
    assert (versions(deployer)[0], watch.error) == ("c", None)


def test_an_alias_of_a_bad_bundle(
    deployer: Deployer, watch: promote.AliasWatch, alias: Alias, bundles: Path
) -> None:
    loads: list[object] = []
    load = deployer.load
    deployer.load = lambda path: loads.append(path) or load(path)  # type: ignore[func-returns-value]
    alias.means(bundles / "c")
    spoil("truncated", bundles / "c")
    for _ in range(promote.AGAIN):
        watch.look()
    assert (versions(deployer)[0], len(loads)) == ("b", 1)
    watch.look()
    assert len(loads) == 2


def test_one_process_asks_for_all(
    deployer: Deployer, other: Deployer, watch: promote.AliasWatch, bundles: Path
) -> None:
    idle = Alias(bundles / "c")
    second = promote.AliasWatch(other, "models:/shop@champion", every=0.02, ask=idle)
    try:
        time.sleep(0.2)
        assert idle.asked == 0
        watch.close()
        wait_for(lambda: idle.asked > 0)  # it takes over
    finally:
        second.close()


def answering(line: str) -> Callable[..., promote.Asker]:
    """An asker whose process answers each line with `line`."""

    def ask(**settings: Any) -> promote.Asker:
        code = f"import sys\nfor _ in sys.stdin:\n  {line}"
        asker = promote.Asker(**settings)
        pipe = subprocess.PIPE
        asker.process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
        return asker

    return ask


def test_what_the_registrys_process_says() -> None:
    good = 'print(\'{"path": "/x", "version": "x", "fingerprint": "f"}\', flush=True)'
    asker = answering(good)()
    assert [asker("m"), asker("m")] == [Placed("/x", "x", "f")] * 2
    asker.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('print(\'{"error": "no such model"}\', flush=True)', "no such model"),
        ("sys.exit()", "did not answer"),
        ("print('{', flush=True)", "did not answer"),
        ("import time; time.sleep(60)", r"nothing in 0\.3 s"),
    ],
)
def test_how_the_registrys_process_fails(line: str, message: str) -> None:
    asker = answering(line)(patience=0.3 if "sleep" in line else 10)
    with pytest.raises(InputError, match=message):
        asker("models:/shop@champion")
    asker.close()


def test_a_bundle_by_its_run(workspace: Any) -> None:
    folder = workspace.folder("bundle")
    for age, name in enumerate(("new", "old")):
        write_tiny_bundle(folder / name)
        change_manifest(folder / name, run="my-run")
        os.utime(folder / name / "manifest.json", (1e9 - age, 1e9 - age))
    assert promote.find_bundle("my-run", workspace) == folder / "new"
    assert promote.find_bundle("old", workspace) == folder / "old"
    assert promote.find_bundle(str(folder / "old"), workspace) == folder / "old"
    with pytest.raises(InputError, match="no bundle named 'what'"):
        promote.find_bundle("what", workspace)


class Stub(BaseHTTPRequestHandler):
    """A server that notes what it was sent, and answers by the bundle's name."""

    seen: list[tuple[str, str | None, dict[str, str]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, self.headers["authorization"], body))  # type: ignore[attr-defined]
        bundle = body["bundle"]
        status = {"bad": 422, "moved": 302, "key": 403}.get(bundle, 200)
        self.send_response(status)
        self.send_header("location", "/elsewhere")
        self.end_headers()
        error = {"error": {"code": "x", "message": f"no {bundle}"}}
        self.wfile.write(json.dumps({"champion": bundle} if status == 200 else error).encode())

    def do_GET(self) -> None:
        self.server.seen.append(("redirected", self.headers["authorization"], {}))  # type: ignore[attr-defined]
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Any]:
    server = HTTPServer(("127.0.0.1", 0), Stub)
    server.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_promote_at_a_server(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_API_KEY", "secret")
    url = f"http://127.0.0.1:{stub.server_port}/"
    assert promote.promote("good", url, why="newer") == {"champion": "good"}
    assert stub.seen == [("/admin/bundles", "Bearer secret", {"bundle": "good", "why": "newer"})]


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        ("bad", "422: no bad"),
        ("key", "403: no key; set RECSYS_API_KEY to a key with the scope admin"),
        ("moved", "302: "),
    ],
)
def test_promotions_that_are_refused(stub: Any, bundle: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        promote.promote(bundle, f"http://127.0.0.1:{stub.server_port}")
    assert len(stub.seen) == 1  # and nothing sent to where a redirect leads


def test_promote_where_nobody_listens() -> None:
    with pytest.raises(InputError, match=r"no answer .*; is `recsys serve` running\?"):
        promote.promote("good", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="expected http://HOST:PORT"):
        promote.promote("good", "file:///etc")
