"""One OpenTelemetry span a request, with a child for each stage, where a collector is set.

Spans are made once the answer is given, from times that were taken anyway, and sent in the
background: a request waits for nothing, and without a collector nothing is imported. They name no
user and no item. What share is sent is OpenTelemetry's own setting, for example
`OTEL_TRACES_SAMPLER=parentbased_traceidratio OTEL_TRACES_SAMPLER_ARG=0.01`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from recsys.schema import InputError
from recsys.serving.messages import Answer, RankAnswer

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor

NANOSECONDS = 1_000_000_000


class Spans:
    """Writes what requests did to a span processor."""

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "recsys")
        self.provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        self.provider.add_span_processor(processor)
        self.tracer = self.provider.get_tracer("recsys.serving")
        self.propagator = TraceContextTextMapPropagator()

    def record(
        self,
        route: str,
        outcome: str,
        ended: float,
        seconds: float,
        answers: Sequence[Answer | RankAnswer] = (),
        traceparent: str | None = None,
    ) -> None:
        """Write one request that ended at `ended` (`time.time()`) and took `seconds`.

        `traceparent` is the header of the caller's own trace, which the request then is part of.
        Stages are drawn one after the other up to the end; what is before them was waiting,
        reading and checking.
        """
        end = int(ended * NANOSECONDS)
        span = self.tracer.start_span(
            route,
            context=self._callers(traceparent),
            start_time=end - int(seconds * NANOSECONDS),
            attributes=_described(route, outcome, answers),
        )
        if answers and span.is_recording():
            from opentelemetry.trace import set_span_in_context

            self._stages(answers[0].timings_ms, end, set_span_in_context(span))
        span.end(end)

    def _callers(self, traceparent: str | None) -> Context | None:
        return self.propagator.extract({"traceparent": traceparent}) if traceparent else None

    def _stages(self, timings_ms: Mapping[str, float], end: int, inside: Context) -> None:
        start = end - int(sum(timings_ms.values()) * 1e6)
        for stage, milliseconds in timings_ms.items():
            span = self.tracer.start_span(stage, context=inside, start_time=start)
            start += int(milliseconds * 1e6)
            span.end(start)

    def close(self) -> None:
        """Send what is left."""
        self.provider.shutdown()


def _described(
    route: str, outcome: str, answers: Sequence[Answer | RankAnswer]
) -> dict[str, str | int]:
    """Return a span's attributes; those of the answers are of the first."""
    about: dict[str, str | int] = {"http.route": route, "recsys.outcome": outcome}
    if answers:
        first = answers[0]
        about |= {
            "recsys.bundle": first.bundle,
            "recsys.arm": first.arm,
            "recsys.source": first.source,
            "recsys.fallback": first.fallback or "none",
            "recsys.answers": len(answers),
        }
    return about


def spans(endpoint: str) -> Spans | None:
    """Return where spans go: a collector's OTLP/HTTP address, or nowhere without one.

    Raises InputError for what is no address, and where OpenTelemetry is not installed.

    >>> spans("") is None
    True
    """
    if not endpoint:
        return None
    url = _traces_url(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InputError(
            "traces need OpenTelemetry, which is not installed: pip install 'recsys[trace]'"
        ) from error
    return Spans(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))


def _traces_url(endpoint: str) -> str:
    """Return where a collector takes traces.

    >>> _traces_url("http://localhost:4318")
    'http://localhost:4318/v1/traces'
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"otlp={endpoint!r} is no address; expected one such as http://localhost:4318"
        )
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
