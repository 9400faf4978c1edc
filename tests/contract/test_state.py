"""One contract for both stores of user state: what was taken is kept, once, and in order."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator

import lmdb
import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from recsys.schema import InputError
from recsys.serving import state as state_module
from recsys.serving.item_log import ItemChange
from recsys.serving.state import (
    NOTHING,
    LoggedEvent,
    StateUnavailable,
    Token,
    UserPath,
    UserState,
    open_state,
    user_hash,
)
from recsys.serving.state_lmdb import LmdbState
from recsys.serving.state_redis import RedisState
from redis_server import RedisServer, free_port

SLOW = 5_000
"""Milliseconds to wait for Redis: on a busy machine a test is slow, not wrong."""


def event(event_id: str, moment: int, user: str = "u", **other) -> LoggedEvent:
    """A view of item `i<event_id>` unless `other` says otherwise."""
    other = {"item_id": f"i{event_id}", "event_type": "view", "received": moment + 7} | other
    return LoggedEvent(event_id=event_id, user_id=user, timestamp=moment, **other)


def ids(state: UserState, user: str = "u") -> list[str]:
    return [kept.event_id for kept in state.kept(user)]


def drained(state: UserState, limit: int = 1_000) -> list[str]:
    """Ship everything; return the event ids in the order they were handed out."""
    found: list[str] = []
    while True:
        token, events = state.outbox(limit)
        if not events:
            return found
        found += [one.event_id for one in events]
        state.shipped(token)


class Place:
    """Where a store is; opens handles on it, and closes them in the end."""

    def __init__(self, address: str) -> None:
        self.address, self.handles = address, []

    def open(self, max_events: int = 5, keep_ms: int = 0, sync: bool = False) -> UserState:
        handle = open_state(self.address, max_events=max_events, keep_ms=keep_ms, sync=sync)
        self.handles.append(handle)
        return handle

    def close(self) -> None:
        while self.handles:
            self.handles.pop().close()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["lmdb", "redis"])
def place(request, tmp_path) -> Iterator[Place]:
    address = f"lmdb:{tmp_path / 'state'}"
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")
        address = f"{server.url}?prefix={tmp_path.name}&claim_ms=50&timeout_ms={SLOW}"
    opened = Place(address)
    yield opened
    opened.close()


@pytest.fixture
def state(place) -> UserState:
    return place.open()


# A path and its order


def test_newcomer_has_an_empty_path(state):
    assert state.path("nobody") == UserPath([], [], [], [], 0)
    assert state.kept("nobody") == []


def test_path_is_by_time_and_ties_by_arrival(state):
    assert state.append([event("b", 20), event("d", 30)]) == ["accepted"] * 2
    assert state.append([event("a", 10), event("c", 20)]) == ["accepted"] * 2
    assert ids(state) == ["a", "b", "c", "d"]
    assert state.path("u") == UserPath(
        ["ia", "ib", "ic", "id"], [1] * 4, [10, 20, 20, 30], [None] * 4, 0
    )


def test_an_event_is_kept_whole(state):
    full = event("a", 10, event_type="purchase", value=2.5, answer_id="x", item_id="shoe")
    state.append([full, event("b", 11, event_type="cart")])
    assert state.kept("u") == [full, event("b", 11, event_type="cart")]
    assert state.path("u").types == [4, 3]
    assert state.path("u").values == [2.5, None]


def test_path_keeps_the_newest(state):
    state.append([event(str(n), n) for n in range(8)])
    assert ids(state) == ["3", "4", "5", "6", "7"]


def test_users_are_apart(state):
    odd = ["u", "u:", "u1", "U", "", "\0", "ü", "u\u0308", "😀" * 250, "x" * 1_000, "x" * 999, "*"]
    state.append([event(f"e{n}", n, user, item_id=user) for n, user in enumerate(odd)])
    for number, user in enumerate(odd):
        assert state.path(user) == UserPath([user], [1], [number], [None], 0)
        assert state.kept(user)[0].user_id == user


def test_bound_changed_later(place):
    place.open(max_events=4).append([event(str(n), n) for n in range(4)])
    place.close()
    smaller = place.open(max_events=2)
    assert smaller.path("u").items == ["i2", "i3"]
    assert smaller.append([event("x", 1), event("y", 2)]) == ["late", "accepted"]
    assert ids(smaller) == ["y", "3"]
    place.close()
    larger = place.open(max_events=4)
    # "2" was pushed out: it must not come in a second time, though there is room now.
    assert larger.append([event("2", 2), event("z", 3)]) == ["late", "accepted"]
    assert ids(larger) == ["y", "3", "z"]


# What becomes of an event


def test_repeated_and_conflicting(state):
    first = event("a", 10, value=1.0)
    assert state.append([first, first]) == ["accepted", "repeated"]
    assert state.append([event("a", 10, value=1.0, received=99)]) == ["repeated"]
    others = [
        event("a", 11, value=1.0),
        event("a", 10, value=2.0),
        event("a", 10),
        event("a", 10, value=1.0, item_id="other"),
        event("a", 10, value=1.0, event_type="cart"),
    ]
    assert state.append(others) == ["conflict"] * 5
    assert state.append([event("a", 10, "other user")]) == ["accepted"]
    assert state.kept("u") == [first]
    assert drained(state) == ["a", "a"]


def test_late_events_are_not_kept(state):
    state.append([event(str(n), n * 10) for n in range(1, 6)])
    assert state.append([event("before", 9), event("tie", 10)]) == ["late", "accepted"]
    # "1" was pushed out at 10: whatever is not newer than that could be a retry of it.
    assert state.append([event("1", 10), event("new", 10)]) == ["late", "late"]
    assert state.append([event("between", 11)]) == ["accepted"]
    assert ids(state) == ["between", "2", "3", "4", "5"]
    assert drained(state) == ["1", "2", "3", "4", "5", "tie", "between"]


def test_one_bad_event_and_none_is_taken(state):
    with pytest.raises(InputError, match="'veiw'; expected one of view"):
        state.append([event("a", 1), event("b", 2, event_type="veiw")])
    with pytest.raises(UnicodeEncodeError):
        state.append([event("a", 1), event("b", 2, item_id="\ud800")])
    assert ids(state) == []
    assert state.backlog() == 0


def test_nothing_to_append(state):
    assert state.append([]) == []


def test_ten_thousand_at_once(place):
    state = place.open(max_events=200)
    batch = [event(str(n), n, f"u{n % 100}" if n % 2 else "one") for n in range(10_000)]
    assert Counter(state.append(batch)) == {"accepted": 10_000}
    assert state.path("one").times == list(range(9_600, 10_000, 2))
    assert state.path("u7").times == list(range(7, 10_000, 100))
    assert drained(state, 3_000) == [str(n) for n in range(10_000)]


# Erasure and expiry


def test_erased_stays_erased(state):
    state.append([event("a", 10), event("b", 20), event("z", 20, "other")])
    assert state.erase("u", 25) == 2
    assert state.path("u") == UserPath([], [], [], [], 25)
    assert state.kept("u") == []
    assert state.append([event("a", 10), event("b", 20), event("c", 24)]) == ["late"] * 3
    assert state.append([event("d", 25)]) == ["accepted"]
    assert state.path("u") == UserPath(["id"], [1], [25], [None], 25)
    assert drained(state) == ["z", "d"]
    assert dict(state.erased()) == {user_hash("u"): 25}


def test_erasure_covers_what_lies_ahead_of_the_clock(state):
    state.append([event("a", 10), event("ahead", 40)])
    assert state.erase("u", 30) == 2
    assert state.append([event("ahead", 40), event("b", 41)]) == ["late", "accepted"]
    assert state.path("u").erased_before == 41


def test_erased_again_and_never_earlier(state):
    assert state.erase("u", 30) == 0
    assert state.erase("u", 20) == 0  # a clock set back
    assert state.append([event("a", 29), event("b", 30)]) == ["late", "accepted"]
    assert state.erase("u", 50) == 1
    assert dict(state.erased()) == {user_hash("u"): 50}


def test_erasure_counts_what_only_the_outbox_holds(state):
    others = [event(f"other {n}", n, f"v{n % 300}") for n in range(1_200)]
    state.append([event(str(n), n) for n in range(6)] + others + [event("last", 9)])
    assert len(ids(state)) == 5
    assert state.erase("u", 100) == 7
    assert drained(state) == [one.event_id for one in others]


def test_many_tombstones(state):
    for number in range(30):
        state.erase(f"u{number}", 100 + number)
    assert dict(state.erased()) == {user_hash(f"u{n}"): 100 + n for n in range(30)}


def test_expire(state):
    state.append([event(f"{user}{n}", n * 10, user) for user in "uv" for n in range(1, 4)])
    state.append([event("w", 10, "w")])
    state.erase("gone", 5)
    assert state.expire(25) == 5
    assert ids(state, "u") == ["u3"]
    assert ids(state, "v") == ["v3"]
    assert ids(state, "w") == []
    assert state.append([event("u1", 10)]) == ["late"]
    assert state.expire(25) == 0
    assert dict(state.erased()) == {user_hash("gone"): 5}
    assert state.backlog() == 7


def test_expire_of_many_users(state):
    state.append([event(f"e{n}", n, f"u{n}") for n in range(1_500)])
    assert state.expire(1_000) == 1_000
    assert ids(state, "u999") == []
    assert ids(state, "u1000") == ["e1000"]


def test_expiry_keeps_the_tombstone(state):
    state.erase("u", 50)
    state.append([event("a", 60)])
    assert state.expire(70) == 1
    assert state.path("u").erased_before == 50
    assert state.append([event("old", 40)]) == ["late"]


def test_expired_events_are_not_shown(place, monkeypatch):
    state = place.open(keep_ms=100)
    state.append([event("a", 900), event("b", 1_000), event("c", 1_050)])
    monkeypatch.setattr(state_module, "now_ms", lambda: 1_100)
    assert state.path("u") == UserPath(["ib", "ic"], [1, 1], [1_000, 1_050], [None] * 2, 0)
    assert ids(state) == ["b", "c"]
    monkeypatch.setattr(state_module, "now_ms", lambda: 9_000)
    assert state.path("u") == UserPath([], [], [], [], 0)


# The outbox


def test_outbox_hands_out_until_shipped(state):
    assert state.outbox(10) == (NOTHING, [])
    state.shipped(NOTHING)
    taken = [event(str(n), n) for n in range(5)]
    state.append(taken)
    token, events = state.outbox(2)
    assert events == taken[:2]
    assert state.outbox(2) == (token, events)
    state.append([event("later", 9)])
    state.shipped(token)
    state.shipped(token)
    assert state.backlog() == 4
    assert drained(state) == ["2", "3", "4", "later"]
    assert state.backlog() == 0


def test_outbox_numbers_rise_after_it_was_emptied(place):
    state = place.open()
    last = 0
    for number in range(3):
        state.append([event(str(number), number), event(f"{number}+", number)])
        token, _ = state.outbox(10)
        assert last < token.first < token.last
        last = token.last
        state.shipped(token)
        place.close()
        state = place.open()


def test_restart_between_outbox_and_shipped(place):
    first = place.open()
    first.append([event(str(n), n) for n in range(6)])
    token, _ = first.outbox(2)
    first.shipped(token)
    _, lost = first.outbox(2)
    assert [one.event_id for one in lost] == ["2", "3"]
    place.close()
    time.sleep(0.1)  # past the time after which what another was handed is taken over
    assert drained(place.open()) == ["2", "3", "4", "5"]


def test_late_shipped_removes_only_what_was_handed_out(place):
    one, other = place.open(), place.open()
    one.append([event("a", 1)])
    token, _ = one.outbox(10)
    other.append([event("b", 2)])
    one.shipped(token)
    assert other.backlog() == 1
    assert drained(other) == ["b"]


# Several handles


def test_two_handles_see_each_other(place):
    one, other = place.open(), place.open()
    one.append([event("a", 1)])
    assert ids(other) == ["a"]
    assert other.append([event("a", 1), event("b", 2)]) == ["repeated", "accepted"]
    assert ids(one) == ["a", "b"]
    one.close()
    other.append([event("c", 3)])
    assert ids(other) == ["a", "b", "c"]


@pytest.mark.parametrize("shared", [True, False], ids=["one handle", "a handle each"])
def test_concurrent_appends_lose_nothing(place, shared):
    handles = [place.open(max_events=1_000)] * 4 if shared else [place.open(1_000) for _ in "1234"]
    outcomes: list[str] = []

    def post(thread: int) -> None:
        for number in range(50):
            name = f"{thread}-{number}"
            both = [event(name, number, "all"), event(name, number, f"u{thread}")]
            outcomes.extend(handles[thread].append(both))

    threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = {f"{thread}-{number}" for thread in range(4) for number in range(50)}
    assert Counter(outcomes) == {"accepted": 400}
    assert len(ids(handles[0], "all")) == 200
    assert set(ids(handles[0], "all")) == everything
    assert ids(handles[0], "u3") == [f"3-{number}" for number in range(50)]
    assert Counter(drained(handles[0])) == dict.fromkeys(everything, 2)


def test_reopened_it_is_all_there(place):
    state = place.open(sync=True)
    state.append([event("a", 1), event("b", 2)])
    state.erase("v", 9)
    place.close()
    state = place.open(sync=True)
    assert ids(state) == ["a", "b"]
    assert state.path("v").erased_before == 9
    assert drained(state) == ["a", "b"]
    state.close()
    state.close()


def test_refuses_another_format(place, tmp_path):
    place.open()
    place.close()
    if place.address.startswith("lmdb"):
        with lmdb.open(str(tmp_path / "state"), max_dbs=5) as env:
            meta = env.open_db(b"meta")
            with env.begin(write=True) as txn:
                txn.put(b"format", b"7", db=meta)
    else:
        with redis.Redis.from_url(place.address.partition("?")[0]) as client:
            client.set(f"{tmp_path.name}:format", "7")
    with pytest.raises(InputError, match=r"holds format 7, this version reads format 2; serve it"):
        place.open()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("lmbd:x", "unknown kind 'lmbd'; did you mean 'lmdb'"),
        ("state", "unknown kind 'state'; expected lmdb:DIR, redis:"),
        ("lmdb:", "names no place"),
        ("redis://", "names no place"),
        ("redis://h/0?prefx=a", "unknown option 'prefx'; did you mean 'prefix'"),
        ("redis://h/0?timeout_ms=0", "timeout_ms='0' is no number of milliseconds"),
        ("redis://h:port/0", "state='redis://h:port/0': Port could not be cast"),
    ],
)
def test_wrong_address(address, message):
    with pytest.raises(InputError, match=message):
        open_state(address, max_events=1, keep_ms=0, sync=True)


@pytest.mark.parametrize(
    "bound", [{"max_events": 0, "keep_ms": 0}, {"max_events": 1, "keep_ms": -1}]
)
def test_wrong_bounds(bound, tmp_path):
    with pytest.raises(InputError, match=r"max_events=0 keeps no event|keep_ms=-1 is below 0"):
        open_state(f"lmdb:{tmp_path}", sync=True, **bound)


# Against a slow and obvious reference


class Reference:
    """Every event ever taken of one user; what is kept is worked out anew each time."""

    def __init__(self, bound: int) -> None:
        self.bound, self.taken, self.erased_before, self.out = bound, [], 0, []

    def ordered(self) -> list[LoggedEvent]:
        return sorted(self.taken, key=lambda one: one.timestamp)  # stable: ties as they came

    def kept(self) -> list[LoggedEvent]:
        return self.ordered()[-self.bound :]

    def append(self, new: LoggedEvent) -> str:
        for old in self.kept():
            if old.event_id == new.event_id:
                same = (old.item_id, old.timestamp) == (new.item_id, new.timestamp)
                return "repeated" if same else "conflict"
        pushed_out = self.ordered()[: -self.bound]
        if new.timestamp < self.erased_before:
            return "late"
        if any(new.timestamp <= old.timestamp for old in pushed_out):
            return "late"
        if len(self.kept()) == self.bound and new.timestamp < self.kept()[0].timestamp:
            return "late"
        self.taken.append(new)
        self.out.append(new)
        return "accepted"

    def erase(self, now: int) -> int:
        count = len({one.event_id for one in self.kept()} | {one.event_id for one in self.out})
        newest = max((one.timestamp + 1 for one in self.taken), default=0)
        self.erased_before = max(self.erased_before, now, newest)
        self.taken, self.out = [], []
        return count


EVENTS = st.builds(
    lambda name, moment, item: event(name, moment, item_id=item),
    st.sampled_from("abcdefghijkl"),
    st.integers(0, 12),
    st.sampled_from("xy"),
)
STEPS = st.lists(
    st.one_of(
        st.lists(EVENTS, max_size=6),
        st.integers(0, 8),
        st.just("reopen"),
    ),
    max_size=12,
)


@given(steps=STEPS)
@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_as_the_reference_does(place, steps):
    """Lists are appends, numbers erase the user at that moment."""
    # A user of its own for each example: the store stays, as in life.
    state, user = place.open(max_events=3), f"user {time.perf_counter_ns()}"
    reference, mine = Reference(3), lambda one: one.user_id == user
    for step in steps:
        if step == "reopen":
            place.close()
            state = place.open(max_events=3)
        elif isinstance(step, int):
            assert state.erase(user, step) == reference.erase(step)
        else:
            theirs = [
                LoggedEvent(one.event_id, user, one.item_id, "view", one.timestamp, one.received)
                for one in step
            ]
            assert state.append(theirs) == [reference.append(one) for one in theirs]
        assert state.kept(user) == reference.kept()
        assert state.path(user) == UserPath(
            [one.item_id for one in reference.kept()],
            [1] * len(reference.kept()),
            [one.timestamp for one in reference.kept()],
            [one.value for one in reference.kept()],
            reference.erased_before,
        )
    token, waiting = state.outbox(1_000)
    assert [one for one in waiting if mine(one)] == reference.out
    state.shipped(token)
    place.close()


# LMDB: processes, disks


APPENDER = """
import itertools, sys
from recsys.serving.state import LoggedEvent
from recsys.serving.state_lmdb import LmdbState
state = LmdbState(sys.argv[1], max_events=1_000_000, sync=False)
for n in itertools.count():
    name = f"{sys.argv[2]}-{n}"
    batch = [LoggedEvent(name + end, "u", "i", "view", n, n) for end in "ab"]
    assert state.append(batch) == ["accepted"] * 2
    print(name, flush=True)
