"""The server keeps the promises of its own OpenAPI document."""

from __future__ import annotations

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.server.fake_service import FakeService, write_byte_tokenizer

from headrace.models.text.tokenizer import Tokenizer
from headrace.server import ServerSettings, create_app

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = write_byte_tokenizer(tmp_path_factory.mktemp("bytes"))
    tokenizer = Tokenizer(folder)
    service = FakeService(say=lambda request, index: b"hello")
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(service, lambda: tokenizer, ServerSettings()))


QUIET = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}


OPERATIONS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
]


def call(schema, method: str, path: str, examples: int) -> set[int]:
    """Call an operation with generated requests, valid and not, and check the answers; their statuses."""
    statuses: set[int] = set()

    def check(case: schemathesis.Case) -> None:
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    modes = schemathesis.GenerationMode if method == "POST" else (schemathesis.GenerationMode.POSITIVE,)
    for mode in modes:  # a GET has nothing that could be wrong
        strategy = schema[path][method].as_strategy(generation_mode=mode)
        settings(max_examples=examples, **QUIET)(given(strategy)(check))()  # type: ignore[arg-type]
    return statuses


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_document_is_kept(schema, method: str, path: str) -> None:
    statuses = call(schema, method, path, 15)
    assert statuses <= {200, 400, 404}
    assert method == "GET" or 400 in statuses, "no bad request was tried"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_document_is_kept_thoroughly(schema, method: str, path: str) -> None:
    assert call(schema, method, path, 300)


def test_document_names_every_route(schema) -> None:
    paths = schema.raw_schema["paths"]
    assert {(method.upper(), path) for path, item in paths.items() for method in item} == set(OPERATIONS)
    chat = paths["/v1/chat/completions"]["post"]["responses"]
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"400", "401", "404", "408", "413", "415", "429", "500", "503"} <= set(chat)
    assert "422" not in chat
