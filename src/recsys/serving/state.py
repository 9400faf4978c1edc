"""What each user did lately, and which events still wait to be logged: one interface, two stores.

A store keeps of every user a path: the newest events by time, as many as `max_events`. What was
appended is durable when `append` returns, and waits in an outbox, put there in the same
transaction, until the log has it.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec

from recsys.schema import EVENT_TYPES, InputError, suggestion, type_code

if TYPE_CHECKING:
    from recsys.serving.item_log import ItemLog

FORMAT = b"2"
"""Version of what a store holds; a store of another version is refused."""
SCHEMES = ("lmdb", "redis", "rediss", "unix")
FOREVER = 0
"""As `keep_ms`: events do not expire."""

Outcome = Literal["accepted", "repeated", "conflict", "late"]
Stored = bytes | memoryview | None
"""What a store finds under a key."""


class StateUnavailable(RuntimeError):
    """The store cannot answer now (disk full, Redis gone); nothing of the call was acknowledged."""


class LoggedEvent(msgspec.Struct, frozen=True, array_like=True):
    """One event as it was taken; times in milliseconds since 1970."""

    event_id: str
    user_id: str
    item_id: str
    event_type: str
    timestamp: int
    received: int
    value: float | None = None
    answer_id: str | None = None


class UserPath(NamedTuple):
    """What a model reads of a user, oldest first: item ids, type codes, milliseconds, values.

    No event from before `erased_before` is of this user any more (0: nothing was ever erased).
    """

    items: list[str]
    types: list[int]
    times: list[int]
    values: list[float | None]
    erased_before: int


class Token(NamedTuple):
    """Which outbox entries were handed out: whole numbers that only ever rise, from 1.

    `entries` names them one by one where the numbers between first and last may belong to others.
    """

    first: int
    last: int
    entries: tuple[str, ...] = ()


NOTHING = Token(1, 0)
"""The token of an empty outbox."""


class UserState(Protocol):
    """A store of paths and outbox; any thread may call it, and several processes may share it.

    Every method raises StateUnavailable where the store does not answer, and may be called again.
    """

    @property
    def items(self) -> ItemLog:
        """The items that were added and removed: kept in the same place."""

    def append(self, events: Sequence[LoggedEvent]) -> list[Outcome]:
        """Take events, all or none; they are durable when this returns what became of each.

        repeated: the user has this event already. conflict: has another one under its event_id.
        late: older than everything kept of a full path, than anything that was pushed out of it,
        or than the user's erasure. Of these three nothing is kept.
        """

    def path(self, user_id: str) -> UserPath:
        """Return the newest events of a user that have not expired."""

    def kept(self, user_id: str) -> list[LoggedEvent]:
        """Return the same events in full."""

    def erase(self, user_id: str, now: int) -> int:
        """Forget a user's events, those in the outbox too; return how many.

        What stays is a tombstone, the user's hash and a moment: no event from before it is taken
        again. The moment is `now`, or just after the user's newest event if that is later.
        """

    def erased(self) -> Iterator[tuple[bytes, int]]:
        """Return the tombstones: `user_hash` of the user, and `erased_before`."""

    def expire(self, before: int) -> int:
        """Drop all users' events older than `before`; return how many. Tombstones stay."""

    def outbox(self, limit: int) -> tuple[Token, list[LoggedEvent]]:
        """Return the oldest events that wait for the log; they stay until `shipped`."""

    def shipped(self, token: Token) -> None:
        """Remove from the outbox what was handed out with `token`."""

    def backlog(self) -> int:
        """Return how many events wait in the outbox."""

    def close(self) -> None:
        """Let go of files and connections."""


