"""Who may ask what, and how often: API keys with scopes, and a rate a key.

A key is one line `name scopes secret` of the variable RECSYS_API_KEYS or of a file that only its
owner can read, for example `shop read,events 9f2c…`. In place of the secret a line may hold
`sha256:` and the secret's SHA-256 in hexadecimal, so that the file gives nothing away. A scope is
what its name says and no more: a key with `admin` alone cannot read.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple
from urllib.parse import unquote_plus

from recsys.schema import InputError, suggestion

SCOPES = ("read", "events", "items", "admin")
"""read: ask; events: post what people did; items: add and remove items; admin: see and erase a
person, change what is served."""
VARIABLE = "RECSYS_API_KEYS"
SHORTEST = 16
"""Characters that a secret has at least."""
HASHED = "sha256:"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
SECRET = re.compile(r"[!-~]+")
QUERY_NAMES = frozenset(
    ("key", "apikey", "token", "accesstoken", "auth", "authorization", "secret", "bearer")
)
"""Names of query parameters that hold a key, in lower case and without - and _."""
HOW = "send 'Authorization: Bearer YOUR_KEY'"


class Refusal(Exception):
    """A request turned down before any work is done for it: what to answer, and why."""

    status: ClassVar[int]
    code: ClassVar[str]

    def __init__(self, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})


class Unauthorised(Refusal):
    """No key, or one that is not known."""

    status, code = 401, "unauthorised"

    def __init__(self, message: str) -> None:
        super().__init__(message, {"www-authenticate": "Bearer"})


class Forbidden(Refusal):
    """A known key that may not do this."""

    status, code = 403, "forbidden"


class KeyInQuery(Refusal):
    """A key where logs and browsers keep it."""

    status, code = 400, "key_in_query"


class RateLimited(Refusal):
    """A key over its rate."""

    status, code = 429, "rate_limited"


class Key(NamedTuple):
    """Who asks, and what they may."""

    name: str
    scopes: frozenset[str]


ANYONE = Key("anyone", frozenset(SCOPES))
"""Who asks where no keys are set: then only this machine can."""


class Keys:
    """The known keys; without any, whoever reaches the server may do everything.

    >>> keys = Keys({digest_of("secret-of-the-shop"): Key("shop", frozenset(["read"]))})
    >>> keys.allow("Bearer secret-of-the-shop", "read").name
    'shop'
    >>> keys.allow("Bearer secret-of-the-shop", "admin")
    Traceback (most recent call last):
    recsys.serving.guard.Forbidden: the key 'shop' has the scope read; this needs admin
    """

    def __init__(self, by_digest: Mapping[bytes, Key]) -> None:
        self.by_digest = dict(by_digest)

    def __len__(self) -> int:
        return len(self.by_digest)

    @classmethod
    def read(cls, file: str = "", variable: str | None = None) -> Keys:
        """Return the keys of the environment (or of `variable`'s text) and of a file, if named.

        Raises InputError for a file that others can read, and for a line that is not a key.
        """
        text = os.environ.get(VARIABLE, "") if variable is None else variable
        found = _parsed(VARIABLE, text.replace(";", "\n"))
        if file:
            found += _parsed(file, _private_text(Path(file)))
        _refuse_repeated(found)
        return cls(dict(found))

    def allow(self, authorization: str | None, scope: str) -> Key:
        """Return whose key an Authorization header holds; raise Unauthorised or Forbidden."""
        if not self.by_digest:
            return ANYONE
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Unauthorised(f"this server needs an API key: {HOW}")
        key = self._whose(digest_of(secret.strip()))
        if key is None:
            raise Unauthorised("this server does not know the API key")
        if scope not in key.scopes:
            has = ", ".join(sorted(key.scopes))
            raise Forbidden(f"the key {key.name!r} has the scope {has}; this needs {scope}")
        return key

    def _whose(self, digest: bytes) -> Key | None:
        # Every key is compared to the end, whichever fits (0.07 µs each): the time taken says
        # neither how near a guess came nor whose key was met.
        found = None
        for known, key in self.by_digest.items():
            if hmac.compare_digest(known, digest):
                found = key
        return found


def digest_of(secret: str) -> bytes:
    """Return the SHA-256 of a secret, which is all that is kept of it."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _private_text(file: Path) -> str:
    """Return a file's text; raise InputError where anyone but its owner can read it."""
    try:
        with file.open(encoding="utf-8") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            if mode & 0o077:
                raise InputError(
                    f"{file}: others can read these keys (mode {mode:o}); chmod 600 {file}"
                )
            return opened.read()
    except OSError as error:
        raise InputError(f"{file}: cannot read the keys: {error.strerror}; set --keys") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text file; expected lines 'name scopes secret'") from error


def _parsed(origin: str, text: str) -> list[tuple[bytes, Key]]:
    """Return digest and key of each line that is not empty and no comment."""
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return [_key(f"{origin} line {n}", line) for n, line in lines if line and line[0] != "#"]


def _key(origin: str, line: str) -> tuple[bytes, Key]:
    """Read one line; no message repeats what was met, for any word of it may be the secret."""
    words = line.split()
    if len(words) != 3:
        raise InputError(f"{origin}: {len(words)} words; expected 3: name scopes secret")
    name, scopes, secret = words
    if not NAME.fullmatch(name):
        raise InputError(f"{origin}: a name is up to 64 letters, digits, dots, - and _")
    key = Key(name, _scopes(origin, scopes))
    return _digest(origin, secret), key


def _scopes(origin: str, words: str) -> frozenset[str]:
    for word in words.split(","):
        if word not in SCOPES:
            raise InputError(
                f"{origin}: unknown scope; expected some of {','.join(SCOPES)}"
                + suggestion(word, SCOPES)
            )
    return frozenset(words.split(","))


def _digest(origin: str, secret: str) -> bytes:
    if secret.startswith(HASHED):
        if not re.fullmatch("[0-9a-fA-F]{64}", secret.removeprefix(HASHED)):
            raise InputError(f"{origin}: expected 64 hexadecimal digits after {HASHED}")
        return bytes.fromhex(secret.removeprefix(HASHED))
    if len(secret) < SHORTEST or not SECRET.fullmatch(secret):
        raise InputError(
            f"{origin}: a secret has at least {SHORTEST} ASCII characters; "
            "make one with: openssl rand -hex 24"
        )
    return digest_of(secret)


def _refuse_repeated(found: Iterable[tuple[bytes, Key]]) -> None:
    names: set[str] = set()
    digests: dict[bytes, str] = {}
    for digest, key in found:
        if key.name in names:
            raise InputError(f"two keys are named {key.name!r}; give each a name of its own")
        if digest in digests:
            raise InputError(f"the keys {digests[digest]!r} and {key.name!r} have one secret")
        names.add(key.name)
        digests[digest] = key.name


def refuse_key_in_query(query: bytes) -> None:
    """Raise KeyInQuery where a query string holds a key; the message does not repeat it.

    >>> refuse_key_in_query(b"k=5")
    >>> refuse_key_in_query(b"k=5&api_key=9f2c")
    Traceback (most recent call last):
    recsys.serving.guard.KeyInQuery: a key in the query string ends up in logs: \
send 'Authorization: Bearer YOUR_KEY', and replace this key, for it was seen
    """
    if not query:
        return
    for pair in query.decode("latin-1").split("&"):
        name = unquote_plus(pair.partition("=")[0]).lower()
        if name.replace("_", "").replace("-", "").removeprefix("x") in QUERY_NAMES:
            raise KeyInQuery(
                f"a key in the query string ends up in logs: {HOW}, and replace this key, "
                "for it was seen"
            )


class RateLimit:
    """So many requests a second from each key, and `burst` at once after a pause.

    Each process keeps its own count: give it its share of the whole. What costs more than one
    request is let in when the burst allows it and paid for afterwards.

    >>> now = 0.0
    >>> limit = RateLimit(rate=2, burst=1, clock=lambda: now)
    >>> limit.take("shop")
    >>> limit.take("shop")
    Traceback (most recent call last):
    recsys.serving.guard.RateLimited: the key 'shop' is over its rate of 2 a second on this worker
    """

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        assert rate > 0 <= burst
        self.rate, self.burst, self.clock = rate, max(1.0, burst), clock
        self.left: dict[str, tuple[float, float]] = {}

    def take(self, name: str, cost: float = 1.0) -> None:
        """Pay `cost` requests of a key; raise RateLimited with Retry-After where it has too few."""
        now = self.clock()
        left, then = self.left.get(name, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.rate)
        missing = min(cost, self.burst) - left
        if missing > 0:
            raise RateLimited(
                f"the key {name!r} is over its rate of {self.rate:g} a second on this worker",
                {"retry-after": str(math.ceil(missing / self.rate))},
            )
        self.left[name] = (left - cost, now)


class Guard:
    """What a request passes before anything else: its key, its scope, its rate."""

    def __init__(self, keys: Keys, limit: RateLimit | None = None) -> None:
        self.keys, self.limit = keys, limit

    def allow(self, authorization: str | None, query: bytes, scope: str, cost: float = 1.0) -> Key:
        """Return who asks; raise a Refusal where they may not, or not yet."""
        refuse_key_in_query(query)
        key = self.keys.allow(authorization, scope)
        if self.limit:
            self.limit.take(key.name, cost)
        return key

    def charge(self, key: Key, cost: float) -> None:
        """Take what a request turned out to cost beyond one; raise RateLimited over the rate."""
        if self.limit and cost > 0:
            self.limit.take(key.name, cost)


def check_exposure(host: str, keys: Keys) -> None:
    """Raise InputError where other machines could reach a server that has no keys.

    >>> check_exposure("127.0.0.1", Keys({}))
    >>> check_exposure("0.0.0.0", Keys({}))
    Traceback (most recent call last):
    recsys.schema.InputError: other machines can reach host '0.0.0.0', and there are no API keys: \
export RECSYS_API_KEYS="shop read,events $(openssl rand -hex 24)", or set --keys FILE, or \
--host 127.0.0.1
    """
    if not keys and not _only_this_machine(host):
        raise InputError(
            f"other machines can reach host {host!r}, and there are no API keys: export "
            f'{VARIABLE}="shop read,events $(openssl rand -hex 24)", or set --keys FILE, or '
            "--host 127.0.0.1"
        )


def _only_this_machine(host: str) -> bool:
    """Whether every address of a host is loopback; one without any cannot be listened on."""
    try:
        found = socket.getaddrinfo(
            host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError):
        return True
    # An address of IPv6 may name its interface after a percent sign.
    addresses = (str(address[0]).partition("%")[0] for *_, address in found)
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)
