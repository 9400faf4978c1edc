"""Prometheus metrics of one server: requests, stages, answers, events, state, log and trial.

Where several workers share `PROMETHEUS_MULTIPROC_DIR`, each scrape shows all of them together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from recsys.serving.messages import Answer, EventsAnswer, RankAnswer

CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Upper bounds in seconds: a stage takes fractions of a millisecond."""
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """The numbers of one worker; each has a registry of its own, so that two do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.together = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        if not self.together:
            ProcessCollector(registry=self.registry)
        count, gauge, spread = self._counter, self._gauge, self._histogram
        about = "Requests by route and outcome: ok, or the code of the error"
        self.requests = count("requests", about, "route", "outcome")
        self.seconds = spread("request_seconds", "Time from request to answer", BUCKETS, "route")
        about = "Time of each stage of an answer (of a batch: of all its answers)"
        self.stages = spread("stage_seconds", about, BUCKETS, "stage")
        self.answers = count("answers", "Answers by source and arm", "source", "arm")
        self.fallbacks = count("fallbacks", "Answers without the model, or its ranker", "reason")
        self.events = count("events", "Posted events by what became of them", "outcome")
        self.state_errors = count("state_errors", "Calls of the user state that failed")
        self.swaps = count("swaps", "Changes of bundle: ok, or failed", "outcome")
        self.clicks = count("trial_clicks", "Events that name an answer, by its arm", "arm")
        about = "Share of the champion's answer that the challenger's has too"
        self.overlap = spread("shadow_overlap", about, SHARES)
        self.dropped = count("log_dropped", "Answers that the log could not take")
        self.log_failures = count("log_failures", "Steps of the log that failed, to be repeated")
        self.log_torn = count("log_torn", "Journals of answers with a damaged end")
        about = "Connections and requests refused before they reached a route"
        self.refused = count("connections_refused", about, "reason")
        self.outbox = gauge("outbox_events", "Accepted events that wait for the log", "livemax")
        about = "Items beside the champion's index: added since it was made"
        self.items_added = gauge("items_added", about, "livemax")
        about = "Items of the champion's that were removed since it was made"
        self.items_removed = gauge("items_removed", about, "livemax")
        self.in_flight = gauge("in_flight", "Requests being answered", "livesum")
        about = "Workers that answer with this bundle"
        self.bundle = gauge("bundle", about, "livesum", "version", "model", "arm")
        self.followed: dict[Counter, int] = {}
        for outcome in ("ok", "failed", "returned"):
            self.swaps.labels(outcome).inc(0)
        self.named: set[tuple[str, str, str]] = set()
        self._fast: dict[Any, Any] = {}

    def serving(self, bundles: Sequence[tuple[str, str, str]]) -> None:
        """Name the bundles that answer from now on: version, model and arm of each."""
        for gone in self.named - set(bundles):
            self.bundle.labels(*gone).set(0)
        for one in bundles:
            self.bundle.labels(*one).set(1)
        self.named |= set(bundles)

    def answered(self, answers: Sequence[Answer | RankAnswer]) -> None:
        """Count the answers of one request, and the time of their stages once."""
        for answer in answers:
            self._child(self.answers, answer.source, answer.arm).inc()
            if answer.fallback:
                self._child(self.fallbacks, answer.fallback).inc()
        for stage, milliseconds in answers[0].timings_ms.items():
            self._child(self.stages, stage).observe(milliseconds / 1000)

    def took(self, answer: EventsAnswer) -> None:
        """Count posted events."""
        counts = {"accepted": answer.accepted, "repeated": answer.repeated}
        for outcome, number in {**counts, "refused": len(answer.refused)}.items():
            self._child(self.events, outcome).inc(number)

    def turned_away(self, route: str) -> None:
        """Count one request that was refused at the door, in as little time as that takes."""
        self._child(self.requests, route, "overloaded").inc()

    def follow(self, counter: Counter, count: int) -> None:
        """Take over a count that is kept elsewhere."""
        counter.inc(count - self.followed.get(counter, 0))
        self.followed[counter] = count

    def requested(self, route: str, outcome: str, seconds: float) -> None:
        """Count one request."""
        self._child(self.requests, route, outcome).inc()
        self._child(self.seconds, route).observe(seconds)

    def rendered(self) -> bytes:
        """Return everything in Prometheus' text format."""
        if not self.together:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)

    def _child(self, metric: Any, *labels: str) -> Any:
        """Return a labelled metric; a plain dict is faster than prometheus_client's lookup."""
        key = (metric, *labels)
        child = self._fast.get(key)
        if child is None:
            child = self._fast[key] = metric.labels(*labels)
        return child

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"recsys_{name}", about, labels, registry=self.registry)

    def _gauge(self, name: str, about: str, together: Any, *labels: str) -> Gauge:
        options: dict[str, Any] = {"registry": self.registry, "multiprocess_mode": together}
        return Gauge(f"recsys_{name}", about, labels, **options)

    def _histogram(
        self, name: str, about: str, buckets: Sequence[float], *labels: str
    ) -> Histogram:
        return Histogram(f"recsys_{name}", about, labels, buckets=buckets, registry=self.registry)
