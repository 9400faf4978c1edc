"""The log: each answer and each event is in one Parquet file, once, whatever crashed before."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest

from recsys.serving import log as serving_log
from recsys.serving import parts
from recsys.serving.log import AnswerJournal, JournalReader, LoggedAnswer, Shipper, erase
from recsys.serving.state import (
    LoggedEvent,
    StateUnavailable,
    Token,
    UserState,
    open_state,
    user_hash,
)

T = 1_700_000_000_000


class MemoryState:
    """An outbox and tombstones in memory, which can be made to fail when told of a shipment."""

    def __init__(self) -> None:
        self.waiting: dict[int, LoggedEvent] = {}
        self.tombstones: dict[bytes, int] = {}
        self.number = 0
        self.failing = False

    def append(self, events: Iterable[LoggedEvent]) -> None:
        for event in events:
            self.number += 1
            self.waiting[self.number] = event

    def outbox(self, limit: int) -> tuple[Token, list[LoggedEvent]]:
        numbers = sorted(self.waiting)[:limit]
        if not numbers:
            return Token(1, 0), []
        return Token(numbers[0], numbers[-1]), [self.waiting[n] for n in numbers]

    def shipped(self, token: Token) -> None:
        if self.failing:
            raise StateUnavailable("gone")
        for number in range(token.first, token.last + 1):
            self.waiting.pop(number, None)

    def erase(self, user_id: str, now: int) -> None:
        self.tombstones[user_hash(user_id)] = now
        self.waiting = {n: e for n, e in self.waiting.items() if e.user_id != user_id}

    def erased(self) -> Iterator[tuple[bytes, int]]:
        return iter(list(self.tombstones.items()))


class ListSink:
    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, Any]]] = []
        self.refuses = False

    def send(self, kind: str, records: Iterable[Mapping[str, Any]]) -> None:
        if self.refuses:
            raise RuntimeError("broker away")
        self.got += [(kind, dict(record)) for record in records]


def answer(number: int, user: str | None = "u1", **other: Any) -> LoggedAnswer:
    said = {"arm": "champion", "source": "model", "k": 2, "items": ["a", "b"], "scores": [2.5, 1.0]}
    return LoggedAnswer(f"a{number}", user, T + number, "shop-1", **{**said, **other})


def event(number: int, user: str = "u1", **other: Any) -> LoggedEvent:
    return LoggedEvent(f"e{number}", user, f"i{number}", "view", T + number, T + number, **other)


def shipper(log_dir: Path, state: MemoryState | None = None, **settings: Any) -> Shipper:
    return Shipper(log_dir, state, **settings)  # type: ignore[arg-type]


def rows(log_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return every row of a log, in the order of the files."""
    return [row for f in parts.files(log_dir / kind) for row in pq.read_table(f).to_pylist()]


def ids(log_dir: Path, kind: str) -> list[str]:
    return [row["event_id" if kind == "events" else "answer_id"] for row in rows(log_dir, kind)]


def journal(log_dir: Path, answers: Sequence[LoggedAnswer]) -> Path:
    """Write one closed journal."""
    before = set((log_dir / "journal").glob("*"))
    one = AnswerJournal(log_dir)
    for each in answers:
        one.record(each)
    one.close()
    (made,) = set((log_dir / "journal").glob("*")) - before
    return made


def test_answers_come_back_as_they_were_given(tmp_path: Path) -> None:
    given = [
        answer(1),
        answer(2, None, source="popular", items=[], scores=[], fallback="deadline"),
        answer(3, "Ärger\u2028🛒", arm="challenger"),
    ]
    journal(tmp_path, given)
    work = shipper(tmp_path)
    assert work.convert() == work.converted == 3
    assert rows(tmp_path, "answers") == [msgspec.structs.asdict(one) for one in given]
    assert list((tmp_path / "journal").iterdir()) == []
    assert work.convert() == 0


