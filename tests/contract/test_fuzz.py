"""Bodies, ids and queries that nobody thought of: never a 5xx, and only what is described.

Schemathesis makes them from the OpenAPI description, fitting ones and others.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from schemathesis.specs.openapi.schemas import OpenApiSchema

from recsys.artifacts import Workspace
from recsys.schema import InputError
from recsys.serving import openapi
from recsys.serving.admin import ChallengeRequest
from recsys.serving.app import App
from recsys.serving.deployment import Deployer, Record
from recsys.serving.log import AnswerJournal
from recsys.serving.messages import Event, RecommendRequest, decoded
from recsys.serving.service import Service
from recsys.serving.settings import ServeSettings
from recsys.serving.state import open_state
from tiny_bundles import write_tiny_bundle

PATHS = openapi.document()["paths"]
OPERATIONS = [(method, path) for path, methods in PATHS.items() for method in methods]
FIT, UNFIT = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
BEYOND_SCHEMA = ("now", "timestamp", "weights", "context")
"""Fields where most of what fits the description is refused: moments, and what a model lacks."""


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenApiSchema]:
    """The application's own description, with paths, without keys, and the examples' bundle."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    bundles = [write_tiny_bundle(workspace.folder("bundle") / f"trajectory-{n}") for n in (1, 2, 3)]
    Record(workspace.root).begin(bundles[0])
    with contextlib.ExitStack() as stack:
        deployer = Deployer(workspace.root)
        stack.callback(deployer.close)
        address = f"lmdb:{workspace.root / 'state'}"
        state = open_state(address, max_events=50, keep_ms=0, sync=False)
        stack.callback(state.close)
        journal = AnswerJournal(workspace.root / "log")
        stack.callback(journal.close)
        service = Service(
            deployer,
            ServeSettings(deadline_ms=60_000),
            state=state,
            journal=journal,
            log_dir=workspace.root / "log",
            find=lambda name: workspace.find("bundle", name),
        )
        stack.callback(service.close)
        yield schemathesis.openapi.from_asgi("/openapi.json", App(service))


def made(schema: OpenApiSchema, method: str, path: str) -> dict[str, SearchStrategy[Case]]:
    """Return ways to make requests of one operation."""
    operation = schema[path][method]
    described = PATHS[path][method]
    ways = {"fitting": operation.as_strategy(FIT)}
    if "requestBody" in described:
        example = described["requestBody"]["content"]["application/json"]["example"]
        if path == "/admin/challenger":  # the example's bundle may be the champion by now
            example = {**example, "bundle": "trajectory-3"}
        ways["the example"] = operation.as_strategy(FIT, body=example)
        ways["tame"] = operation.as_strategy(FIT).map(tamed)
    if "{item_id}" in path:
        ways["known"] = operation.as_strategy(FIT, path_parameters={"item_id": "i9"})
    if "requestBody" in described or list(operation.query):
        ways["unfitting"] = operation.as_strategy(UNFIT)
    return ways


def tamed(case: Case) -> Case:
    case.body = without(case.body, BEYOND_SCHEMA)
    return case


def without(value: Any, names: tuple[str, ...]) -> Any:
    """Return a JSON value without the fields of some names."""
    if isinstance(value, dict):
        return {key: without(part, names) for key, part in value.items() if key not in names}
    return [without(part, names) for part in value] if isinstance(value, list) else value


def fuzz(schema: OpenApiSchema, method: str, path: str, cases: int) -> Counter[int]:
    """Send up to `cases` of each way, and check the answers; return how many met each status."""
    met: Counter[int] = Counter()
    for way, strategy in made(schema, method, path).items():
        met += sent(strategy, 1 if way == "the example" else cases)
    return met


def sent(strategy: SearchStrategy[Case], cases: int) -> Counter[int]:
    met: Counter[int] = Counter()

    @settings(
        max_examples=cases,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def send(case: Case) -> None:
        response = case.call()
        met[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    send()
    return met


def name(operation: tuple[str, str]) -> str:
    return " ".join(operation)


@pytest.mark.parametrize("operation", OPERATIONS, ids=name)
def test_a_few_requests_of_each_kind(schema: OpenApiSchema, operation: tuple[str, str]) -> None:
    met = fuzz(schema, *operation, cases=18)
    if operation[1] != "/admin/challenger/promote":
        assert met[200] > 0


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (list[Event], b'[{"usr_id": "u"}]', "[0]: unknown field 'usr_id'; did you mean 'user_id'?"),
        (RecommendRequest, b'{"boosts": {"itms": {}}}', "boosts: unknown field 'itms'; did you"),
        (ChallengeRequest, b'{"bundle": "b", "mode": "cnary"}', "unknown mode 'cnary'; did you"),
    ],
)
def test_what_was_found(kind: Any, body: bytes, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        decoded(msgspec.json.Decoder(kind), body)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_requests(schema: OpenApiSchema) -> None:
    met = sum((fuzz(schema, *operation, cases=480) for operation in OPERATIONS), Counter())
    print(met.total(), "cases:", dict(met))
    assert met.total() >= 10_000
