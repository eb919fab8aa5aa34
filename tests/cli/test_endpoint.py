from __future__ import annotations

import pytest
from tests.cli.openai_double import serving

from headrace.cli.endpoint import Endpoint, base_url
from headrace.core.errors import EngineUnavailable, HeadraceError, InvalidRequest, ModelNotFound


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1", "http://h:1/v1"),
        ("https://h/api/v3/", "https://h/api/v3"),
    ],
)
def test_base_url(given: str, wanted: str) -> None:
    assert base_url(given) == wanted


@pytest.mark.parametrize("bad", ["localhost:8000", "ftp://h/v1", "", "http://"])
def test_base_url_refuses_what_is_no_address(bad: str) -> None:
    with pytest.raises(InvalidRequest, match="no address"):
        base_url(bad)


def test_streams_text_and_usage() -> None:
    with serving() as double:
        endpoint = Endpoint(double.url, "secret")
        assert endpoint.first_model() == "tiny"
        events = list(endpoint.stream({"model": "tiny", "messages": []}))
        endpoint.close()
    assert "".join(event.text for event in events) == "Hello"
    assert [event.finish_reason for event in events if event.finish_reason] == ["stop"]
    assert events[-1].usage["completion_tokens"] == 2
    assert double.requests[0]["stream"] is True
    assert double.keys == ["Bearer secret", "Bearer secret"]


def test_no_key_no_header() -> None:
    with serving() as double:
        Endpoint(double.url).first_model()
    assert double.keys == [None]


def test_refusal_carries_the_servers_words_and_a_remedy() -> None:
    with serving() as double:
        double.refusal = (401, "wrong key")
        with pytest.raises(HeadraceError, match=r"401.*wrong key.*--api-key"):
            list(Endpoint(double.url).stream({"messages": []}))


def test_error_event_in_the_middle_is_raised_after_the_text_before_it() -> None:
    with serving() as double:
        double.break_off = True
        events = Endpoint(double.url).stream({"messages": []})
        seen = [next(events).text, next(events).text]
        with pytest.raises(HeadraceError, match="the engine died"):
            next(events)
    assert "".join(seen) == "Hel"


def test_nobody_there() -> None:
    with serving() as double:
        url = double.url
    with pytest.raises(EngineUnavailable, match="headrace serve"):
        Endpoint(url).first_model()


def test_a_server_without_models() -> None:
    with serving() as double:
        double.models = []
        with pytest.raises(ModelNotFound, match="--model"):
            Endpoint(double.url).first_model()


def test_a_server_that_speaks_something_else() -> None:
    httpx = pytest.importorskip("httpx")
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    endpoint = Endpoint("http://h/v1", transport=transport)
    with pytest.raises(HeadraceError, match="--url"):
        endpoint.first_model()
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="data: [1, 2]\n\n"))
    with pytest.raises(HeadraceError, match="--url"):
        list(Endpoint("http://h/v1", transport=transport).stream({}))