def test_events_come_back_as_they_were_accepted(tmp_path: Path) -> None:
    state = MemoryState()
    given = [event(1), event(2, "u2", value=9.75, answer_id="a7"), event(3)]
    state.append(given)
    assert shipper(tmp_path, state).ship() == 3
    read = rows(tmp_path, "events")
    for row in read:
        row["timestamp"] = round(row["timestamp"].timestamp() * 1000)
    assert read == [msgspec.structs.asdict(one) for one in given]
    assert state.waiting == {}


def test_a_large_outbox_becomes_files_of_so_many_rows(tmp_path: Path) -> None:
    state = MemoryState()
    state.append(event(n) for n in range(25))
    assert shipper(tmp_path, state, rotate_rows=10).ship() == 25
    sizes = [pq.read_metadata(file).num_rows for file in parts.files(tmp_path / "events")]
    assert sizes == [10, 10, 5]
    assert ids(tmp_path, "events") == [f"e{n}" for n in range(25)]


def test_file_names_number_the_rows_also_when_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, work = MemoryState(), None
    for clock in (5_000_000, 1_000_000, 1_000_000):
        monkeypatch.setattr(serving_log.time, "time_ns", lambda clock=clock: clock)
        state.append([event(state.number), event(state.number + 1)])
        work = shipper(tmp_path, state)
        work.ship()
    names = [file.stem.split("-")[1:] for file in parts.files(tmp_path / "events")]
    assert [[int(n) for n in name] for name in names] == [[5000, 5001], [5002, 5003], [5004, 5005]]


def test_an_open_journal_is_left_alone(tmp_path: Path) -> None:
    one, work = AnswerJournal(tmp_path), shipper(tmp_path)
    one.record(answer(1))
    one.flush()
    assert work.convert() == 0
    one.close()
    assert work.convert() == 1
    one.record(answer(2))
    assert (one.recorded, one.dropped) == (1, 1)


@pytest.mark.parametrize("bound", [{"rotate_seconds": 0.01}, {"rotate_mib": 0.00001}])
def test_a_journal_is_closed_by_age_or_size(tmp_path: Path, bound: dict[str, float]) -> None:
    one, work = AnswerJournal(tmp_path, **bound), shipper(tmp_path)
    for number in range(3):
        one.record(answer(number))
        one.flush()
        time.sleep(0.02)
        one.flush()
    assert work.convert() == 3
    one.close()
    assert ids(tmp_path, "answers") == ["a0", "a1", "a2"]


RECORDER = """
import sys, itertools, time
from pathlib import Path
from recsys.serving.log import AnswerJournal, LoggedAnswer
journal = AnswerJournal(Path(sys.argv[1]), rotate_mib=0.05)
for n in itertools.count():
    journal.record(LoggedAnswer(f"a{n}", "u", n, "b", "champion", "model", 1, ["x"], [1.0]))
    if n % 500 == 499:
        journal.flush()
        print(n + 1, flush=True)
        time.sleep(0.005)
"""


def test_kill_9_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RECORDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    flushed = [int(process.stdout.readline()) for _ in range(8)]
    process.send_signal(signal.SIGKILL)
    flushed += [int(line) for line in process.stdout]
    process.wait()
    work = shipper(tmp_path)
    assert work.round()
    assert work.round()
    got = sorted(int(one[1:]) for one in ids(tmp_path, "answers"))
    assert got == list(range(len(got)))
    assert len(got) >= flushed[-1] >= 4000
    assert list((tmp_path / "journal").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "left", "torn"),
    [
        (lambda data: data[:-3], 2, 1),
        (lambda data: data + b"\x09", 3, 1),
        (lambda data: data + bytes(64), 3, 1),
        (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], 2, 1),
        (lambda data: data[:5], 0, 0),
        (lambda data: b"", 0, 0),
    ],
)
def test_a_torn_end_is_dropped_and_counted(
    tmp_path: Path, damage: Callable[[bytes], bytes], left: int, torn: int
) -> None:
    path = journal(tmp_path, [answer(1), answer(2), answer(3)])
    path.write_bytes(damage(path.read_bytes()))
    work = shipper(tmp_path)
    assert work.round()
    assert ids(tmp_path, "answers") == ["a1", "a2", "a3"][:left]
    assert work.torn == torn
    assert list((tmp_path / "journal").iterdir()) == []


