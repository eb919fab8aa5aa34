"""API keys."""

from __future__ import annotations

import hmac

import openai
import pytest
from tests.server.conftest import Serve
from tests.server.fake_service import MODEL, FakeService

from headrace.core.errors import InvalidRequest
from headrace.server import ServerSettings
from headrace.server.guards.auth import Authentication

KEYS = (("ann", "sk-one"), ("bob", "sk-two"))
HELLO = [{"role": "user", "content": "x"}]
PROTECTED = [
    "/v1/models",
    "/v1/models/a",
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/other",
]


def test_each_key_opens_and_names_its_owner(serve: Serve) -> None:
    service = FakeService()
    running = serve(service, api_keys=KEYS)
    for _, key in KEYS:
        running.client(key).chat.completions.create(model=MODEL, messages=HELLO)
    assert [request.owner for request in service.seen] == ["ann", "bob"]


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer sk-on", "Bearer sk-one2", "Basic sk-one", "sk-one"])
def test_wrong_keys(serve: Serve, value: str | None) -> None:
    http = serve(api_keys=KEYS).http()
    headers = {} if value is None else {"authorization": value}
    for path in PROTECTED:
        for reply in (http.get(path, headers=headers), http.post(path, json={}, headers=headers)):
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["x-request-id"]


def test_official_client_raises_authentication_error(serve: Serve) -> None:
    with pytest.raises(openai.AuthenticationError):
        serve(api_keys=KEYS).client("wrong").models.list()


def test_open_paths(serve: Serve) -> None:
    http = serve(api_keys=KEYS).http()
    for path in ("/health", "/version", "/metrics", "/openapi.json"):
        assert http.get(path).status_code == 200


def test_metrics_can_be_protected(serve: Serve) -> None:
    http = serve(api_keys=KEYS, protect_metrics=True).http()
    assert http.get("/metrics").status_code == 401
    assert http.get("/metrics", headers={"authorization": "bearer sk-two"}).status_code == 200
    assert http.get("/health").status_code == 200


def test_without_keys_everybody_is_let_in(serve: Serve) -> None:
    service = FakeService()
    serve(service).client("whatever").chat.completions.create(model=MODEL, messages=HELLO)
    assert service.seen[0].owner == ""


def test_keys_are_neither_logged_nor_shown(serve: Serve, caplog) -> None:
    caplog.set_level("DEBUG")
    running = serve(api_keys=KEYS)
    running.client("sk-one").chat.completions.create(model=MODEL, messages=HELLO)
    running.http().get("/v1/models?key=sk-two", headers={"authorization": "Bearer sk-wrong"})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("headrace", "uvicorn"))]
    assert any("key=ann" in line for line in ours)
    assert not any("sk-" in line for line in ours)
    assert "sk-" not in repr(running.serving.settings)


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    layer = Authentication(None, digests=ServerSettings(api_keys=KEYS).key_digests(), protect_metrics=False)  # type: ignore[arg-type]
    assert layer.owner([(b"authorization", b"Bearer sk-one")]) == "ann"
    assert len(compared) == 2, "a match must not end the comparison"
    assert all(len(a) == len(b) == 32 for a, b in compared)


@pytest.mark.parametrize("keys", [(("", "k"),), (("a", ""),), (("a", "k"), ("b", "k"))])
def test_bad_settings(keys) -> None:
    with pytest.raises(InvalidRequest):
        ServerSettings(api_keys=keys)
