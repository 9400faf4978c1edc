"""The OpenAPI description, made from the message Structs, and the page that shows it."""

from __future__ import annotations

import json
from inspect import cleandoc
from pathlib import Path
from typing import Any

import msgspec

from recsys import __version__
from recsys.serving import messages
from recsys.serving.messages import (
    AnswerBatch,
    ErrorAnswer,
    ItemAnswer,
    RecommendBatch,
    RecommendRequest,
    SimilarAnswer,
    Status,
)

Json = dict[str, Any]
REFUSED = {
    400: "The body is not JSON",
    404: "No such item or path",
    413: "The body is larger than the server takes",
    422: "A field is missing, misspelt, or out of its range",
}
_STRUCTS = (
    RecommendRequest,
    messages.Answer,
    RecommendBatch,
    AnswerBatch,
    SimilarAnswer,
    ItemAnswer,
    Status,
    ErrorAnswer,
)
_ITEM_ID = {
    "name": "item_id",
    "in": "path",
    "required": True,
    "description": "The id, percent-encoded where it has other than letters and digits",
    "schema": {"type": "string", "minLength": 1},
}
_K = {
    "name": "k",
    "in": "query",
    "required": False,
    "description": "How many items to answer with",
    "schema": {"type": "integer", "minimum": 1, "maximum": messages.MAX_K, "default": 10},
}
EXAMPLE = {
    "history": ["i1", {"item_id": "i2", "event_type": "cart", "timestamp": "2025-03-01T12:30:00Z"}],
    "k": 5,
}


def document() -> Json:
    """Return the OpenAPI 3.0 description of every route.

    >>> sorted(document()["paths"])[-1]
    '/v1/similar/{item_id}'
    """
    _, schemas = msgspec.json.schema_components(
        _STRUCTS, ref_template="#/components/schemas/{name}"
    )
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "recsys",
            "version": __version__,
            "description": "Recommendations from one exported bundle.",
        },
        "paths": _paths(),
        "components": {"schemas": {name: _plain(schema) for name, schema in schemas.items()}},
    }


def _paths() -> Json:
    ask, batch = _body(RecommendRequest, EXAMPLE), _body(RecommendBatch, {"requests": [EXAMPLE]})
    item, similar = [_ITEM_ID], [_ITEM_ID, _K]
    return {
        "/v1/recommend": {
            "post": _operation("Recommend items", messages.Answer, 400, 413, 422, body=ask)
        },
        "/v1/recommend/batch": {
            "post": _operation("Recommend to several", AnswerBatch, 400, 413, 422, body=batch)
        },
        "/v1/similar/{item_id}": {
            "get": _operation("Items like one item", SimilarAnswer, 404, 422, parameters=similar)
        },
        "/v1/items/{item_id}": {
            "get": _operation("What is known about an item", ItemAnswer, 404, parameters=item)
        },
        "/healthz": {"get": _operation("Whether the process lives", Status)},
        "/readyz": {"get": _operation("Whether it takes requests", Status, 503)},
        "/metrics": {"get": _metrics()},
    }


def _operation(
    summary: str,
    answer: type,
    *refused: int,
    body: Json | None = None,
    parameters: list[Json] | None = None,
) -> Json:
    responses = {"200": _response("The answer", answer)}
    for status in refused:
        described = (REFUSED[status], ErrorAnswer) if status in REFUSED else ("Not now", answer)
        responses[str(status)] = _response(*described)
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
    """Return a schema in OpenAPI 3.0's words: no null type; an optional field may be absent.

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
    if "description" in kept:
        kept["description"] = cleandoc(kept["description"])
    choices = [part for part in kept.pop("anyOf", ()) if part != {"type": "null"}]
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