"""


def run(code: str, *given: object, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, given)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes, **options)


def test_killed_while_appending(tmp_path):
    acknowledged: list[str] = []
    for turn in range(3):
        process = run(APPENDER, tmp_path, turn)
        acknowledged += [process.stdout.readline().strip() for _ in range(5)]
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.read().split()
        process.wait(10)
        process.stderr.close()
        # Another process goes on at once.
        state = LmdbState(tmp_path, max_events=1_000_000, sync=False)
        assert state.append([event(f"after-{turn}", 1, "v")]) == ["accepted"]
        state.close()
    state = LmdbState(tmp_path, max_events=1_000_000)
    counted = Counter(ids(state))
    assert set(counted.values()) == {1}
    assert {name + end for name in acknowledged for end in "ab"} <= set(counted)
    # Whole appends only, the one that was cut off too; and the outbox agrees with the paths.
    assert {name[:-1] + "a" for name in counted} == {name for name in counted if name[-1] == "a"}
    assert {name[:-1] + "b" for name in counted} == {name for name in counted if name[-1] == "b"}
    assert Counter(drained(state)) == counted + Counter(f"after-{turn}" for turn in range(3))
    state.close()


def test_reader_slots_of_the_killed_are_given_back(tmp_path):
    code = """
    import sys, time
    from recsys.serving.state_lmdb import LmdbState
    state = LmdbState(sys.argv[1])
    txn = state._env.begin()
    print("reading", flush=True)
    time.sleep(60)
    """
    state = LmdbState(tmp_path, sync=False)
    process = run(code, tmp_path)
    assert process.stdout.readline() == "reading\n"
    process.kill()
    process.communicate()
    state._opened.checked = time.monotonic() - 120
    state.append([event("a", 1)])
    assert str(process.pid) not in state._env.readers()
    state.close()


def test_full_store(tmp_path):
    state = LmdbState(tmp_path, sync=False, map_bytes=1 << 20)
    kept = 0

    def fill() -> None:
        nonlocal kept
        for kept in range(10_000):
            state.append([event(f"{kept}-{n}", n, f"u{kept}") for n in range(9)])

    with pytest.raises(StateUnavailable, match="is full: its 1 MiB are in use"):
        fill()
    assert state.kept(f"u{kept}") == []
    assert len(state.kept(f"u{kept - 1}")) == 9
    assert state.backlog() == kept * 9
    state.close()


def test_full_disk_and_room_again(tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the same place."""
    code = """
    import resource, sys
    from recsys.serving.state import LoggedEvent, StateUnavailable
    from recsys.serving.state_lmdb import LmdbState
    state = LmdbState(sys.argv[1], sync=True)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    def batch(n):
        return [LoggedEvent(f"{n}-{m}", f"u{n}", "i" * 100, "view", m, m) for m in range(50)]
    n = 0
    try:
        for n in range(1000):
            state.append(batch(n))
    except StateUnavailable as error:
        print("full:", error)
    assert n > 0 and state.kept(f"u{n}") == [] and len(state.kept(f"u{n - 1}")) == 50
    assert state.backlog() == n * 50
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert state.append(batch(n)) == ["accepted"] * 50
    assert len(state.kept(f"u{n}")) == 50 and state.backlog() == (n + 1) * 50
    print("fine")
    """
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    process = run(code, tmp_path)
    printed, errors = process.communicate(timeout=60)
    assert printed.startswith("full: the user state in"), errors
    assert printed.endswith("fine\n"), errors


