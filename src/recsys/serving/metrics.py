"""Prometheus metrics of one server: requests by route and outcome, time by stage, the bundle."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from recsys.serving.messages import Answer

CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Upper bounds in seconds: a stage takes fractions of a millisecond."""


class Metrics:
    """The numbers of one server; each has a registry of its own, so that two do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "recsys_requests",
            "Requests by route and outcome: ok, or the code of the error",
            ["route", "outcome"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "recsys_request_seconds",
            "Time from request to answer by route",
            ["route"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "recsys_stage_seconds",
            "Time of each stage of an answer (of a batch: of all its answers)",
            ["stage"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.answers = Counter(
            "recsys_answers", "Answers by source", ["source"], registry=self.registry
        )
        self.bundle = Gauge(
            "recsys_bundle", "1 for the bundle in use", ["version", "model"], registry=self.registry
        )

    def serving(self, version: str, model: str) -> None:
        """Name the bundle that answers from now on."""
        self.bundle.clear()
        self.bundle.labels(version, model).set(1)

    def answered(self, answers: Sequence[Answer]) -> None:
        """Count the answers of one call of the engine, and the time of its stages once."""
        for answer in answers:
            self.answers.labels(answer.source).inc()
        for stage, milliseconds in answers[0].timings_ms.items():
            self.stages.labels(stage).observe(milliseconds / 1000)

    def requested(self, route: str, outcome: str, seconds: float) -> None:
        """Count one request."""
        self.requests.labels(route, outcome).inc()
        self.seconds.labels(route).observe(seconds)

    def rendered(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
