"""User state in one Redis or Valkey, shared by the replicas of a server on many machines.

A user is one hash: path, details, tombstone and the version of its last change. An append reads
the hashes of its users, works out the new ones here as the embedded store does, and writes them
and the outbox entries in one script, which refuses if a version has changed in between.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from secrets import token_hex
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec
import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from recsys.schema import InputError, suggestion
from recsys.serving.item_log_redis import RedisItemLog
from recsys.serving.state import (
    FORMAT,
    NOTHING,
    Batch,
    Bounds,
    LoggedEvent,
    Outcome,
    StateUnavailable,
    Token,
    Trail,
    UserPath,
    check_bounds,
    decode_event,
    decode_path,
    other_format,
    user_hash,
)

log = structlog.get_logger("recsys.serving")

OWN_OPTIONS = ("prefix", "timeout_ms", "claim_ms")
"""What the address may set of a store: `redis://host:6379/0?prefix=shop&timeout_ms=250`."""
CLIENT_OPTIONS = ("db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs")
GROUP = "log"
TRIES = 200
"""Times that a write is worked out anew because another replica changed a user meanwhile."""
SWEEP = 512
"""Users, tombstones or outbox entries that are read in one go."""
IDLE_MS = 3_600_000
"""A consumer that held nothing and asked for nothing so long is gone."""
FAILURES = (redis.RedisError, OSError, msgspec.DecodeError)

WRITE = """
-- KEYS: outbox, sequence, then users. ARGV: number of outbox entries, these, then for each user
-- its expected version, path and details; an empty path drops the events. Versions come from one
-- sequence, so that a record which went and came back is not taken for the same.
local at = tonumber(ARGV[1]) + 2
for user = 3, #KEYS do
  local version = redis.call('HGET', KEYS[user], 'version') or ''
  if version ~= ARGV[at + (user - 3) * 3] then return 0 end
end
for user = 3, #KEYS do
  local place = at + (user - 3) * 3
  if ARGV[place + 1] ~= '' then
    redis.call('HSET', KEYS[user], 'path', ARGV[place + 1], 'details', ARGV[place + 2],
      'version', redis.call('INCR', KEYS[2]))
  elseif redis.call('HEXISTS', KEYS[user], 'erased') == 1 then
    redis.call('HDEL', KEYS[user], 'path', 'details')
    redis.call('HSET', KEYS[user], 'version', redis.call('INCR', KEYS[2]))
  else
    redis.call('DEL', KEYS[user])
  end
end
for entry = 2, at - 1 do redis.call('XADD', KEYS[1], '*', 'event', ARGV[entry]) end
return 1
"""
ERASE = """
-- KEYS: user, erased, sequence. ARGV: expected version, user hash, moment.
if (redis.call('HGET', KEYS[1], 'version') or '') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 'path', 'details')
redis.call('HSET', KEYS[1], 'erased', ARGV[3], 'version', redis.call('INCR', KEYS[3]))
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
return 1
"""
TIDY = """
-- KEYS: outbox. ARGV: group, milliseconds. Forgets consumers that hold nothing and asked nothing.
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for place = 1, #row, 2 do consumer[row[place]] = row[place + 1] end
  if consumer.pending == 0 and consumer.idle >= tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
  end
end
"""

Entry = tuple[bytes, Mapping[bytes, bytes] | None]
"""Name and fields of a stream's entry; no fields: it was deleted by other hands."""
Result = TypeVar("Result")


class Change(NamedTuple):
    """A record to write, if it still is of the version that was read."""

    key: bytes
    version: bytes | None
    path: bytes
    details: bytes