def test_read_only_directory(tmp_path):
    # From inside, so that a plain user need not be let through the directories above.
    code = """
    import os, sys
    from recsys.schema import InputError
    from recsys.serving.state_lmdb import LmdbState
    os.chdir(sys.argv[1])
    if os.getuid() == 0:
        os.setgid(65534), os.setuid(65534)
    try:
        LmdbState(sys.argv[2])
    except InputError as error:
        print(error)
    """
    LmdbState(tmp_path / "state").close()
    (tmp_path / "state" / "lock.mdb").chmod(0o444)
    (tmp_path / "state").chmod(0o555)
    tmp_path.chmod(0o555)
    for folder in ("state", "new"):
        printed, errors = run(code, tmp_path, folder).communicate(timeout=60)
        assert f"{folder}: cannot keep the user state here (" in printed, errors
        assert "set `state=lmdb:DIR`" in printed
    tmp_path.chmod(0o755)
    (tmp_path / "state").chmod(0o755)


def test_not_a_store(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot keep the user state here"):
        LmdbState(tmp_path / "file")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "data.mdb").write_bytes(b"not a page" * 1_000)
    with pytest.raises(InputError, match=r"damaged or no LMDB file .* move the directory away"):
        LmdbState(tmp_path / "broken")
    with lmdb.open(str(tmp_path / "other")) as env, env.begin(write=True) as txn:
        txn.put(b"key", b"value")
    with pytest.raises(InputError, match="an LMDB store, but not of recsys"):
        LmdbState(tmp_path / "other")


