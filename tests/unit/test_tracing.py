"""Spans: what they say of a request, when, and what they cost when nobody collects them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from recsys.schema import InputError
from recsys.serving.messages import Answer
from recsys.serving.tracing import Spans, spans

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the trace extra is not installed")

from opentelemetry.sdk.trace import ReadableSpan  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)

ANSWER = Answer(
    items=[],
    source="model",
    bundle="shop-7",
    timings_ms={"encode": 0.3, "search": 0.1},
    arm="challenger",
)
Recorded = Callable[..., list[ReadableSpan]]


@pytest.fixture
def recorded() -> Recorded:
    """Return a function that records one request and returns the spans, by their end."""
    exporter = InMemorySpanExporter()
    tracer = Spans(SimpleSpanProcessor(exporter))

    def record(*given: object, **options: object) -> list[ReadableSpan]:
        exporter.clear()
        tracer.record(*given, **options)  # type: ignore[arg-type]
        return list(exporter.get_finished_spans())

    return record


def test_a_request_and_its_stages(recorded: Recorded) -> None:
    encode, search, request = recorded("/v1/recommend", "ok", 1_000.0, 0.002, [ANSWER])
    assert (encode.name, search.name, request.name) == ("encode", "search", "/v1/recommend")
    assert request.attributes == {
        "http.route": "/v1/recommend",
        "recsys.outcome": "ok",
        "recsys.bundle": "shop-7",
        "recsys.arm": "challenger",
        "recsys.source": "model",
        "recsys.fallback": "none",
        "recsys.answers": 1,
    }
    end = 1_000_000_000_000
    assert (request.start_time, request.end_time) == (end - 2_000_000, end)
    assert (encode.start_time, encode.end_time) == (end - 400_000, end - 100_000)
    assert (search.start_time, search.end_time) == (end - 100_000, end)
    assert encode.parent == search.parent == request.context
    assert request.parent is None
    assert request.resource.attributes["service.name"] == "recsys"


def test_a_refused_request_has_no_stages(recorded: Recorded) -> None:
    (request,) = recorded("/v1/events", "overloaded", 1_000.0, 0.001)
    assert request.attributes == {"http.route": "/v1/events", "recsys.outcome": "overloaded"}


def test_a_request_is_part_of_its_callers_trace(recorded: Recorded) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    (request,) = recorded(
        *("/v1/events", "ok", 1_000.0, 0.001), traceparent=f"00-{trace}-{parent}-01"
    )
    assert f"{request.context.trace_id:032x}" == trace
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == parent
    (request,) = recorded("/v1/events", "ok", 1_000.0, 0.001, traceparent="nonsense")
    assert request.parent is None


def test_what_is_no_collector_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("localhost:4318", "grpc://localhost", "http://"):
        with pytest.raises(InputError, match="expected one such as http://localhost:4318"):
            spans(endpoint)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InputError, match=r"pip install 'recsys\[trace\]'"):
        spans("http://localhost:4318")


def test_without_a_collector_nothing_is_imported() -> None:
    code = "import sys; from recsys.serving.tracing import spans; spans(''); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "recsys.serving.tracing" in done.stdout
    assert "opentelemetry" not in done.stdout
