"""Item changes in the Redis of the users' paths: a hash by item, in the order of a sorted set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

from msgspec.structs import replace

from recsys.serving.item_log import Changes, ItemChange, decode, encode

PUT = """
-- KEYS: changes, order, counter. ARGV: item, change, item, change, …
local number = 0
for at = 1, #ARGV, 2 do
  number = redis.call('INCR', KEYS[3])
  redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1])
  redis.call('ZADD', KEYS[2], number, ARGV[at])
end
return number
"""
SINCE = """
-- KEYS: changes, order, counter. ARGV: number.
local newest = tonumber(redis.call('GET', KEYS[3]) or '0')
if newest <= tonumber(ARGV[1]) then return {newest} end
local found = {newest}
local order = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. ARGV[1], '+inf', 'WITHSCORES')
for at = 1, #order, 2 do
  found[#found + 1] = redis.call('HGET', KEYS[1], order[at])
  found[#found + 1] = order[at + 1]
end
return found
"""
FORGET = """
-- KEYS: changes, order, counter. ARGV: item, number, item, number, …
local dropped = 0
for at = 1, #ARGV, 2 do
  if redis.call('ZSCORE', KEYS[2], ARGV[at]) == ARGV[at + 1] then
    redis.call('ZREM', KEYS[2], ARGV[at])
    redis.call('HDEL', KEYS[1], ARGV[at])
    dropped = dropped + 1
  end
end
return dropped
"""
AT_ONCE = 500
"""Changes that one script takes: Redis answers nobody else meanwhile."""


class RedisItemLog:
    """Changes by item; see `ItemLog` for what each method does."""

    every = 0.1

    def __init__(
        self, redis: Any, available: Callable[[], AbstractContextManager[None]], prefix: str
    ) -> None:
        self._available = available
        self._keys = [f"{prefix}:{name}" for name in ("items", "item_order", "item_number")]
        self._put, self._since, self._forget = map(redis.register_script, (PUT, SINCE, FORGET))

    def put(self, changes: Sequence[ItemChange]) -> int:
        """Take changes in one script; as durable as this Redis' `appendonly` makes them."""
        words = chain.from_iterable((c.item_id, encode(c)) for c in changes)
        with self._available():
            return int(self._put(self._keys, [*words]))

    def since(self, number: int) -> Changes:
        """Return the changes after `number`; one round trip."""
        with self._available():
            newest, *found = self._since(self._keys, [number])
        pairs = zip(found[::2], found[1::2], strict=True)
        return Changes(int(newest), [replace(decode(c), number=int(at)) for c, at in pairs])

    def forget(self, changes: Sequence[ItemChange]) -> int:
        """Drop changes that are still the newest of their item, some at a time."""
        dropped = 0
        for start in range(0, len(changes), AT_ONCE):
            some = changes[start : start + AT_ONCE]
            words = chain.from_iterable((c.item_id, str(c.number)) for c in some)
            with self._available():
                dropped += int(self._forget(self._keys, [*words]))
        return dropped