def test_handles_of_one_process_agree_on_sync(tmp_path):
    state = LmdbState(tmp_path, sync=True)
    with pytest.raises(InputError, match="another `sync`"):
        LmdbState(tmp_path, sync=False)
    state.close()
    LmdbState(tmp_path, sync=False).close()


# Redis: gone and back, slow, forgetful, several replicas


@pytest.fixture
def own_server(tmp_path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path, appendonly="yes", appendfsync="always") as server:
        yield server


def test_redis_gone_and_back(own_server):
    state = RedisState(own_server.url, timeout_ms=SLOW)
    acknowledged = []
    for turn in range(2):
        for number in range(20):
            state.append([event(f"{turn}-{number}", turn * 100 + number)])
            acknowledged.append(f"{turn}-{number}")
        handed_out, _ = state.outbox(5)
        own_server.kill()
        for call in (lambda: state.path("u"), lambda: state.append([event("x", 999)])):
            with pytest.raises(StateUnavailable, match=r"redis://127\.0\.0\.1"):
                call()
        own_server.start()
        assert ids(state) == acknowledged
        state.shipped(handed_out)
    assert drained(state) == acknowledged[10:]
    assert state.append([event("x", 999)]) == ["accepted"]
    state.close()


def test_redis_that_hangs_does_not_hang_us(own_server):
    state = RedisState(own_server.url)
    state.append([event("a", 1)])
    own_server.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(StateUnavailable):
        state.path("u")
    assert 0.2 < time.monotonic() - started < 2
    own_server.process.send_signal(signal.SIGCONT)
    assert ids(state) == ["a"]
    state.close()