def test_a_journal_of_another_version_is_set_aside(tmp_path: Path) -> None:
    path = journal(tmp_path, [answer(1)])
    path.write_bytes(b"recsysJ9" + path.read_bytes()[8:])
    journal(tmp_path, [answer(2)])
    assert shipper(tmp_path).round()
    assert ids(tmp_path, "answers") == ["a2"]
    assert [one.suffix for one in (tmp_path / "journal").iterdir()] == [".unreadable"]


class Crash(BaseException):
    """The process ends here."""


def crashing_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the `step`-th change of the file system, and all after it, not happen."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise Crash
            return real(*given, **named)

        return change

    for name in ("replace", "unlink", "rename", "write_text"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(parts, "synced", counted(parts.synced))
    monkeypatch.setattr(MemoryState, "shipped", counted(MemoryState.shipped))


def journals_and_an_outbox(log_dir: Path, state: MemoryState) -> tuple[list[str], list[str]]:
    for start in range(0, 4, 2):
        journal(log_dir, [answer(start), answer(start + 1)])
    state.append(event(n) for n in range(25))
    return [f"e{n}" for n in range(25)], [f"a{n}" for n in range(4)]


def many_files(log_dir: Path, state: MemoryState, files: int = 7) -> tuple[list[str], list[str]]:
    for start in range(0, 3 * files, 3):
        state.append(event(n, f"u{n % 2}") for n in range(start, start + 3))
        shipper(log_dir, state).ship()
        journal(log_dir, [answer(n, f"u{n % 2}") for n in range(start, start + 3)])
        shipper(log_dir, state).convert()
    return [f"e{n}" for n in range(3 * files)], [f"a{n}" for n in range(3 * files)]


def an_erasure(log_dir: Path, state: MemoryState) -> tuple[list[str], list[str]]:
    many_files(log_dir, state, 3)
    state.erase("u1", T + 1000)
    return [f"e{n}" for n in range(0, 9, 2)], [f"a{n}" for n in range(0, 9, 2)]


@pytest.mark.parametrize("scene", [journals_and_an_outbox, many_files, an_erasure])
def test_a_crash_at_any_step_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: Callable[..., tuple[list, list]]
) -> None:
    monkeypatch.setattr(parts, "TOGETHER", 3)
    monkeypatch.setattr(parts, "synced", lambda path: None)
    begun, before = MemoryState(), tmp_path / "before"
    events, answers = scene(before, begun)
    ended, step = False, 0
    while not ended:
        log_dir, state = tmp_path / str(step), copy.deepcopy(begun)
        shutil.copytree(before, log_dir)
        with monkeypatch.context() as patch, suppress(Crash):
            crashing_at(patch, step)
            ended = shipper(log_dir, state, rotate_rows=10).round()
        state.append([event(999, "late")])
        assert shipper(log_dir, state).round()
        assert sorted(ids(log_dir, "events")) == sorted([*events, "e999"])
        assert sorted(ids(log_dir, "answers")) == sorted(answers)
        left = {f.name for f in log_dir.rglob("*") if f.suffix not in (".parquet", ".lock")}
        assert left <= {"events", "answers", "journal", "erased.json"}
        step += 1
    assert step > 15


def test_merging_keeps_every_row_in_few_files(tmp_path: Path) -> None:
    state = MemoryState()
    events, answers = many_files(tmp_path, state, 40)
    assert len(parts.files(tmp_path / "events")) == len(parts.files(tmp_path / "answers")) == 40
    assert shipper(tmp_path, state).round()
    for kind, expected in (("events", events), ("answers", answers)):
        there = parts.files(tmp_path / kind)
        # 40 → 25 → 10: two of the merges take sixteen files each.
        assert len(there) == 10
        assert sorted(ids(tmp_path, kind)) == sorted(expected)
    numbers = [file.stem.split("-")[1:] for file in parts.files(tmp_path / "events")]
    assert len({tuple(n) for n in numbers}) == 10


