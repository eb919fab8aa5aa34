"""/health, /version and /metrics."""

from __future__ import annotations

import re
import threading

import pytest
from tests.server.conftest import Serve, eventually, gather
from tests.server.fake_service import MODEL, FakeService

from headrace.core.errors import EngineUnavailable, HeadraceError
from headrace.core.request import SLO
from headrace.server.api.replies import HealthReply
from headrace.server.slo.classes import SLOClasses
from headrace.version import __version__

HELLO = [{"role": "user", "content": "abc"}]


def test_health_follows_the_service(serve: Serve) -> None:
    service = FakeService(state="loading")
    running = serve(service)
    http = running.http()
    for state, status in (("loading", 503), ("ready", 200), ("failed", 503), ("draining", 503), ("ready", 200)):
        service.state = state
        reply = http.get("/health")
        assert (reply.status_code, reply.json()["state"]) == (status, state)
        HealthReply.model_validate(reply.json())
        answer = http.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == status
        if status == 503:
            assert answer.json()["error"]["code"] == "engine_unavailable"
            assert answer.headers["retry-after"]
        assert f'headrace_state{{headrace_state="{state}"}} 1.0' in http.get("/metrics").text
    assert http.get("/version").json() == {"version": __version__}


def test_tokenizer_is_loaded_once_and_only_when_ready(serve: Serve, byte_tokenizer) -> None:
    loads = []

    def load():
        loads.append(threading.current_thread())
        return byte_tokenizer

    service = FakeService(state="loading")
    running = serve(service, tokenizer=load)
    running.http().post("/v1/completions", json={"prompt": "a"})
    assert not loads
    service.state = "ready"
    replies = gather(*[lambda: running.http().post("/v1/completions", json={"prompt": "a"})] * 8)
    assert [reply.status_code for reply in replies] == [200] * 8
    assert len(loads) == 1
    assert loads[0] is not running._thread, "loading must not block the event loop"


def test_tokenizer_that_fails_is_tried_again(serve: Serve, byte_tokenizer) -> None:
    tries = []

    def load():
        tries.append(1)
        if len(tries) == 1:
            raise HeadraceError("the tokenizer cannot be read")
        return byte_tokenizer

    http = serve(tokenizer=load).http()
    assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 500
    assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_counts(serve: Serve) -> None:
    running = serve(slo_classes=SLOClasses({"fast": SLO(ttft_ms=60_000, tpot_ms=60_000), "never": SLO(ttft_ms=0.001)}))
    client = running.client()
    client.chat.completions.create(model=MODEL, messages=HELLO, n=2, service_tier="fast")  # type: ignore[arg-type]
    client.chat.completions.create(model=MODEL, messages=HELLO, service_tier="never")  # type: ignore[arg-type]
    client.completions.create(model=MODEL, prompt="abcdef", max_tokens=3)
    running.http().get("/v1/nothing")
    running.http().post("/v1/completions", json={})
    found = running.metrics()
    assert found["headrace_http_requests_total{endpoint=/v1/chat/completions,method=POST,status=200}"] == 2
    assert found["headrace_http_requests_total{endpoint=/v1/completions,method=POST,status=200}"] == 1
    assert found["headrace_http_requests_total{endpoint=/v1/completions,method=POST,status=400}"] == 1
    assert found["headrace_http_requests_total{endpoint=none,method=GET,status=404}"] == 1
    assert found["headrace_sequences_finished_total{endpoint=chat_completions,finish_reason=stop}"] == 3
    assert found["headrace_sequences_finished_total{endpoint=completions,finish_reason=length}"] == 1
    assert found["headrace_slo_requests_total{met=yes,slo_class=fast}"] == 1
    assert found["headrace_slo_requests_total{met=no,slo_class=never}"] == 1
    assert found["headrace_prompt_tokens_total"] == 6 + 6 + 6
    assert found["headrace_generation_tokens_total"] == 2 * 4 + 4 + 3
    assert found["headrace_cached_prompt_tokens_total"] == 9
    for name in ("ttft", "tpot", "e2e", "queue"):
        assert found[f"headrace_{name}_seconds_count"] == 4
    assert found["headrace_step_seconds_count"] == found["headrace_forward_seconds_count"] == 3
    assert found["headrace_step_seconds_sum"] == pytest.approx(0.006)
    assert found["headrace_step_seconds_bucket{le=0.001}"] == 0
    assert found["headrace_step_seconds_bucket{le=0.002}"] == found["headrace_step_seconds_bucket{le=+Inf}"] == 3
    assert found["headrace_profile_error_p50"] == 0.04
    assert found["headrace_profile_predicted_seconds_total"] == 0.5
    assert found["headrace_slots"] == 4096
    assert found["headrace_slots_used"] == 0