def test_redis_that_came_back_empty(tmp_path):
    with RedisServer(tmp_path) as server:
        check_goes_on_after_loss(server)


def check_goes_on_after_loss(server: RedisServer) -> None:
    state = RedisState(server.url, timeout_ms=SLOW)
    state.append([event("a", 1)])
    server.kill()
    server.start()
    assert state.outbox(10) == (NOTHING, [])
    assert ids(state) == []
    state.append([event("b", 2)])
    assert drained(state) == ["b"]
    state.close()


def test_replicas_ship_each_event_once(redis_server, tmp_path):
    one, other = (RedisState(redis_server.url, prefix=tmp_path.name, timeout_ms=SLOW) for _ in "ab")
    one.append([event(str(n), n) for n in range(10)])
    first, events = one.outbox(4)
    second, rest = other.outbox(100)
    assert [e.event_id for e in events + rest] == [str(n) for n in range(10)]
    assert other.outbox(100) == (second, rest)
    one.shipped(first)
    other.shipped(second)
    assert one.backlog() == 0
    one.close()
    other.close()


def test_what_a_dead_replica_was_handed_is_taken_over(redis_server, tmp_path):
    given = {"prefix": tmp_path.name, "claim_ms": 300, "timeout_ms": SLOW}
    dead, alive = (RedisState(redis_server.url, **given) for _ in "ab")
    dead.append([event(str(n), n) for n in range(4)])
    assert len(dead.outbox(2)[1]) == 2
    dead.close()
    assert [e.event_id for e in alive.outbox(100)[1]] == ["2", "3"]
    time.sleep(0.4)
    assert drained(alive) == ["0", "1", "2", "3"]
    alive.close()


