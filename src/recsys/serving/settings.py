"""What a person can set about a server, checked when it is set."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from recsys.schema import InputError, suggestion

MAX_K = 1_000
MAX_HISTORY = 100_000
LIMITS = {
    "port": (0, 65_535),
    "workers": (1, 256),
    "threads": (1, 256),
    "queue": (1, 100_000),
    "queue_ms": (1, 60_000),
    "deadline_ms": (1, 60_000),
    "max_body_bytes": (1_024, 1 << 30),
    "explore": (0, 1),
    "max_k": (1, MAX_K),
    "max_history": (1, MAX_HISTORY),
    "max_connections": (1, 1_000_000),
    "head_seconds": (1, 600),
    "body_seconds": (1, 3_600),
    "max_events": (1, 10_000),
    "keep_days": (1, 36_500),
    "rotate_seconds": (1, 86_400),
    "rate": (0, 1_000_000),
    "burst": (1, 1_000_000),
    "grace_seconds": (0, 600),
    "drain_seconds": (0, 3_600),
    "watch_seconds": (1, 86_400),
}
"""Smallest and largest value of each number."""
DEVICES = ("cpu", "cuda", "tensorrt")
ALIAS = re.compile(r"models:/[^/@]+@[^/@]+")


def _set(default: Any, about: str) -> Any:
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class ServeSettings:
    """How to serve; each field is a flag of `recsys serve`, with its text.

    >>> ServeSettings(port=70_000)
    Traceback (most recent call last):
    recsys.schema.InputError: port=70000 is out of range; expected 0 to 65535
    """

    bundle: str = _set("latest", "name, path, or models:/shop@champion")
    host: str = _set("127.0.0.1", "address to listen on; beyond this machine only with API keys")
    port: int = _set(8000, "0 takes any free one")
    workers: int = _set(1, "processes that answer, each loading the bundle")
    threads: int = _set(2, "of each worker, beside its event loop, each computing on one core")
    device: str = _set("cpu", "that the graphs run on: cpu, cuda or tensorrt")
    queue: int = _set(16, "requests that may wait in a worker; further ones get 429")
    queue_ms: int = _set(50, "and so long, by how long answers take of late; past it 429")
    deadline_ms: int = _set(1_000, "an answer that takes longer is the popular items instead")
    explore: float = _set(0.0, "share of places, 0 to 1, given to items drawn from further down")
    max_body_bytes: int = _set(1 << 20, "larger bodies are refused (413)")
    max_k: int = _set(MAX_K, "largest k")
    max_history: int = _set(MAX_HISTORY, "longest history in a request")
    max_connections: int = _set(10_000, "open connections of a worker")
    head_seconds: int = _set(10, "a request's head must be whole after so long")
    body_seconds: int = _set(30, "and its body after so long")
    state: str = _set("", "where paths are kept: a folder or redis://HOST; default: the workspace")
    state_sync: bool = _set(
        True, "an acknowledged event survives the machine, not the process alone"
    )
    max_events: int = _set(200, "newest events kept of each user")
    keep_days: int = _set(400, "events older than this are refused and forgotten")
    rotate_seconds: int = _set(60, "how often the log's Parquet files are closed")
    kafka: str = _set("", "brokers to send events and answers to as well, HOST:PORT,…")
    keys: str = _set("", "file of API keys, one `name scopes secret` a line")
    rate: int = _set(0, "requests a second that each key may make; 0: any number")
    burst: int = _set(100, "requests that a key may make at once")
    tls_cert: str = _set("", "certificate chain (PEM); with --tls-key, HTTPS")
    tls_key: str = _set("", "its private key (PEM)")
    grace_seconds: int = _set(2, "after SIGTERM unready for so long, still taking requests")
    drain_seconds: int = _set(10, "then requests in flight have so long to end")
    watch: str = _set("", "follow an MLflow alias: models:/shop@champion")
    watch_seconds: int = _set(30, "how often to look at it")
    otlp: str = _set("", "send OpenTelemetry traces to this endpoint, http://HOST:4318")

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name}={value} is out of range; expected {low} to {high}")
        if self.device not in DEVICES:
            raise InputError(
                f"device={self.device!r} is unknown; expected one of {', '.join(DEVICES)}"
                + suggestion(self.device, DEVICES)
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise InputError("tls_cert and tls_key go together: give both, or neither")
        if self.watch and not ALIAS.fullmatch(self.watch):
            raise InputError(
                f"watch={self.watch!r} is no MLflow alias; expected models:/NAME@ALIAS, such as "
                "models:/shop@champion"
            )

    @property
    def far_state(self) -> bool:
        """Whether paths are kept by another process, so that to read one is to wait."""
        return "://" in self.state


def flags(settings: type = ServeSettings) -> list[tuple[str, dict[str, Any]]]:
    """Return each setting as a command's flag: name, and what argparse needs to know.

    >>> dict(flags())["--port"]["help"]
    '0 takes any free one (default 8000)'
    """
    return [("--" + f.name.replace("_", "-"), _argument(f)) for f in fields(settings)]


def _argument(setting: Any) -> dict[str, Any]:
    import argparse

    default, about = setting.default, setting.metadata["about"]
    shown = f"{about} (default {default})" if isinstance(default, int | str) and default else about
    if default is None:
        return {"action": argparse.BooleanOptionalAction, "default": None, "help": about}
    if isinstance(default, bool):
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": None}
        return {**kind, "help": f"{about} (default {'on' if default else 'off'})"}
    return {"type": type(default), "default": None, "help": shown, "metavar": _word(setting)}


def _word(setting: Any) -> str:
    return "N" if isinstance(setting.default, int | float) else "TEXT"
