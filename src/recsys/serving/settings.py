"""What a person can set about a server, checked when it is set."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.schema import InputError
from recsys.serving.messages import MAX_HISTORY, MAX_K

LIMITS = {
    "port": (0, 65_535),
    "threads": (1, 256),
    "max_body_bytes": (1_024, 1 << 30),
    "max_k": (1, MAX_K),
    "max_history": (1, MAX_HISTORY),
    "drain_seconds": (0, 3_600),
}
"""Smallest and largest value of each number."""


@dataclass(frozen=True)
class ServeSettings:
    """How to serve one bundle.

    `bundle` is a name in the workspace, a path, or "latest". Port 0 takes any free one. `threads`
    answer requests beside the event loop, each computing on one core. Larger bodies, histories
    and `k` than the limits are refused. Requests in flight at SIGTERM have `drain_seconds` to end.

    >>> ServeSettings(port=70_000)
    Traceback (most recent call last):
    recsys.schema.InputError: port=70000 is out of range; expected 0 to 65535
    """

    bundle: str = "latest"
    host: str = "127.0.0.1"
    port: int = 8000
    threads: int = 2
    max_body_bytes: int = 1 << 20
    max_k: int = MAX_K
    max_history: int = MAX_HISTORY
    drain_seconds: int = 10

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name}={value} is out of range; expected {low} to {high}")