def test_erasure_reaches_what_was_handed_out(redis_server, tmp_path):
    state = RedisState(redis_server.url, prefix=tmp_path.name, timeout_ms=SLOW)
    state.append([event("a", 1), event("b", 2, "v")])
    token, _ = state.outbox(10)
    assert state.erase("u", 10) == 1
    assert [one.event_id for one in state.outbox(10)[1]] == ["b"]
    state.shipped(token)
    assert state.backlog() == 0
    state.close()


def test_prefixes_are_apart(redis_server, tmp_path):
    one, other = (
        RedisState(redis_server.url, prefix=tmp_path.name + end, timeout_ms=SLOW) for end in "ab"
    )
    one.append([event("a", 1)])
    assert ids(other) == []
    assert other.expire(100) == 0
    assert ids(one) == ["a"]
    one.close()
    other.close()


def test_over_a_unix_socket(redis_server, tmp_path):
    address = f"unix://{redis_server.socket}?prefix={tmp_path.name}&timeout_ms={SLOW}"
    state = open_state(address, max_events=3, keep_ms=0, sync=False)
    assert state.append([event("a", 1)]) == ["accepted"]
    assert ids(state) == ["a"]
    state.close()


def test_warns_where_redis_may_forget(redis_server, own_server):
    with capture_logs() as said:
        RedisState(redis_server.url).close()
    assert [line["event"] for line in said] == ["state_not_durable"]
    with capture_logs() as said:
        RedisState(own_server.url).close()
    assert said == []
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("appendfsync", "everysec")
    with capture_logs() as said:
        RedisState(own_server.url, sync=False).close()
        RedisState(own_server.url, sync=True).close()
    assert [line["event"] for line in said] == ["state_may_lose_a_second"]