class RedisState:
    """Paths and outbox in the Redis at `address`; see `UserState` for what each method does.

    sync: warn where this Redis may forget what it acknowledged; whether it does is its setting.
    prefix: begins every key. timeout_ms: the longest wait for one reply. claim_ms: outbox entries
    that another replica was handed so long ago are taken to be left behind. All three may also
    stand in the address' query string.
    """

    def __init__(
        self,
        address: str,
        *,
        max_events: int = 200,
        keep_ms: int = 0,
        sync: bool = True,
        prefix: str = "recsys",
        timeout_ms: int = 250,
        claim_ms: int = 60_000,
    ) -> None:
        check_bounds(max_events, keep_ms)
        self.bounds = Bounds(max_events, keep_ms)
        url, given = _options(address)
        self.prefix = given.get("prefix", prefix)
        self.claim_ms = _whole("claim_ms", given.get("claim_ms", claim_ms))
        self._where = f"the user state in {_without_password(address)}"
        # Any: the client's own types leave open whether it answers at once or is awaited.
        self._redis: Any = _client(url, _whole("timeout_ms", given.get("timeout_ms", timeout_ms)))
        self._write, self._erase, self._tidy = map(
            self._redis.register_script, (WRITE, ERASE, TIDY)
        )
        self.items = RedisItemLog(self._redis, self._available, self.prefix)
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{token_hex(4)}"
        try:
            self._begin(sync)
        except BaseException:
            self.close()
            raise

    def append(self, events: Sequence[LoggedEvent]) -> list[Outcome]:
        """Take events in one script; as durable as this Redis' `appendonly` makes them."""
        keys = list(dict.fromkeys(user_hash(event.user_id) for event in events))

        def attempt() -> list[Outcome] | None:
            found = self._records(keys)
            batch = Batch(lambda key: _trail(found[key]), self.bounds.max_events)
            outcomes = [batch.add(event) for event in events]
            changes = [
                Change(key, found[key][3], path, details) for key, path, details in batch.changed()
            ]
            return outcomes if self._commit(changes, batch.accepted) else None

        return self._until_written(attempt)

    def path(self, user_id: str) -> UserPath:
        """Return the newest events of a user that have not expired; one round trip."""
        with self._available():
            path, erased = self._redis.hmget(self._user(user_hash(user_id)), "path", "erased")
            found = decode_path(path) if path else None
        return self.bounds.shown(found, int(erased or 0))

    def kept(self, user_id: str) -> list[LoggedEvent]:
        """Return the same events in full."""
        key = user_hash(user_id)
        with self._available():
            return _trail(self._records([key])[key]).events(user_id, self.bounds)

    def erase(self, user_id: str, now: int) -> int:
        """Forget a user's events, then those in the outbox, and leave a tombstone."""
        key = user_hash(user_id)

        def attempt() -> tuple[list[str], int] | None:
            record = self._records([key])[key]
            trail = _trail(record)
            moment = trail.erasure(now)
            keys = [self._user(key), self._key("erased"), self._key("sequence")]
            done = self._erase(keys, [record[3] or b"", key, moment])
            return (trail.ids, moment) if done else None

        ids, moment = self._until_written(attempt)
        with self._available():
            return len(set(ids) | self._unqueue(user_id, moment))

    def erased(self) -> Iterator[tuple[bytes, int]]:
        """Return the tombstones: user hash and moment."""
        with self._available():
            found = dict(self._redis.hscan_iter(self._key("erased"), count=SWEEP))
        return ((key, int(moment)) for key, moment in found.items())

    def expire(self, before: int) -> int:
        """Drop events older than `before`, a few hundred users at a time."""
        dropped, cursor, pattern = 0, -1, self._key("user:*")
        while cursor:
            with self._available():
                cursor, names = self._redis.scan(max(cursor, 0), match=pattern, count=SWEEP)
            keys = [bytes.fromhex(name.rpartition(b":")[2].decode()) for name in names]
            dropped += self._drop(self._older(keys, before), before)
        return dropped

    def outbox(self, limit: int) -> tuple[Token, list[LoggedEvent]]:
        """Return the oldest events that wait for the log and that no other replica was handed."""
        with self._available():
            handed_out = self._handed_out(limit)
            self._remove([name for name, fields in handed_out if not fields])
            found = {name: fields[b"event"] for name, fields in handed_out if fields}
            names = sorted(found, key=_number)
            if not names:
                return NOTHING, []
            entries = tuple(name.decode() for name in names)
            token = Token(_number(names[0]), _number(names[-1]), entries)
            return token, [decode_event(found[name]) for name in names]

    def shipped(self, token: Token) -> None:
        """Remove what was handed out with `token`."""
        for start in range(0, len(token.entries), SWEEP):
            with self._available():
                self._remove(token.entries[start : start + SWEEP])

    def backlog(self) -> int:
        """Return how many events wait in the outbox."""
        with self._available():
            return int(self._redis.xlen(self._key("outbox")))

    def close(self) -> None:
        """Let go of the connections; what this handle had been handed goes to another."""
        self._redis.close()

    def _begin(self, sync: bool) -> None:
        try:
            self._redis.set(self._key("format"), FORMAT, nx=True)
            met = self._redis.get(self._key("format"))
            if met != FORMAT:
                raise other_format(f"{self._where}, prefix {self.prefix!r}", met or b"none")
            self._join()
        except (redis.AuthenticationError, redis.ResponseError) as error:
            raise InputError(
                f"{self._where} cannot be used: {error}; check password, database and `prefix`, "
                "and that it is the primary"
            ) from error
        except FAILURES as error:
            raise StateUnavailable(
                f"{self._where} is not available: {error}; start it, or set `state` to another"
            ) from error
        self._warn_if_forgetful(sync)

    def _join(self) -> None:
        try:
            self._redis.xgroup_create(self._key("outbox"), GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._tidy([self._key("outbox")], [GROUP, IDLE_MS])

    def _warn_if_forgetful(self, sync: bool) -> None:
        try:
            found = self._redis.config_get("append*")
        except FAILURES as error:
            log.warning("state_durability_unknown", reason=str(error))
            return
        if found.get("appendonly") != "yes":
            log.warning("state_not_durable", appendonly="no", advice="appendonly yes")
        elif sync and found.get("appendfsync") != "always":
            log.warning(
                "state_may_lose_a_second",
                appendfsync=found.get("appendfsync"),
                advice="appendfsync always",
            )

    def _records(self, keys: Sequence[bytes]) -> dict[bytes, list[bytes | None]]:
        """Return path, details, tombstone and version of each user, in one round trip."""
        pipeline = self._redis.pipeline(transaction=False)
        for key in keys:
            pipeline.hmget(self._user(key), "path", "details", "erased", "version")
        return dict(zip(keys, pipeline.execute(), strict=True))

    def _commit(self, changes: Sequence[Change], entries: Sequence[bytes]) -> bool:
        """Write records and outbox entries, unless a record is no longer of its version."""
        if not changes:
            return True
        keys = [self._key("outbox"), self._key("sequence"), *(self._user(c.key) for c in changes)]
        records = [part for c in changes for part in (c.version or b"", c.path, c.details)]
        return bool(self._write(keys, [len(entries), *entries, *records]))

    def _until_written(self, attempt: Callable[[], Result | None]) -> Result:
        with self._available():
            for _ in range(TRIES):
                if (result := attempt()) is not None:
                    return result
        raise StateUnavailable(f"{self._where} changes too fast; tried {TRIES} times")

    def _unqueue(self, user_id: str, moment: int) -> set[str]:
        """Remove a user's events before `moment` from the outbox; return their ids.

        Later ones were posted since the erasure, by another replica.
        """
        gone: set[str] = set()
        start = b"-"
        while entries := self._redis.xrange(self._key("outbox"), min=start, count=SWEEP):
            events = {name: decode_event(fields[b"event"]) for name, fields in entries}
            theirs = [
                name
                for name, event in events.items()
                if event.user_id == user_id and event.timestamp < moment
            ]
            self._remove(theirs)
            gone |= {events[name].event_id for name in theirs}
            start = b"(" + entries[-1][0]
        return gone

    def _remove(self, names: Sequence[bytes | str]) -> None:
        if names:
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.xack(self._key("outbox"), GROUP, *names)
            pipeline.xdel(self._key("outbox"), *names)
            pipeline.execute()

    def _older(self, keys: Sequence[bytes], before: int) -> list[bytes]:
        with self._available():
            found = self._records(keys)
            return [key for key, (path, *_) in found.items() if path and _oldest(path) < before]

    def _drop(self, keys: Sequence[bytes], before: int) -> int:
        def attempt() -> int | None:
            found = self._records(keys)
            trails = {key: _trail(record) for key, record in found.items()}
            dropped = sum(trail.drop_before(before) for trail in trails.values())
            changes = [
                Change(key, found[key][3], *(trail.packed() if trail.times else (b"", b"")))
                for key, trail in trails.items()
            ]
            return dropped if self._commit(changes, []) else None

        return self._until_written(attempt)

    def _handed_out(self, limit: int) -> list[Entry]:
        """Return what this consumer holds, then what a dead one left, then new entries."""
        entries = self._read("0", limit)
        if len(entries) < limit:
            entries += self._claimed(limit - len(entries))
        if len(entries) < limit:
            entries += self._read(">", limit - len(entries))
        return entries

    def _read(self, start: str, count: int) -> list[Entry]:
        streams: dict[Any, Any] = {self._key("outbox"): start}
        try:
            found = self._redis.xreadgroup(GROUP, self.consumer, streams, count=count)
        except redis.ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            self._join()  # this Redis came back empty
            return []
        return [(name, fields) for _, entries in found for name, fields in entries]

    def _claimed(self, count: int) -> list[Entry]:
        key = self._key("outbox")
        found = self._redis.xautoclaim(key, GROUP, self.consumer, self.claim_ms, count=count)
        return [(name, fields) for name, fields in found[1]]

    def _key(self, name: str) -> str:
        return f"{self.prefix}:{name}"

    def _user(self, key: bytes) -> str:
        return f"{self.prefix}:user:{key.hex()}"

    @contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            raise StateUnavailable(f"{self._where} is not available: {error}") from error


def _client(url: str, timeout_ms: int) -> redis.Redis:
    """Return a client that fails fast, and connects again with its next call.

    It sends nothing twice: whether a write that got no reply was done, only the caller's own
    second try can tell, by the event's id.
    """
    seconds = timeout_ms / 1000
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            retry=Retry(NoBackoff(), 0),
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"state={_without_password(url)!r}: {error}") from error


