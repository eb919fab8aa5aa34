"""Every refusal in OpenAI's shape, none of it a traceback."""

from __future__ import annotations

import json
import socket
import time

import openai
import pytest
from pydantic import ValidationError
from tests.server.conftest import Running, Serve
from tests.server.fake_service import MODEL, FakeService

from headrace.core.errors import ContextTooLong, EngineUnavailable, InvalidRequest, Overloaded
from headrace.server.api.replies import ErrorReply
from headrace.server.api.schemas import ChatBody, CompletionBody
from headrace.server.errors import HttpError, body_of, error_body, explain, response_of

HELLO = [{"role": "user", "content": "x"}]
JSON = {"content-type": "application/json"}


def post(running: Running, content: bytes, path: str = "/v1/chat/completions", **headers: str):
    reply = running.http().post(path, content=content, headers={**JSON, **headers})
    ErrorReply.model_validate(reply.json())
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    return reply


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": "a",}',
        b"\xff\xfe{}",
        b'{"messages": "\xc3"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": -Infinity}',
        b'{"messages": [{"role": "user", "content": "a"}], "seed": 1e400}',
        b'{"messages": [{"role": "user", "content": "a"}], "stop": ["\\ud800"], "model": "\\udfff"}',
        b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1, "temperature": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"\\ud800": 1}}',
        b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"\xd9\xa3": 1}}',
        b'{"messages": [{"role": "user", "content": "a"}], "guided_json": "' + b"[" * 50_000 + b'"}',
        b"null",
        b"[]",
        b'"text"',
        b"1e309",
    ],
)
def test_hostile_bodies(serve: Serve, body: bytes) -> None:
    running = serve()
    reply = post(running, body)
    assert reply.status_code in (400, 404), reply.text  # 404: the surrogate was in the model's name
    assert "Traceback" not in reply.text
    assert running.client().models.list().data, "the server must live on"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [1] * 500_000},
        {"messages": [{"role": "user", "content": [1] * 500_000}]},
        {"messages": [], "stop": [1] * 500_000},
        {"messages": [], "guided_choice": [1] * 500_000},
        {"messages": [], "logit_bias": {str(i): "x" for i in range(300_000)}},
    ],
    ids=["messages", "parts", "stop", "choices", "biases"],
)
def test_a_million_mistakes_cost_no_more_than_one(fields: dict) -> None:
    start = time.process_time()
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate(fields)
    assert caught.value.error_count() < 10
    assert time.process_time() - start < 0.5


def test_prompt_forms_are_tried_without_listing_every_mistake() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"prompt": [None] * 500_000})
    assert caught.value.error_count() < 10


def test_deep_but_legal_schema_is_no_error_of_ours(serve: Serve) -> None:
    deep = b'{"a":' * 400 + b"1" + b"}" * 400
    body = b'{"messages": [{"role": "user", "content": "a"}], "guided_json": ' + deep + b"}"
    reply = serve().http().post("/v1/chat/completions", content=body, headers=JSON)
    assert reply.status_code in (200, 400)


def test_malformed_json_says_where(serve: Serve) -> None:
    error = post(serve(), b'{"model": "a",}').json()["error"]
    assert error["code"] == "invalid_json"
    assert "byte 14" in error["message"]


def test_missing_field(serve: Serve) -> None:
    error = post(serve(), b"{}").json()["error"]
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


def test_unknown_model(serve: Serve) -> None:
    client = serve().client()
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-17")


def test_unknown_paths_and_methods(serve: Serve) -> None:
    http = serve().http()
    for reply, status in (
        (http.get("/v1/nothing"), 404),
        (http.post("/v1/nothing", json={}), 404),
        (http.get("/v1/chat/completions"), 405),
        (http.delete("/v1/models"), 405),
        (http.post("/health"), 405),
    ):
        assert reply.status_code == status
        ErrorReply.model_validate(reply.json())
        assert reply.headers["x-request-id"]
    assert "POST" in http.get("/v1/chat/completions").headers["allow"]