def test_the_newest_events_are_found_in_a_merged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "TOGETHER", 3)
    monkeypatch.setattr(parts, "GROUP", 2)
    # A name that spans the others' is what an earlier merge of files apart leaves behind.
    spans = {(11, 12): (2, 3), (13, 14): (4, 5), (1, 90): (0, 1, 8, 9)}
    for (first, last), numbers in spans.items():
        name = f"events-{first:016d}-{last:016d}.parquet"
        before = MemoryState()
        before.append(event(n) for n in numbers)
        with monkeypatch.context() as patch:
            patch.setattr(serving_log, "_name", lambda *_, name=name: name)
            shipper(tmp_path, before).ship()
    assert shipper(tmp_path).round()
    (merged,) = parts.files(tmp_path / "events")
    assert merged.name == name
    state = MemoryState()
    state.append([event(8), event(9), event(10)])
    assert shipper(tmp_path, state, rotate_rows=3).round()
    expected = ["e0", "e1", "e10", "e2", "e3", "e4", "e5", "e8", "e9"]
    assert sorted(ids(tmp_path, "events")) == expected


def test_large_files_are_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = MemoryState()
    many_files(tmp_path, state, 20)
    monkeypatch.setattr(parts, "SIZES", (100,))
    assert shipper(tmp_path, state).round()
    assert len(parts.files(tmp_path / "events")) == 20


@pytest.mark.parametrize("restart", [False, True])
def test_what_the_outbox_was_not_told_of_is_not_written_twice(
    tmp_path: Path, restart: bool
) -> None:
    state, work = MemoryState(), None
    state.append(event(n) for n in range(5))
    work = shipper(tmp_path, state)
    state.failing = True
    assert not work.round()
    assert (work.failures, len(state.waiting)) == (1, 5)
    state.failing = False
    # Another user may use the same event_id.
    state.append([event(5), event(0, "u2")])
    work = shipper(tmp_path, state) if restart else work
    assert work.round()
    assert ids(tmp_path, "events") == ["e0", "e1", "e2", "e3", "e4", "e5", "e0"]
    assert state.waiting == {}


def test_only_one_shipper_works_and_another_takes_over(tmp_path: Path) -> None:
    state = MemoryState()
    first, second = (shipper(tmp_path, state, rotate_seconds=0.01) for _ in range(2))
    first.start()
    until(lambda: (tmp_path / "events").is_dir())
    second.start()
    state.append(event(n) for n in range(5))
    until(lambda: first.shipped == 5)
    assert second.shipped == 0
    first.stop()
    state.append([event(5)])
    until(lambda: second.shipped == 1)
    state.append([event(6)])
    second.stop()
    assert sorted(ids(tmp_path, "events")) == [f"e{n}" for n in range(7)]


def test_stopping_brings_out_what_is_there(tmp_path: Path) -> None:
    state = MemoryState()
    work = shipper(tmp_path, state, rotate_seconds=3600)
    work.start()
    until(lambda: (tmp_path / "shipper.lock").exists())
    state.append([event(1)])
    journal(tmp_path, [answer(1)])
    work.stop()
    assert (ids(tmp_path, "events"), ids(tmp_path, "answers")) == (["e1"], ["a1"])