def test_open_and_cancelled_requests(serve: Serve) -> None:
    service = FakeService(say=lambda request, index: b"x" * 1000, delay_s=0.01)
    running = serve(service)
    with running.http().stream("POST", "/v1/completions", json={"prompt": "abcd", "max_tokens": 1000, "stream": True}):
        found = running.metrics()
        assert found["headrace_open_requests"] == 1
        assert found["headrace_running_sequences"] == 1
        assert found["headrace_slots_used"] == 4
    name = "headrace_sequences_finished_total{endpoint=completions,finish_reason=cancelled}"
    assert eventually(lambda: running.metrics().get(name) == 1)
    found = running.metrics()
    assert found["headrace_open_requests"] == found["headrace_slots_used"] == 0


def test_clients_cannot_make_up_labels(serve: Serve) -> None:
    running = serve()
    http = running.http()
    http.get("/v1/models/made-up-1")
    http.get("/made-up-2")
    http.request("MADEUP3", "/v1/models")
    http.post("/v1/completions", json={"prompt": "a", "service_tier": "made-up-4"})
    text = http.get("/metrics").text
    assert not re.search("made-?up", text, re.IGNORECASE)
    assert 'endpoint="/v1/models/{model:path}"' in text


def test_metrics_while_the_engine_is_away(serve: Serve) -> None:
    service = FakeService(state="failed")

    async def stats():
        raise EngineUnavailable("gone")

    service.stats = stats  # type: ignore[method-assign]
    assert serve(service).metrics()["headrace_state{headrace_state=failed}"] == 1


def test_formats(serve: Serve) -> None:
    http = serve().http()
    assert http.get("/metrics").headers["content-type"].startswith("text/plain")
    opened = http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert opened.headers["content-type"].startswith("application/openmetrics-text")
    assert opened.text.endswith("# EOF\n")


def test_two_servers_count_apart(serve: Serve) -> None:
    one, two = serve(), serve()
    one.http().post("/v1/completions", json={"prompt": "abc"})
    assert one.metrics()["headrace_prompt_tokens_total"] == 3
    assert two.metrics()["headrace_prompt_tokens_total"] == 0


def test_access_log(serve: Serve, caplog) -> None:
    caplog.set_level("INFO", "headrace.access")
    running = serve()
    running.http().post("/v1/completions", json={"prompt": "abc"}, headers={"x-request-id": "mine"})
    running.http().get("/a%0Ab")
    assert eventually(lambda: len(caplog.records) >= 2)
    lines = [record.getMessage() for record in caplog.records if record.name == "headrace.access"]
    assert re.search(r"POST /v1/completions 200 [\d.]+ms mine cmpl-\w+ prompt=3 generated=4 ttft=.* stop", lines[0])
    assert not any("\n" in line for line in lines)
    caplog.clear()
    serve(access_log=False).http().get("/health")
    assert not [record for record in caplog.records if record.name == "headrace.access"]


def test_slack_and_steps(serve: Serve) -> None:
    running = serve(slo_classes=SLOClasses({"fast": SLO(ttft_ms=60_000, tpot_ms=60_000), "never": SLO(ttft_ms=0.001)}))
    for name in ("fast", "never", "none"):
        running.http().post("/v1/completions", json={"prompt": "abcd", "slo": name})
    found = running.metrics()
    slack = "headrace_slo_slack_seconds_bucket{{le={},slo_class={},target={}}}"
    assert found[slack.format("10.0", "fast", "ttft")] == 0  # nearly a minute early
    assert found[slack.format("100.0", "fast", "ttft")] == found[slack.format("+Inf", "fast", "tpot")] == 1
    assert found[slack.format("0.0", "never", "ttft")] == 1  # late
    assert found["headrace_slo_attainment_ratio{slo_class=fast}"] == 1
    assert found["headrace_slo_attainment_ratio{slo_class=never}"] == 0
    assert "headrace_slo_attainment_ratio{slo_class=none}" not in found
    assert not [name for name in found if "slack" in name and "slo_class=none" in name]
    assert found["headrace_step_limit_tokens"] == 512
    assert found["headrace_draft_tokens_total"] == 2 * found["headrace_accepted_draft_tokens_total"] > 0
    assert found["headrace_step_tokens_sum{purpose=prefill}"] == 7
    assert found["headrace_step_tokens_bucket{le=4,purpose=prefill}"] == 0
    assert found["headrace_step_tokens_bucket{le=8,purpose=prefill}"] == 1
    assert found["headrace_step_tokens_count{purpose=verify}"] == 1
    assert found["headrace_accepted_per_draft_tokens_bucket{le=1}"] == 0
    assert found["headrace_accepted_per_draft_tokens_bucket{le=2}"] == 1