@pytest.mark.parametrize(
    "media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""]
)
def test_media_type(serve: Serve, media: str) -> None:
    body = json.dumps({"model": MODEL, "messages": HELLO}).encode()
    http = serve().http()
    reply = http.post("/v1/chat/completions", content=body, headers={"content-type": media})
    assert reply.status_code == 415
    assert reply.json()["error"]["code"] == "unsupported_media_type"
    good = http.post("/v1/chat/completions", content=body, headers={"content-type": "Application/JSON; charset=utf-8"})
    assert good.status_code == 200


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (Overloaded("full"), 429, openai.RateLimitError),
        (EngineUnavailable("gone"), 503, openai.InternalServerError),
        (ContextTooLong("long", field="prompt"), 400, openai.BadRequestError),
        (InvalidRequest("the schema is broken", field="response_format"), 400, openai.BadRequestError),
    ],
)
@pytest.mark.parametrize("eager", [True, False])
def test_refusals_of_the_service(serve: Serve, refusal, status: int, kind: type, eager: bool) -> None:
    client = serve(FakeService(refuse=refusal, eager=eager)).client()
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.status_code == status
    assert (caught.value.code, caught.value.param) == (refusal.code, refusal.field)


def test_second_prompt_refused_refuses_the_request_and_frees_the_first(serve: Serve) -> None:
    service = FakeService(delay_s=0.05)
    accept, calls = service.submit, []

    def submit(request):
        calls.append(request.id)
        if len(calls) == 2:
            raise Overloaded("full")
        return accept(request)

    service.submit = submit  # type: ignore[method-assign]
    running = serve(service)
    with pytest.raises(openai.RateLimitError):
        running.client().completions.create(model=MODEL, prompt=["abc", "def"])
    assert not service.live
    assert running.serving.open_requests == 0


class Defect(FakeService):
    """A service with a bug."""

    def submit(self, request):
        raise RuntimeError("secret /etc/passwd")


def test_defects_do_not_leak(serve: Serve, caplog) -> None:
    running = serve(Defect())
    for path, body in (
        ("/v1/chat/completions", {"model": MODEL, "messages": HELLO}),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "stream": True}),
    ):
        reply = running.http().post(path, json=body)
        assert reply.status_code == 500
        ErrorReply.model_validate(reply.json())
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"] in caplog.text
    assert "secret" in caplog.text, "the log must have it"


def test_defect_in_a_running_request(serve: Serve) -> None:
    service = FakeService(fail_at=1, failure=None)  # an "error" delta without an error
    assert serve(service).http().post("/v1/completions", json={"prompt": "abc"}).status_code == 503


def test_request_id_is_taken_or_made(serve: Serve) -> None:
    http = serve().http()
    assert http.get("/health", headers={"x-request-id": "trace-1.a:b"}).headers["x-request-id"] == "trace-1.a:b"
    for bad in ("a b", "x" * 200, "é"):
        made = http.get("/health", headers={"x-request-id": bad.encode("latin-1")}).headers["x-request-id"]
        assert made.startswith("req_")
    assert http.get("/health").headers["x-request-id"] != http.get("/health").headers["x-request-id"]


def test_broken_http_does_not_hurt(serve: Serve) -> None:
    running = serve()
    port = int(running.url.rsplit(":", 1)[1])
    for junk in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + b"a" * 70_000,
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(junk)
            connection.recv(1000)
    assert running.http().get("/health").status_code == 200


def test_long_messages_and_surrogates_are_tamed() -> None:
    body = error_body(400, "a\ud800" + "x" * 10_000, param="p\ud800")
    text = json.dumps(body, ensure_ascii=False).encode()
    assert len(text) < 2500
    assert "\ud800" not in text.decode()


def test_types_and_headers() -> None:
    assert body_of(HttpError(401, "key", code="invalid_api_key"))["error"]["type"] == "authentication_error"
    assert body_of(InvalidRequest("a", field="n"))["error"] == {
        "message": "a",
        "type": "invalid_request_error",
        "param": "n",
        "code": "invalid_value",
    }
    assert response_of(Overloaded("a", retry_after_s=0.2)).headers["retry-after"] == "1"
    assert response_of(Overloaded("a", retry_after_s=2.1)).headers["retry-after"] == "3"
    assert "retry-after" in response_of(EngineUnavailable("a")).headers
    assert "retry-after" not in response_of(InvalidRequest("a")).headers


def test_explain_merges_the_branches_of_a_union() -> None:
    errors = [
        {"type": "string_type", "loc": ("body", "stop", "str"), "msg": "not a text"},
        {"type": "list_type", "loc": ("body", "stop", "list"), "msg": "not a list"},
        {"type": "other", "loc": ("body", "n"), "msg": "unrelated"},
    ]
    assert explain(errors) == ("stop: not a text; or: not a list", "stop", "invalid_value")
    assert explain([{"type": "dict_type", "loc": ("body",), "msg": "x"}])[1] is None
