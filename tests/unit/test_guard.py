"""Keys, scopes and rates: what is let in, what is not, and that no message gives a secret away."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from recsys.schema import InputError
from recsys.serving.guard import (
    Forbidden,
    Guard,
    KeyInQuery,
    Keys,
    RateLimit,
    RateLimited,
    Unauthorised,
    check_exposure,
    refuse_key_in_query,
)

SHOP, OPS = "shop-secret-0123456789", "ops-secret-9876543210"
LINES = f"# who asks\nshop read,events {SHOP}\n\nops admin {OPS}\n"


@pytest.fixture
def keys() -> Keys:
    return Keys.read(variable=LINES)


@pytest.mark.parametrize("header", [f"Bearer {SHOP}", f"bearer {SHOP}", f"BEARER  {SHOP} "])
def test_a_known_key_is_let_in(keys: Keys, header: str) -> None:
    assert keys.allow(header, "read").name == "shop"
    assert keys.allow(header, "events").name == "shop"


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "Bearer", "Bearer ", SHOP, f"Basic {SHOP}", f"Bearer {SHOP}x"),
        *(
            f"Bearer {SHOP[:-1]}",
            f"Bearer {SHOP.upper()}",
            "Bearer \xff\udc80",
            "Bearer " + "x" * 9999,
        ),
        f"Bearer {hashlib.sha256(SHOP.encode()).hexdigest()}",
    ],
)
def test_no_key_or_a_wrong_one_is_not(keys: Keys, header: str | None) -> None:
    with pytest.raises(Unauthorised) as caught:
        keys.allow(header, "read")
    assert (caught.value.status, caught.value.headers) == (401, {"www-authenticate": "Bearer"})
    assert SHOP[:8] not in str(caught.value)


def test_a_scope_is_what_it_says_and_no_more(keys: Keys) -> None:
    with pytest.raises(Forbidden, match="'shop' has the scope events, read; this needs admin"):
        keys.allow(f"Bearer {SHOP}", "admin")
    with pytest.raises(Forbidden, match="'ops' has the scope admin; this needs read") as caught:
        keys.allow(f"Bearer {OPS}", "read")
    assert caught.value.status == 403


def test_a_hashed_key_is_the_same_key() -> None:
    digest = hashlib.sha256(SHOP.encode()).hexdigest()
    keys = Keys.read(variable=f"shop read sha256:{digest.upper()}")
    assert keys.allow(f"Bearer {SHOP}", "read").name == "shop"


def test_without_keys_everything_is_allowed() -> None:
    assert Keys.read(variable="").allow(None, "admin").name == "anyone"


def test_keys_of_the_environment_and_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"ops admin {OPS}\n")
    file.chmod(0o600)
    monkeypatch.setenv("RECSYS_API_KEYS", f"shop read {SHOP}; other events {SHOP}other")
    keys = Keys.read(str(file))
    assert len(keys) == 3
    assert keys.allow(f"Bearer {OPS}", "admin").name == "ops"
    assert keys.allow(f"Bearer {SHOP}other", "events").name == "other"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o622])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "keys"
    file.write_text(LINES)
    file.chmod(mode)
    with pytest.raises(InputError, match=f"chmod 600 {file}"):
        Keys.read(str(file), "")


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (f"shop {SHOP}", "line 1: 2 words; expected 3: name scopes secret"),
        (f"# hello\nshop read {SHOP} {OPS}", "line 2: 4 words"),
        (f"shop raed {SHOP}", "unknown scope; expected some of read,events,items,admin; did you"),
        (f"shop {SHOP} read", "line 1: unknown scope"),
        (f"{SHOP}! read {OPS}", "a name is up to 64 letters"),
        (f"{SHOP} shop read", "line 1: unknown scope"),
        ("shop read short", "at least 16 ASCII characters; make one with: openssl rand"),
        (f"shop read schlüssel-{SHOP}", "at least 16 ASCII characters"),
        ("shop read sha256:123", "expected 64 hexadecimal digits"),
        (f"shop read {SHOP}\nshop events {OPS}", "two keys are named 'shop'"),
        (f"shop read {SHOP}\nops events {SHOP}", "'shop' and 'ops' have one secret"),
    ],
)
def test_a_line_that_is_no_key(lines: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        Keys.read(variable=lines)
    assert part in str(caught.value)
    assert SHOP not in str(caught.value)
    assert OPS not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the keys: No such file"):
        Keys.read(str(tmp_path / "none"), "")
    file = tmp_path / "bytes"
    file.write_bytes(b"\xff\xfe\x00")
    file.chmod(0o600)
    with pytest.raises(InputError, match="not a text file"):
        Keys.read(str(file), "")


@pytest.mark.parametrize(
    "query",
    [b"key=%s", b"k=5&api_key=%s", b"API-KEY=%s", b"x-api-key=%s", b"token=%s", b"%%6bey=%s&k=1"],
)
def test_a_key_in_the_query_string_is_refused_and_not_repeated(keys: Keys, query: bytes) -> None:
    with pytest.raises(KeyInQuery, match="Authorization: Bearer") as caught:
        Guard(keys).allow(f"Bearer {SHOP}", query % SHOP.encode(), "read")
    assert caught.value.status == 400
    assert SHOP not in str(caught.value)


def test_other_queries_pass() -> None:
    refuse_key_in_query(b"k=5&keyboard=1&q=key&\xff=%ff&&=")


def test_a_key_over_its_rate_waits_as_long_as_it_is_told() -> None:
    now = 100.0
    limit = RateLimit(rate=0.5, burst=3, clock=lambda: now)
    for _ in range(3):
        limit.take("shop")
    with pytest.raises(RateLimited) as caught:
        limit.take("shop")
    assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "2"})
    limit.take("ops")
    now += 1.9
    with pytest.raises(RateLimited):
        limit.take("shop")
    now += 0.1
    limit.take("shop")


def test_a_pause_saves_up_no_more_than_the_burst() -> None:
    now = 0.0
    limit = RateLimit(rate=10, burst=5, clock=lambda: now)
    limit.take("shop")
    now += 1_000
    for _ in range(5):
        limit.take("shop")
    with pytest.raises(RateLimited):
        limit.take("shop")


def test_a_request_over_the_burst_is_paid_for_afterwards() -> None:
    now = 0.0
    limit = RateLimit(rate=10, burst=5, clock=lambda: now)
    limit.take("shop", cost=25)
    with pytest.raises(RateLimited) as caught:
        limit.take("shop")
    assert caught.value.headers == {"retry-after": "3"}
    now += 2.2
    limit.take("shop")


def test_the_rate_counts_only_who_is_let_in(keys: Keys) -> None:
    guard = Guard(keys, RateLimit(rate=1, burst=1, clock=lambda: 0.0))
    for _ in range(3):
        with pytest.raises(Unauthorised):
            guard.allow("Bearer nobody-knows-this-one", b"", "read")
    guard.allow(f"Bearer {SHOP}", b"", "read")
    with pytest.raises(RateLimited):
        guard.allow(f"Bearer {SHOP}", b"", "read")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(host, Keys({}))


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "10.0.0.1", "192.168.1.1", "fe80::1"])
def test_other_hosts_need_keys(keys: Keys, host: str) -> None:
    check_exposure(host, keys)
    with pytest.raises(InputError, match=r"no API keys: export RECSYS_API_KEYS=.*--host 127.0.0.1"):
        check_exposure(host, Keys({}))
