"""The OpenAPI description, made from the message Structs, and the page that shows it."""

from __future__ import annotations

import json
from inspect import cleandoc
from pathlib import Path
from typing import Any

import msgspec

from recsys import __version__
from recsys.serving import messages
from recsys.serving.admin import ADMIN
from recsys.serving.explain_messages import ExplainAnswer, ExplainRequest
from recsys.serving.item_messages import (
    MAX_LISTED,
    ItemAdded,
    ItemRemoved,
    ItemsAnswer,
    NewItem,
    PrunedAnswer,
)
from recsys.serving.messages import (
    AnswerBatch,
    ErasedAnswer,
    ErrorAnswer,
    Event,
    EventsAnswer,
    ItemAnswer,
    RankAnswer,
    RankRequest,
    RecommendBatch,
    RecommendRequest,
    SimilarAnswer,
    Status,
    UserAnswer,
)

Json = dict[str, Any]
REFUSED = {
    400: "The body is not JSON, or a key is in the query string",
    401: "No API key, or one that is not known",
    403: "The key may not do this",
    404: "No such item or path, or a server that keeps no users' paths",
    408: "The body did not come in time",
    409: "This event_id came before, with other content",
    413: "The body is larger than the server takes",
    422: "A field is missing, misspelt, or out of its range",
    429: "Too many requests wait, or this key asks too often; see Retry-After",
    503: "The store of users' paths and of items is not available; nothing was kept",
}
ALWAYS = (400, 401, 403, 429)
"""What any route may answer that is not open to all."""
_STRUCTS = (
    RecommendRequest,
    messages.Answer,
    RecommendBatch,
    AnswerBatch,
    RankRequest,
    RankAnswer,
    ExplainRequest,
    ExplainAnswer,
    SimilarAnswer,
    ItemAnswer,
    Event,
    EventsAnswer,
    UserAnswer,
    ErasedAnswer,
    NewItem,
    ItemAdded,
    ItemRemoved,
    ItemsAnswer,
    PrunedAnswer,
    *dict.fromkeys(struct for route in ADMIN for struct in (route.answer, route.body) if struct),
    Status,
    ErrorAnswer,
)
EVENT = {"user_id": "u1", "item_id": "i7", "event_type": "cart", "event_id": "e1"}
_K = {
    "name": "k",
    "in": "query",
    "required": False,
    "description": "How many items to answer with",
    "schema": {"type": "integer", "minimum": 1, "maximum": messages.MAX_K, "default": 10},
}
_PAGE = [
    {
        "name": name,
        "in": "query",
        "required": False,
        "description": about,
        "schema": {"type": "integer", "minimum": least, "default": default, **more},
    }
    for name, about, least, default, more in (
        ("after", "Changes with larger numbers only", 0, 0, {}),
        ("limit", "How many at most", 1, 1_000, {"maximum": MAX_LISTED}),
    )
]
NEW = {"item_id": "i99", "like": ["i7", "i9"], "features": {"title": "A new one"}}
EXAMPLE = {
    "history": ["i1", {"item_id": "i2", "event_type": "cart", "timestamp": "2025-03-01T12:30:00Z"}],
    "k": 5,
}
RANKED = {"items": ["i9", "i10", "i11"], "user_id": "u1", "history": ["i12"]}


EXPLAINED = {"items": ["i9", "i10"], "user_id": "u1", "history": ["i12", "i2"], "reasons": 2}


def document() -> Json:
    """Return the OpenAPI 3.0 description of every route.

    >>> sorted(document()["paths"])[-1]
    '/v1/users/{user_id}'
    """
    _, schemas = msgspec.json.schema_components(
        _STRUCTS, ref_template="#/components/schemas/{name}"
    )
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "recsys",
            "version": __version__,
            "description": "Recommendations that follow people's paths, from exported bundles.",
        },
        "paths": _paths(),
        "components": {"schemas": {name: _plain(schema) for name, schema in schemas.items()}},
    }