def open_state(address: str, *, max_events: int, keep_ms: int, sync: bool) -> UserState:
    """Open the store at `lmdb:DIR`, `redis://…`, `rediss://…` or `unix://SOCKET`.

    keep_ms: events older than this are not shown (0: for ever). sync: an appended event survives
    the machine, not only the process. Raises InputError for what is no store of this version.

    >>> open_state("lmbd:state", max_events=200, keep_ms=0, sync=True)
    Traceback (most recent call last):
    recsys.schema.InputError: state='lmbd:state': unknown kind 'lmbd'; did you mean 'lmdb'?
    """
    check_bounds(max_events, keep_ms)
    scheme, _, rest = address.partition(":")
    if scheme not in SCHEMES or not rest.strip("/"):
        raise _unknown_address(address, scheme)
    if scheme == "lmdb":
        from recsys.serving.state_lmdb import LmdbState

        return LmdbState(rest, max_events=max_events, keep_ms=keep_ms, sync=sync)
    try:
        from recsys.serving.state_redis import RedisState
    except ModuleNotFoundError as error:
        raise InputError(
            f"state={scheme}:… needs {error.name}: pip install 'recsys[redis]'"
        ) from error
    return RedisState(address, max_events=max_events, keep_ms=keep_ms, sync=sync)


def _unknown_address(address: str, scheme: str) -> InputError:
    expected = "expected lmdb:DIR, redis://HOST:PORT/DB, rediss://… or unix:///SOCKET"
    if scheme in SCHEMES:
        return InputError(f"state={address!r} names no place; {expected}")
    hint = suggestion(scheme, SCHEMES) or f"; {expected}"
    return InputError(f"state={address!r}: unknown kind {scheme!r}{hint}")


def check_bounds(max_events: int, keep_ms: int) -> None:
    """Raise InputError for a bound that keeps nothing."""
    if max_events < 1:
        raise InputError(f"max_events={max_events} keeps no event; expected 1 or more")
    if keep_ms < 0:
        raise InputError(f"keep_ms={keep_ms} is below 0; expected milliseconds, or 0 for ever")


def other_format(where: str, met: bytes) -> InputError:
    """Return the error for a store that another version of this package wrote.

    >>> print(other_format("state", b"7"))
    state: holds format 7, this version reads format 2; serve it with the version of recsys that \
wrote it, or set `state` to another place to begin anew
    """
    return InputError(
        f"{where}: holds format {met.decode(errors='replace')[:20]}, this version reads format "
        f"{FORMAT.decode()}; serve it with the version of recsys that wrote it, or set `state` to "
        "another place to begin anew"
    )


def now_ms() -> int:
    """Return the moment, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def user_hash(user_id: str) -> bytes:
    """Return the 16 bytes under which a user is kept: a tombstone then names nobody.

    >>> user_hash("u1").hex()
    '53199585bddea28e67fe7143a42baef7'
    """
    return blake2b(user_id.encode(), digest_size=16).digest()


class Path(msgspec.Struct, array_like=True, gc=False):
    """The part of a user's record that every answer reads; `types` holds one byte an event."""

    items: list[str]
    types: bytes
    times: list[int]
    values: list[float | None]


class Details(msgspec.Struct, array_like=True, gc=False):
    """The rest of a record, event by event; `floor` is one past the newest pushed-out event."""

    ids: list[str]
    received: list[int]
    answers: list[str | None]
    floor: int


encode = msgspec.msgpack.Encoder().encode
decode_path = msgspec.msgpack.Decoder(Path).decode
decode_details = msgspec.msgpack.Decoder(Details).decode
decode_event = msgspec.msgpack.Decoder(LoggedEvent).decode


@dataclass(frozen=True)
class Bounds:
    """How much of a path is shown, and where it begins."""

    max_events: int
    keep_ms: int

    def start(self, times: list[int]) -> int:
        """Return the place of the oldest event to show.

        >>> Bounds(max_events=2, keep_ms=0).start([10, 20, 30])
        1
        """
        start = max(len(times) - self.max_events, 0)
        if self.keep_ms and times and times[start] < (oldest := now_ms() - self.keep_ms):
            return bisect_left(times, oldest, start)
        return start

    def shown(self, path: Path | None, erased_before: int) -> UserPath:
        """Return what a model may read of a path."""
        if path is None:
            return UserPath([], [], [], [], erased_before)
        kept = slice(self.start(path.times), None)
        types = list(path.types[kept])
        return UserPath(path.items[kept], types, path.times[kept], path.values[kept], erased_before)