def test_one_that_stops_waits_for_another_that_is_about_to(tmp_path: Path) -> None:
    work = shipper(tmp_path)
    journal(tmp_path, [answer(1)])
    with parts.locked(tmp_path / "shipper.lock"):
        work.start()
        stopping = threading.Thread(target=work.stop)
        stopping.start()
        stopping.join(0.3)
        assert stopping.is_alive()
        assert ids(tmp_path, "answers") == []
    stopping.join()
    assert ids(tmp_path, "answers") == ["a1"]


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A disk with `room` bytes, then ENOSPC: as a real one, it may take part of a write."""
    disk, real = {"room": 0}, os.write

    def write(handle: int, data: Any) -> int:
        if disk["room"] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(handle, data[: disk["room"]])
        disk["room"] -= done
        return done

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(serving_log, "RETRY_SECONDS", 0.0)
    return disk


def test_a_full_disk_holds_answers_back_and_loses_none(
    tmp_path: Path, full_disk: dict[str, int]
) -> None:
    one = AnswerJournal(tmp_path)
    # The third write has room for part of it only: nothing of it may stay before what follows.
    for number, room in enumerate((1000, 1000, 20, 0, 1000)):
        full_disk["room"] = room
        one.record(answer(number))
        one.flush()
    full_disk["room"] = 10_000
    one.close()
    assert (one.recorded, one.dropped) == (5, 0)
    work = shipper(tmp_path)
    assert work.round()
    assert ids(tmp_path, "answers") == [f"a{n}" for n in range(5)]
    assert work.torn == 0


def test_memory_is_bounded_while_the_disk_is_full(
    tmp_path: Path, full_disk: dict[str, int]
) -> None:
    one = AnswerJournal(tmp_path, memory_mib=0.001)
    for number in range(1000):
        one.record(answer(number))
    assert one.recorded + one.dropped == 1000
    assert 10 < one.recorded < 50
    full_disk["room"] = 100_000
    one.flush()
    one.record(answer(1000))
    one.close()
    assert shipper(tmp_path).round()
    assert ids(tmp_path, "answers") == [*(f"a{n}" for n in range(one.recorded - 1)), "a1000"]


def test_a_full_disk_leaves_the_outbox_and_journals_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, work = MemoryState(), None
    state.append([event(1)])
    journal(tmp_path, [answer(1)])

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    work = shipper(tmp_path, state)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "synced", full)
        assert not work.round()
    assert work.failures == 2
    assert list(tmp_path.rglob("*.tmp")) == []
    assert work.round()
    assert (ids(tmp_path, "events"), ids(tmp_path, "answers")) == (["e1"], ["a1"])


def test_an_answer_that_cannot_be_written_is_dropped_not_raised(tmp_path: Path) -> None:
    one = AnswerJournal(tmp_path)
    one.record(answer(1, "\ud800"))
    one.record(answer(2))
    one.close()
    assert (one.recorded, one.dropped) == (1, 1)
    assert shipper(tmp_path).convert() == 1


def holds(log_dir: Path, user: str) -> bool:
    """Say whether a user's id is in any file's bytes or, unpacked, in any file's rows."""
    raw = any(user.encode() in f.read_bytes() for f in log_dir.rglob("*") if f.is_file())
    read = any(row["user_id"] == user for kind in parts.KINDS for row in rows(log_dir, kind))
    return raw or read


def test_erasure_leaves_no_trace(tmp_path: Path) -> None:
    state, work = MemoryState(), None
    people = ["ann-secret", "bob", "zoe"]
    for turn in range(3):
        state.append(event(10 * turn + n, user) for n, user in enumerate(people))
        journal(tmp_path, [answer(10 * turn + n, user) for n, user in enumerate([*people, None])])
        work = shipper(tmp_path, state)
        assert work.round()
    state.append([event(90, "ann-secret"), event(91, "only-ann")])
    assert holds(tmp_path, "ann-secret")
    late = journal(tmp_path, [answer(50, "ann-secret"), answer(200, "ann-secret"), answer(51)])
    state.erase("ann-secret", T + 100)
    assert erase(tmp_path, "ann-secret") == 6
    assert holds(tmp_path, "ann-secret")  # in the journal still
    assert erase(tmp_path, "ann-secret") == 0
    journal_rows = [row for some in JournalReader(late).slices() for row in some]
    assert [row[0] for row in journal_rows] == ["a50", "a200", "a51"]
    assert work
    assert work.round()
    # Who comes back after the erasure is a user like any other.
    assert [r["answer_id"] for r in rows(tmp_path, "answers") if r["user_id"] == "ann-secret"] == [
        "a200"
    ]
    assert erase(tmp_path, "ann-secret") == 1
    assert not holds(tmp_path, "ann-secret")
    assert len(ids(tmp_path, "events")) == 7
    assert len(ids(tmp_path, "answers")) == 10


def test_an_erasure_elsewhere_reaches_this_log_too(tmp_path: Path) -> None:
    state = MemoryState()
    state.append([event(n, f"u{n % 2}") for n in range(6)])
    journal(tmp_path, [answer(n, f"u{n % 2}") for n in range(6)])
    work = shipper(tmp_path, state)
    assert work.round()
    state.erase("u1", T + 3)
    assert work.round()
    # An event of the moment itself came after the erasure; an answer may have been before.
    assert ids(tmp_path, "events") == ["e0", "e2", "e3", "e4", "e5"]
    assert ids(tmp_path, "answers") == ["a0", "a2", "a4", "a5"]
    assert work.forget() == 0