def _paths() -> Json:
    ask, batch = _body(RecommendRequest, EXAMPLE), _body(RecommendBatch, {"requests": [EXAMPLE]})
    ranked, why = _body(RankRequest, RANKED), _body(ExplainRequest, EXPLAINED)
    item, user = [_tail("item_id")], [_tail("user_id")]
    kept = _operation("What is kept of a person", UserAnswer, 404, 503, parameters=user)
    erased = _operation("Forget a person", ErasedAnswer, 404, 503, parameters=user)
    similar = _operation("Items like one item", SimilarAnswer, 404, 422, parameters=[*item, _K])
    known = _operation("What is known about an item", ItemAnswer, 404, parameters=item)
    added = _posted("Add an item", ItemAdded, _body(NewItem, NEW), 404, 503)
    removed = _operation("Remove an item", ItemRemoved, 404, 503, parameters=item)
    changes = _operation("Added and removed items", ItemsAnswer, 404, 422, 503, parameters=_PAGE)
    pruned = _operation("Forget changes of items that mean nothing now", PrunedAnswer, 404, 503)
    return {
        "/v1/recommend": {"post": _posted("Recommend items", messages.Answer, ask)},
        "/v1/recommend/batch": {"post": _posted("Recommend to several", AnswerBatch, batch)},
        "/v1/rank": {"post": _posted("Rank your own items", RankAnswer, ranked)},
        "/v1/explain": {"post": _posted("Why items score as they do", ExplainAnswer, why)},
        "/v1/similar/{item_id}": {"get": similar},
        "/v1/items/{item_id}": {"get": known, "delete": removed},
        "/v1/items": {"get": changes, "post": added},
        "/v1/events": {"post": _posted("Events happened", EventsAnswer, _events(), 404, 409, 503)},
        "/v1/users/{user_id}": {"get": kept, "delete": erased},
        **_admin(),
        "/admin/items/prune": {"post": pruned},
        "/metrics": {"get": _metrics()},
        "/healthz": {"get": _open("Whether the process lives")},
        "/readyz": {"get": _open("Whether it takes requests", 503)},
    }


def _admin() -> Json:
    paths: Json = {}
    for route in ADMIN:
        body = _body(route.body, route.example or {}) if route.body else None
        refused = (408, 413, 422) if body else (422,)
        operation = _operation(route.summary, route.answer, *refused, body=body)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return paths


def _events() -> Json:
    one = {"$ref": "#/components/schemas/Event"}
    many = {"type": "array", "items": one, "maxItems": messages.MAX_EVENTS}
    schema = {"anyOf": [one, many]}
    return {"required": True, "content": {"application/json": {"schema": schema, "example": EVENT}}}


def _tail(name: str) -> Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": "The id, percent-encoded where it has other than letters and digits",
        "schema": {"type": "string", "minLength": 1},
    }


def _posted(summary: str, answer: type, body: Json, *refused: int) -> Json:
    return _operation(summary, answer, 408, 413, 422, *refused, body=body)


def _open(summary: str, *refused: int) -> Json:
    responses = {str(status): _response("Not now", Status) for status in refused}
    return {"summary": summary, "responses": {"200": _response("Yes", Status), **responses}}


def _operation(
    summary: str,
    answer: type,
    *refused: int,
    body: Json | None = None,
    parameters: list[Json] | None = None,
) -> Json:
    responses = {"200": _response("The answer", answer)}
    for status in sorted({*refused, *ALWAYS}):
        responses[str(status)] = _response(REFUSED[status], ErrorAnswer)
    operation: Json = {"summary": summary, "responses": responses}
    operation |= {"requestBody": body} if body else {}
    return operation | ({"parameters": parameters} if parameters else {})


def _metrics() -> Json:
    text = {"text/plain": {"schema": {"type": "string"}}}
    described = {"description": "Counters and histograms", "content": text}
    return {"summary": "Metrics in Prometheus' text format", "responses": {"200": described}}


def _body(struct: type, example: Json) -> Json:
    return {"required": True, "content": _content(struct, {"example": example})}


def _response(description: str, struct: type) -> Json:
    return {"description": description, "content": _content(struct, {})}


def _content(struct: type, more: Json) -> Json:
    reference = {"$ref": f"#/components/schemas/{struct.__name__}"}
    return {"application/json": {"schema": reference, **more}}


def _plain(schema: Any) -> Any:
    """Return a schema in OpenAPI 3.0's words, which know no null type and no `propertyNames`.

    An empty list of required fields is left out too, and docstrings lose their indentation.
    """
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        name: _plain(part)
        for name, part in schema.items()
        if not (name == "default" and part is None) and not (name == "required" and not part)
    }
    kept.pop("propertyNames", None)
    if "exclusiveMinimum" in kept:
        kept |= {"minimum": kept["exclusiveMinimum"], "exclusiveMinimum": True}
    if "description" in kept:
        kept["description"] = cleandoc(kept["description"])
    given = kept.pop("anyOf", ())
    choices = [part for part in given if part != {"type": "null"}]
    if len(choices) < len(given):
        kept["nullable"] = True
    if len(choices) == 1 and "$ref" not in choices[0]:
        return choices[0] | kept
    return kept | ({"anyOf": choices} if choices else {})


def text() -> str:
    """Return the description as the file `serving/openapi.json` holds it."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


def assets() -> Path:
    """Return the directory of Swagger UI's files."""
    from swagger_ui_bundle import swagger_ui_path

    return Path(swagger_ui_path)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>recsys API</title>
<link rel="stylesheet" href="docs/assets/swagger-ui.css">
<link rel="icon" href="docs/assets/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/assets/swagger-ui-bundle.js"></script>
<script>
SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true});
</script>
</body>
</html>
"""


if __name__ == "__main__":
    print(text(), end="")