def _options(address: str) -> tuple[str, dict[str, str]]:
    """Split an address into the client's part and the store's own options.

    >>> _options("redis://localhost/0?prefix=shop&db=1")
    ('redis://localhost/0?db=1', {'prefix': 'shop'})
    """
    parts = urlsplit(address)
    given = dict(parse_qsl(parts.query))
    known = OWN_OPTIONS + CLIENT_OPTIONS
    for name in given:
        if name not in known:
            hint = suggestion(name, known) or f"; expected one of {', '.join(known)}"
            raise InputError(f"state: unknown option {name!r}{hint}")
    rest = urlencode({name: value for name, value in given.items() if name not in OWN_OPTIONS})
    url = f"{parts.scheme}://{parts.netloc}{parts.path}" + (f"?{rest}" if rest else "")
    return url, {name: given[name] for name in OWN_OPTIONS if name in given}


def _without_password(address: str) -> str:
    """Return an address that may be shown.

    >>> _without_password("redis://me:secret@localhost:6379/0?prefix=a")
    'redis://localhost:6379/0'
    """
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _whole(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise InputError(f"state: {name}={value!r} is no number of milliseconds above 0")
    return int(value)


def _trail(record: Sequence[bytes | None]) -> Trail:
    path, details, erased, _ = record
    return Trail.read(path, details, int(erased or 0))


def _oldest(path: bytes) -> int:
    return decode_path(path).times[0]


def _number(name: bytes) -> int:
    """Return a stream entry's name as one number that rises as the names do.

    >>> _number(b"1-0") < _number(b"1-1") < _number(b"2-0")
    True
    """
    moment, _, place = name.partition(b"-")
    return (int(moment) << 20) + int(place)
