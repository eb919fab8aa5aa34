"""Streams: chunks, usage, errors in the middle, slow readers and readers that leave."""

from __future__ import annotations

import json
import socket
import time

import openai
import pytest
from tests.server.conftest import Running, Serve, eventually
from tests.server.fake_service import MODEL, FakeService

from headrace.core.errors import EngineUnavailable, HeadraceError, Overloaded

HELLO = [{"role": "user", "content": "x"}]


def say(text: str, **more) -> FakeService:
    return FakeService(say=lambda request, index: text.encode(), **more)


def lines(running: Running, **body) -> list[dict | str]:
    """The events of a chat stream; the last one is "[DONE]" when the stream ended well."""
    request = {"model": MODEL, "messages": HELLO, "stream": True, **body}
    with running.http().stream("POST", "/v1/chat/completions", json=request) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        data = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def test_chunks(serve: Serve) -> None:
    events = lines(serve(say("añb")))
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "añb"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert deltas[-1] == {}
    assert all("usage" not in chunk for chunk in chunks)


def test_line_separators_stay_inside_their_event(serve: Serve) -> None:
    """Many clients split lines where Python does: at U+2028, U+2029 and U+0085 too."""
    text = "a\u2028b\u2029c\x85d\ne\rf\x0bg\x1ch"
    events = lines(serve(say(text)))
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == text


def test_usage_comes_last_and_only_when_asked_for(serve: Serve) -> None:
    running = serve(say("abc"))
    events = lines(running, stream_options={"include_usage": True})
    usage = events[-2]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert usage["usage"]["slo"]["met"] is None
    assert all(event["usage"] is None for event in events[:-2])


def test_continuous_usage(serve: Serve) -> None:
    events = lines(serve(say("abcd", delay_s=0.1)), stream_options={"continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert counts[-1] == 5


def test_streamed_text_equals_the_whole(serve: Serve) -> None:
    client = serve(FakeService(say=lambda request, index: "ein §tück Text ✓".encode()[index:], delay_s=0.02)).client()
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, n=3, stop="Text")
    parts = {0: "", 1: "", 2: ""}
    seen: list[int] = []
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, n=3, stop="Text", stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        seen.append(chunk.choices[0].index)
    assert parts == {choice.index: choice.message.content for choice in whole.choices}
    assert seen != sorted(seen), "the choices came one after the other, not side by side"


def test_tokens_come_as_they_are_made(serve: Serve) -> None:
    client = serve(say("abcdef", delay_s=0.1)).client()
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    times = [time.monotonic() for chunk in stream if chunk.choices[0].delta.content]
    assert len(times) > 2
    assert times[-1] - times[0] > 0.3


def test_refusal_before_the_first_byte_is_a_status(serve: Serve) -> None:
    for eager in (True, False):
        service = FakeService(refuse=Overloaded("full: try later", retry_after_s=6.2), eager=eager)
        with pytest.raises(openai.RateLimitError) as caught:
            serve(service).client().chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        assert caught.value.response.headers["retry-after"] == "7"


def test_grammar_that_does_not_compile_is_a_status_even_when_it_takes_long(serve: Serve) -> None:
    request = {"prompt": "a", "guided_regex": "(", "stream": True}
    patient = serve(FakeService(compile_s=0.5), accept_wait_s=0.05).http()
    assert patient.post("/v1/completions", json=request).status_code == 400
    hasty = serve(FakeService(compile_s=0.5), accept_wait_s=0.05, grammar_wait_s=0.05).http()
    late = hasty.post("/v1/completions", json=request)
    assert late.status_code == 200
    assert json.loads(late.text.strip().removeprefix("data: "))["error"]["param"] == "structured_outputs"


def test_error_in_the_middle_is_an_event_and_ends_the_stream(serve: Serve) -> None:
    broken = EngineUnavailable("the engine stopped unexpectedly: send it again", code="engine_crashed")
    service = say("abcdef", fail_at=3, failure=broken, delay_s=0.01)
    running = serve(service)
    events = lines(running)
    assert events[-1]["error"]["code"] == "engine_crashed"
    assert "[DONE]" not in events
    with pytest.raises(openai.APIError, match="engine stopped"):
        list(running.client().chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    service.fail_at = None
    assert lines(running)[-1] == "[DONE]"


def test_iterator_that_ends_early_is_an_error(serve: Serve) -> None:
    running = serve(say("abcdef", vanish_at=3, delay_s=0.01))
    assert lines(running)[-1]["error"]["code"] == "engine_unavailable"
    with pytest.raises(openai.InternalServerError):
        running.client().chat.completions.create(model=MODEL, messages=HELLO)


def test_one_broken_choice_fails_the_request(serve: Serve) -> None:
    service = say("abcdef", fail_at=2, failure=HeadraceError("broken", code="x"))
    with pytest.raises(openai.InternalServerError, match="broken"):
        serve(service).client().chat.completions.create(model=MODEL, messages=HELLO, n=3)
    assert eventually(lambda: not service.live)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_cancels(serve: Serve, stream: bool) -> None:
    service = say("a" * 1000, delay_s=0.01)
    running = serve(service)
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: len(service.live) == 1)
        if stream:
            assert b"text/event-stream" in connection.recv(4096)
    assert eventually(lambda: not service.live), "the engine still works for a client that has left"
    assert service.cancelled
    assert service.steps < 900
    assert eventually(lambda: running.serving.open_requests == 0)


def test_leaving_before_the_first_token_cancels(serve: Serve) -> None:
    service = say("a", delay_s=30)
    running = serve(service, accept_wait_s=20)
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: len(service.live) == 1)
    assert eventually(lambda: not service.live)
    assert eventually(lambda: running.serving.open_requests == 0)