def test_a_user_alone_in_a_file_takes_the_file_along(tmp_path: Path) -> None:
    state = MemoryState()
    state.append([event(1, "only")])
    shipper(tmp_path, state).ship()
    assert erase(tmp_path, "only") == 1
    assert parts.files(tmp_path / "events") == []
    assert erase(tmp_path / "new", "nobody") == 0


def test_a_sink_has_everything_before_the_log_lets_go(tmp_path: Path) -> None:
    state, sink = MemoryState(), ListSink()
    work = shipper(tmp_path, state, sink=sink)
    state.append([event(1), event(2)])
    journal(tmp_path, [answer(1)])
    sink.refuses = True
    assert not work.round()
    assert (len(state.waiting), len(list((tmp_path / "journal").iterdir()))) == (2, 1)
    sink.refuses = False
    state.append([event(3)])
    assert work.round()
    assert sink.got == [
        ("answers", msgspec.structs.asdict(answer(1))),
        *(("events", msgspec.structs.asdict(event(n))) for n in (1, 2, 3)),
    ]


def test_what_a_sink_has_is_not_sent_again_because_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, sink = MemoryState(), ListSink()
    work = shipper(tmp_path, state, sink=sink)
    state.append([event(1)])
    state.failing = True
    assert not work.round()
    state.failing = False
    state.append([event(2)])
    assert work.round()
    assert [record["event_id"] for _, record in sink.got] == ["e1", "e2"]


def test_an_erasure_while_a_sink_is_busy_holds(tmp_path: Path) -> None:
    state = MemoryState()

    class Slow(ListSink):
        def send(self, kind: str, records: Iterable[Mapping[str, Any]]) -> None:
            super().send(kind, records)
            state.erase("u1", T + 100)
            erase(tmp_path, "u1")

    state.append([event(1), event(2, "u2")])
    journal(tmp_path, [answer(1), answer(2, "u2")])
    work = shipper(tmp_path, state, sink=Slow())
    assert (work.ship(), work.convert()) == (1, 1)
    assert (ids(tmp_path, "events"), ids(tmp_path, "answers")) == (["e2"], ["a2"])


def test_a_journal_whose_file_is_finished_is_not_sent_again(tmp_path: Path) -> None:
    path, sink = journal(tmp_path, [answer(1)]), ListSink()
    kept = path.read_bytes()
    assert shipper(tmp_path).round()
    path.write_bytes(kept)  # as a crash before its deletion leaves it
    assert shipper(tmp_path, sink=sink).round()
    assert (sink.got, ids(tmp_path, "answers"), path.exists()) == ([], ["a1"], False)


def test_the_embedded_store_and_the_log_together(tmp_path: Path) -> None:
    def opened() -> UserState:
        return open_state(f"lmdb:{tmp_path / 'state'}", max_events=50, keep_ms=0, sync=False)

    state = opened()
    state.append([event(n, f"u{n % 3}") for n in range(30)])
    work = Shipper(tmp_path / "log", state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(state), "shipped", lambda *_: (_ for _ in ()).throw(OSError("crash")))
        assert not work.round()
    state.close()
    state = opened()
    state.append([event(30)])
    state.erase("u2", T + 1000)
    assert erase(tmp_path / "log", "u2") == 10
    assert Shipper(tmp_path / "log", state).round()
    assert ids(tmp_path / "log", "events") == [*(f"e{n}" for n in range(30) if n % 3 < 2), "e30"]
    assert state.outbox(10)[1] == []
    state.close()


def test_hashes_are_those_of_the_user_state() -> None:
    moment = {hashlib.blake2b(b"u1", digest_size=16).digest(): 7}
    assert parts.end_of("events", "u1", moment) == 7
    assert parts.end_of("events", "u2", moment) == 0
    assert parts.end_of("answers", None, moment) == 0
