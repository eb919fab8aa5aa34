"""Who decides on a request's targets: field, header, tier, default; without a server and over HTTP."""

from __future__ import annotations

import pytest
from tests.server.conftest import Serve
from tests.server.fake_service import FakeService

from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO
from headrace.server.api.schemas import ChatBody
from headrace.server.slo.classes import SLOClasses
from headrace.server.slo.targets import SLOHeaders, Targets, resolve, slo_headers

CHAT, CODE, BULK = SLO(1000, 50), SLO(None, 25), SLO(None, 900)
CLASSES = SLOClasses({"chat": CHAT, "code": CODE, "flex": BULK}, "chat", {"priority": "code"})
HELLO = [{"role": "user", "content": "a"}]


def ask(headers: SLOHeaders = SLOHeaders(), classes: SLOClasses = CLASSES, **fields) -> Targets:
    return resolve(ChatBody.model_validate({"messages": HELLO, **fields}), headers, classes)


NAME, OWN = SLOHeaders(name="code"), SLOHeaders(targets="tpot=7ms")


@pytest.mark.parametrize(
    ("asked", "slo", "name", "tier"),
    [
        (ask(), CHAT, "chat", None),
        (ask(classes=SLOClasses()), SLO(), "none", None),
        (ask(service_tier="auto"), CHAT, "chat", "default"),
        (ask(service_tier="flex"), BULK, "flex", "flex"),
        (ask(service_tier="priority"), CODE, "code", "priority"),
        (ask(service_tier="code"), CODE, "code", "code"),
        (ask(NAME, service_tier="flex"), CODE, "code", "flex"),
        (ask(OWN, service_tier="flex"), SLO(None, 7), "custom", "flex"),
        (ask(NAME, slo="flex"), BULK, "flex", None),
        (ask(OWN, slo={"ttft_ms": 9}), SLO(9, None), "custom", None),
        (ask(OWN, slo={}), SLO(), "none", None),
        (ask(slo="none"), SLO(), "none", None),
        (ask(SLOHeaders(name="none")), SLO(), "none", None),
    ],
)
def test_the_most_specific_decides_alone(asked: Targets, slo: SLO, name: str, tier: str | None) -> None:
    assert asked == Targets(slo, name, tier)


@pytest.mark.parametrize(
    ("headers", "fields", "field"),
    [
        (SLOHeaders(), {"service_tier": "turbo"}, "service_tier"),
        (SLOHeaders(), {"slo": "turbo"}, "slo"),
        (SLOHeaders(name="turbo"), {}, "X-SLO-Class"),
        (SLOHeaders(targets="tpot=fast"), {}, "X-Headrace-SLO"),
        (SLOHeaders(name="turbo"), {"slo": "chat"}, "X-SLO-Class"),  # a mistake is told even where it is overruled
    ],
)
def test_mistakes(headers: SLOHeaders, fields: dict, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(headers, **fields)
    assert caught.value.field == field


def test_one_header_only() -> None:
    assert slo_headers("code", None) == NAME
    assert slo_headers("", "tpot=7ms") == OWN
    with pytest.raises(InvalidRequest, match="send one of them"):
        slo_headers("code", "tpot=7ms")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_over_http(serve: Serve, path: str) -> None:
    service = FakeService()
    http = serve(service, slo_classes=CLASSES).http()
    body = {"messages": HELLO} if "chat" in path else {"prompt": "a"}
    answer = http.post(path, json={**body, "service_tier": "auto"}, headers={"X-SLO-Class": "code"}).json()
    assert answer["service_tier"] == "default"
    assert answer["usage"]["slo"]["class"] == "code"
    assert (service.seen[0].slo, service.seen[0].tier) == (CODE, "code")
    assert http.post(path, json=body).json()["service_tier"] is None
    assert service.seen[1].slo == CHAT
    bad = http.post(path, json={**body, "slo": {"tpot_ms": -3}})
    assert bad.status_code == 400
    error = bad.json()["error"]
    assert (error["param"], error["type"]) == ("slo", "invalid_request_error")
    assert error["message"] == "slo.tpot_ms: Input should be greater than 0 (it is -3)"
    unknown = http.post(path, json={**body, "slo": "turbo"}).json()["error"]
    assert unknown["message"] == "slo: no class 'turbo' here: give one of chat, code, flex, none"
    assert http.post(path, json={**body, "slo": {"tpot": 3}}).json()["error"]["param"] == "slo"
    assert http.post(path, json={**body, "slo": 5}).status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("word", "means"), [("on", True), ("off", False), ("auto", None), (True, True), (False, False), (None, None)]
)
def test_speculate(serve: Serve, path: str, word: object, means: bool | None) -> None:
    service = FakeService()
    body = {"messages": HELLO} if "chat" in path else {"prompt": "a"}
    reply = serve(service).http().post(path, json={**body, "speculate": word})
    assert reply.status_code == 200
    assert service.seen[0].speculate is means


def test_the_last_chunk_of_a_stream_says_what_was_achieved(serve: Serve) -> None:
    import json

    body = {"prompt": "abc", "stream": True, "stream_options": {"include_usage": True}, "slo": "chat"}
    text = serve(slo_classes=CLASSES).http().post("/v1/completions", json=body).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    usage = chunks[-1]["usage"]
    assert chunks[-1]["choices"] == []
    assert (usage["slo"]["class"], usage["slo"]["met"]) == ("chat", True)
    assert usage["slo"]["achieved"]["ttft_ms"] > 0
    assert usage["speculation"] == {"steps": 3, "drafted_tokens": 0, "accepted_tokens": 0, "tokens_per_step": 1.0}