def test_client_that_stays_is_not_cancelled(serve: Serve) -> None:
    service = say("a" * 50, delay_s=0.01)
    assert lines(serve(service))[-1] == "[DONE]"
    assert not service.cancelled


def test_slow_reader_gets_everything_in_fewer_events(serve: Serve) -> None:
    text = "0123456789" * 3000
    service = FakeService(say=lambda request, index: text.encode(), context=40_000, burst=8)
    running = serve(service)
    _shrink_send_buffers(running)
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: service.steps >= 3750, 20), "the engine must not wait for the reader"
        assert eventually(lambda: not service.live), "a slow reader must not hold the engine"
        received = b""
        while part := connection.recv(65536):
            received += part
    payload = received.split(b"\r\n\r\n", 1)[1]
    events = [json.loads(item[6:]) for item in _unchunk(payload).split(b"\n\n") if item.startswith(b"data: {")]
    contents = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(contents) == text
    assert len(contents) < 3000, "what a slow reader missed must be merged"


def _shrink_send_buffers(running: Running) -> None:
    """Connections accepted from now on hold little in the kernel, so that a client which does not read is felt early."""
    running.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def _unchunk(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        parts.append(rest[:length])
        data = rest[length + 2 :]
    return b"".join(parts)


def test_reader_that_never_reads_is_cut(serve: Serve) -> None:
    text = b"0123456789" * 100_000
    service = FakeService(say=lambda request, index: text, context=1_100_000, burst=5000)
    running = serve(service, write_timeout_s=0.5)
    _shrink_send_buffers(running)
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: running.serving.open_requests == 1)
        assert eventually(lambda: running.serving.open_requests == 0)
        assert eventually(lambda: not running.server.server_state.connections), "the connection is still held"


def test_silence_is_broken_by_comments(serve: Serve) -> None:
    running = serve(say("ab", delay_s=0.5), keep_alive_s=0.1, accept_wait_s=0.05)
    request = {"model": MODEL, "messages": HELLO, "stream": True}
    with running.http().stream("POST", "/v1/chat/completions", json=request) as reply:
        text = "".join(reply.iter_text())
    assert text.count(": keep-alive\n\n") >= 4
    assert text.endswith("data: [DONE]\n\n")
    answer = list(running.client().chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == "ab"
