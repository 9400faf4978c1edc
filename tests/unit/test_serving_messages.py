"""Requests: what is taken, what is refused, and that a refusal names what to mend."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from recsys.schema import EVENT_TYPES, InputError
from recsys.serving import openapi
from recsys.serving.messages import (
    EventType,
    HistoryEvent,
    MalformedJSON,
    RecommendBatch,
    RecommendRequest,
    SimilarQuery,
    converted,
    decoded,
    milliseconds,
)
from recsys.serving.settings import ServeSettings

REQUEST = msgspec.json.Decoder(RecommendRequest)
BATCH = msgspec.json.Decoder(RecommendBatch)

WRONG = {
    '{"k": 0}': "k: expected int >= 1",
    '{"k": 1000000000}': "k: expected int <= 1000",
    '{"k": 99999999999999999999999999}': "k: expected int <= 1000",
    '{"k": "ten"}': "k: expected int, got str",
    '{"k": true}': "k: expected int, got bool",
    '{"k": 2.5}': "k: expected int, got float",
    '{"exclud_seen": true}': "unknown field 'exclud_seen'; did you mean 'exclude_seen'?",
    '{"zzzzzz": 1}': "unknown field 'zzzzzz'; expected one of user_id, history, k",
    '{"history": [{"item": "a"}]}': "history[0]: unknown field 'item'; did you mean 'item_id'?",
    '{"history": [{"event_type": "view"}]}': "history[0]: object missing required field item_id",
    '{"history": ["a", {"item_id": "b", "event_type": "vew"}]}': (
        "history[1].event_type: unknown event type 'vew'; did you mean 'view'?"
    ),
    '{"history": [{"item_id": "b", "timestamp": "soon"}]}': "history[0]: 'soon' is not a moment",
    '{"history": [{"item_id": "b", "timestamp": -1}]}': "history[0]: -1 is not a moment",
    '{"history": [{"item_id": "b", "timestamp": 1e300}]}': "history[0]: 1e+300 is not a moment",
    '{"history": [{"item_id": "b", "timestamp": 1e999}]}': "history[0].timestamp: number out of",
    '{"history": [7]}': "history[0]: expected str | object, got int",
    '{"history": "a"}': "history: expected array | null, got str",
    '{"user_id": ""}': "user_id: expected str of length >= 1",
    '{"now": "yesterday"}': "'yesterday' is not a moment",
    '{"weights": {"recency": 1.5}}': "weights.recency: expected float <= 1.0",
    '{"weights": {"recency": -1}}': "weights.recency: expected float >= 0.0",
    '{"weights": {"recensy": 1}}': "weights: unknown field 'recensy'; did you mean 'recency'?",
    '{"weights": 0.8}': "weights: expected object, got",
    "[]": "expected object, got array",
    "null": "expected object, got null",
}
NOT_JSON = ("", "  ", "{", "{'k': 1}", '{"k": NaN}', '{"history": ["\\ud800"]}', "{" * 10_000)


@pytest.mark.parametrize(("body", "message"), WRONG.items())
def test_a_wrong_request_says_where_and_what(body: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        decoded(REQUEST, body.encode())
    assert message in str(error.value)
    assert not isinstance(error.value, MalformedJSON)


@pytest.mark.parametrize("body", [*(text.encode() for text in NOT_JSON), b'{"user_id": "\xff"}'])
def test_what_is_not_json_is_called_so(body: bytes) -> None:
    with pytest.raises(MalformedJSON, match=r"expected an object such as"):
        decoded(REQUEST, body)


def test_a_batch_names_the_request_that_is_wrong() -> None:
    with pytest.raises(
        InputError, match=r"requests\[1\]: unknown field 'users'; did you mean 'user_id'"
    ):
        decoded(BATCH, b'{"requests": [{"k": 1}, {"users": 2}]}')
    with pytest.raises(InputError, match=r"requests\[0\].weights: .* did you mean 'recency'"):
        decoded(BATCH, b'{"requests": [{"weights": {"recent": 1}}]}')
    with pytest.raises(InputError, match=r"unknown field 'request'; did you mean 'requests'"):
        decoded(BATCH, b'{"request": []}')
    with pytest.raises(InputError, match="length >= 1"):
        decoded(BATCH, b'{"requests": []}')


def test_defaults_and_both_kinds_of_history() -> None:
    asked = decoded(REQUEST, '{"history": ["名前", {"item_id": "🎧"}]}'.encode())
    assert asked == RecommendRequest(history=["名前", HistoryEvent("🎧", "view", None)])
    assert (asked.k, asked.exclude_seen, asked.user_id) == (10, True, None)
    assert decoded(REQUEST, msgspec.json.encode(asked)) == asked


@pytest.mark.parametrize(
    "moment",
    [
        1_700_000_000,
        1_700_000_000.0,
        1_700_000_000_000,
        "2023-11-14T22:13:20Z",
        "2023-11-14T22:13:20",
        "2023-11-14 23:13:20+01:00",
    ],
)
def test_moments_in_seconds_milliseconds_and_iso_are_the_same(moment: float | str) -> None:
    assert milliseconds(moment) == 1_700_000_000_000


@pytest.mark.parametrize("moment", ["", "12", "2023-13-01", 10**18, float("nan"), float("inf")])
def test_nonsense_moments_are_refused(moment: float | str) -> None:
    with pytest.raises(InputError, match="is not a moment"):
        milliseconds(moment)


def test_query_strings_are_checked_like_bodies() -> None:
    assert converted({"k": "5"}, SimilarQuery).k == 5
    with pytest.raises(InputError, match="k: expected int >= 1"):
        converted({"k": "0"}, SimilarQuery)
    with pytest.raises(InputError, match="unknown field 'K'"):
        converted({"K": "5"}, SimilarQuery)


def test_event_types_are_those_of_the_schema() -> None:
    assert get_args(EventType) == EVENT_TYPES


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"threads=0 is out of range; expected 1 to 256"):
        ServeSettings(threads=0)


def test_every_reference_of_the_description_resolves() -> None:
    description = openapi.document()
    names = set(description["components"]["schemas"])
    assert {"RecommendRequest", "HistoryEvent", "Answer", "Recommended", "Ignored"} <= names
    assert references(description) <= {f"#/components/schemas/{name}" for name in names}
    # OpenAPI 3.0 knows neither.
    assert '"null"' not in openapi.text()
    assert '"required": []' not in openapi.text()


def references(part: object) -> set[str]:
    if isinstance(part, dict):
        here = {part["$ref"]} if "$ref" in part else set()
        return here.union(*map(references, part.values()))
    return set().union(*map(references, part)) if isinstance(part, list) else set()