def test_redis_that_is_not_there():
    with pytest.raises(StateUnavailable, match=r"redis://127\.0\.0\.1:\d+/0 is not available"):
        RedisState(f"redis://:secret@127.0.0.1:{free_port()}/0")


def test_wrong_password_and_foreign_keys(tmp_path):
    with RedisServer(tmp_path, requirepass="right") as server:
        check_refuses_what_is_not_ours(server)


def check_refuses_what_is_not_ours(server: RedisServer) -> None:
    with pytest.raises(InputError, match=r"cannot be used: .*; check password") as raised:
        RedisState(server.url.replace("//", "//:wrong@"))
    assert "wrong@" not in str(raised.value)
    right = server.url.replace("//", "//:right@")
    RedisState(right).close()
    with redis.Redis.from_url(right) as client:
        client.delete("recsys:outbox")
        client.set("recsys:outbox", "ours is a stream")
    with pytest.raises(InputError, match="cannot be used"):
        RedisState(right)


def test_token_is_plain():
    assert Token(3, 5) == (3, 5, ())


def change(item_id: str, removed: bool = False, **other) -> ItemChange:
    return ItemChange(item_id, removed, 5, **other)


def test_items_newest_change_counts(state):
    assert state.items.since(0) == (0, [])
    whole = change("名" * 900, vector=b"1234", space="s", like=["a"], features={"n": 1}, by="me")
    assert state.items.put([change("a"), whole, change("a", removed=True)]) == 3
    newest, changes = state.items.since(0)
    assert newest == 3
    assert [(one.item_id, one.number) for one in changes] == [(whole.item_id, 2), ("a", 3)]
    assert changes[0] == msgspec.structs.replace(whole, number=2)
    assert changes[1].removed
    assert state.items.since(2).changes == changes[1:]
    assert state.items.since(3) == (3, [])
    assert state.items.put([change("a")]) == 4
    assert [one.item_id for one in state.items.since(3).changes] == ["a"]


def test_items_are_forgotten_unless_they_changed_since(state):
    state.items.put([change("a"), change("b")])
    _, changes = state.items.since(0)
    state.items.put([change("b", removed=True)])
    assert state.items.forget(changes) == 1
    newest, left = state.items.since(0)
    assert (newest, [(one.item_id, one.number) for one in left]) == (3, [("b", 3)])
    assert state.items.forget([]) == 0
    assert state.items.put([change("a")]) == 4


def test_more_items_than_one_reply_holds(state, monkeypatch):
    monkeypatch.setattr("recsys.serving.item_log_redis.PAGE", 2)
    state.items.put([change(str(number)) for number in range(5)])
    newest, changes = state.items.since(1)
    assert (newest, [one.number for one in changes]) == (5, [2, 3, 4, 5])


def test_items_are_seen_through_another_handle_and_after_a_restart(place):
    first, second = place.open(), place.open()
    first.items.put([change("a")])
    assert [one.item_id for one in second.items.since(0).changes] == ["a"]
    first.close()
    second.close()
    assert place.open().items.since(0).newest == 1
