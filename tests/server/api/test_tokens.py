"""/tokenize, /detokenize and /v1/models."""

from __future__ import annotations

import pytest
from tests.server.conftest import Serve
from tests.server.fake_service import MODEL, FakeService

from headrace.server.api.replies import DetokenizeReply, ModelList, ModelObject, TokenizeReply


def test_tokenize_and_back(serve: Serve) -> None:
    http = serve().http()
    reply = http.post("/tokenize", json={"model": MODEL, "prompt": "hé<|end|>", "return_token_strs": True}).json()
    TokenizeReply.model_validate(reply)
    assert reply["tokens"] == [104, 195, 169, 256]
    assert (reply["count"], reply["max_model_len"]) == (4, 2048)
    assert reply["token_strs"] == ["h", "\ufffd", "\ufffd", "<|end|>"]
    back = http.post("/detokenize", json={"model": MODEL, "tokens": reply["tokens"]}).json()
    assert DetokenizeReply.model_validate(back).prompt == "hé<|end|>"
    skipped = http.post("/detokenize", json={"tokens": reply["tokens"], "skip_special_tokens": True}).json()
    assert skipped == {"prompt": "hé"}


def test_tokenize_messages(serve: Serve) -> None:
    http = serve().http()
    messages = [{"role": "user", "content": "a"}]
    with_prompt = http.post("/tokenize", json={"messages": messages}).json()
    without = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert with_prompt["tokens"] == [258, 97, 256, 259]
    assert without["tokens"] == [258, 97, 256]


def test_long_texts(serve: Serve) -> None:
    http = serve().http()
    reply = http.post("/tokenize", json={"prompt": "ab" * 50_000}).json()
    assert reply["count"] == 100_000
    assert http.post("/detokenize", json={"tokens": reply["tokens"]}).json()["prompt"] == "ab" * 50_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
def test_refusals(serve: Serve, path: str, body: dict, param: str) -> None:
    reply = serve().http().post(path, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_unknown_model(serve: Serve) -> None:
    http = serve().http()
    assert http.post("/tokenize", json={"model": "x", "prompt": "a"}).status_code == 404
    assert http.post("/detokenize", json={"model": "x", "tokens": [1]}).status_code == 404


def test_models(serve: Serve) -> None:
    running = serve()
    listed = running.http().get("/v1/models").json()
    ModelList.model_validate(listed)
    assert listed["data"][0]["id"] == MODEL
    one = running.http().get(f"/v1/models/{MODEL}").json()  # the name holds a slash
    ModelObject.model_validate(one)
    assert one["max_model_len"] == 2048
    assert running.client().models.retrieve(MODEL).id == MODEL


def test_nothing_before_the_model_is_loaded(serve: Serve) -> None:
    http = serve(FakeService(state="loading")).http()
    assert http.get("/v1/models").status_code == 503
    assert http.post("/tokenize", json={"prompt": "a"}).status_code == 503