class Trail:
    """All that is kept of one user, oldest first, to be changed and written back.

    `floor`: no event from before it is taken, as it may be one that was taken once already.
    """

    def __init__(self, path: Path | None, details: Details | None, erased_before: int) -> None:
        path = path or Path([], b"", [], [])
        details = details or Details([], [], [], 0)
        self.items, self.types, self.times = path.items, bytearray(path.types), path.times
        self.values, self.ids = path.values, details.ids
        self.received, self.answers = details.received, details.answers
        self.floor, self.changed = max(details.floor, erased_before), False

    @classmethod
    def read(cls, path: Stored, details: Stored, erased_before: int) -> Trail:
        """Decode a record as `packed` wrote it."""
        return cls(
            decode_path(path) if path else None,
            decode_details(details) if details else None,
            erased_before,
        )

    def packed(self) -> tuple[bytes, bytes]:
        """Encode the two parts of the record."""
        return (
            encode(Path(self.items, bytes(self.types), self.times, self.values)),
            encode(Details(self.ids, self.received, self.answers, self.floor)),
        )

    def add(self, event: LoggedEvent, max_events: int) -> Outcome:
        """Put an event in its place by time, behind those of the same moment."""
        if event.event_id in self.ids:
            return self._met(self.ids.index(event.event_id), event)
        full = len(self.times) >= max_events
        if event.timestamp < self.floor or (full and event.timestamp < self.times[-max_events]):
            return "late"
        self._insert(bisect_right(self.times, event.timestamp), event)
        if len(self.times) > max_events:
            # Moments are whole: from the next one on, nothing was ever pushed out.
            self.floor = self.times[len(self.times) - max_events - 1] + 1
            self._cut(len(self.times) - max_events)
        return "accepted"

    def _met(self, place: int, event: LoggedEvent) -> Outcome:
        # A post that named no moment got that of its arrival: another at each retry.
        named = event.timestamp != event.received
        moment = event.timestamp if named else self.times[place]
        kept = self.items[place], self.types[place], self.times[place], self.values[place]
        given = event.item_id, type_code(event.event_type), moment, event.value
        return "repeated" if kept == given else "conflict"

    def _columns(self) -> tuple[MutableSequence[Any], ...]:
        kept = self.items, self.types, self.times, self.ids
        return (*kept, self.received, self.values, self.answers)

    def _insert(self, place: int, event: LoggedEvent) -> None:
        code, ids = type_code(event.event_type), (event.event_id, event.received)
        row = (event.item_id, code, event.timestamp, *ids, event.value, event.answer_id)
        for column, value in zip(self._columns(), row, strict=True):
            column.insert(place, value)
        self.changed = True

    def _cut(self, count: int) -> None:
        for column in self._columns():
            del column[:count]
        self.changed = True

    def drop_before(self, moment: int) -> int:
        """Drop the events older than `moment`; return how many."""
        count = bisect_left(self.times, moment)
        if count:
            self.floor = max(self.floor, self.times[count - 1] + 1)
            self._cut(count)
        return count

    def erasure(self, now: int) -> int:
        """Return the moment before which this user is to be forgotten.

        Later than `now` if the user's newest event is: a retry must not bring it back.
        """
        return max(now, self.floor, self.times[-1] + 1 if self.times else 0)

    def events(self, user_id: str, bounds: Bounds) -> list[LoggedEvent]:
        """Return the events to show, in full."""
        return [
            LoggedEvent(
                self.ids[place],
                user_id,
                self.items[place],
                EVENT_TYPES[self.types[place] - 1],
                self.times[place],
                self.received[place],
                self.values[place],
                self.answers[place],
            )
            for place in range(bounds.start(self.times), len(self.times))
        ]


@dataclass
class Batch:
    """The events of one append, worked through in their order, before anything is written."""

    load: Callable[[bytes], Trail]
    max_events: int
    trails: dict[bytes, Trail] = field(default_factory=dict)
    accepted: list[bytes] = field(default_factory=list)

    def add(self, event: LoggedEvent) -> Outcome:
        """Apply one event to its user's trail; an accepted one is ready for the outbox."""
        key = user_hash(event.user_id)
        trail = self.trails.get(key)
        if trail is None:
            trail = self.trails[key] = self.load(key)
        outcome = trail.add(event, self.max_events)
        if outcome == "accepted":
            self.accepted.append(encode(event))
        return outcome

    def changed(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Return key, path and details of every record to write."""
        for key, trail in self.trails.items():
            if trail.changed:
                yield key, *trail.packed()
