"""The knobs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headrace.core.errors import InvalidRequest
from headrace.server import ServerSettings


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_body_bytes": 0},
        {"max_open_requests": 0},
        {"max_choices": -1},
        {"tokenizer_threads": 0},
        {"body_timeout_s": 0},
        {"keep_alive_s": -1},
        {"write_timeout_s": float("nan")},
        {"drain_timeout_s": -1},
        {"accept_wait_s": float("nan")},
    ],
)
def test_nonsense_is_refused_by_name(wrong: dict) -> None:
    name = next(iter(wrong))
    with pytest.raises(InvalidRequest, match=name) as caught:
        ServerSettings(**wrong)
    assert caught.value.field == name


def test_zero_is_a_fine_drain_timeout() -> None:
    assert ServerSettings(drain_timeout_s=0, accept_wait_s=0).drain_timeout_s == 0


def test_keys_are_kept_as_digests() -> None:
    settings = ServerSettings(api_keys=(("ann", "secret"),))
    ((label, digest),) = settings.key_digests()
    assert label == "ann"
    assert len(digest) == 32
    assert b"secret" not in digest
    assert "secret" not in repr(settings)


def test_settings_need_no_web_stack() -> None:
    code = (
        "import sys; from headrace.server import ServerSettings; ServerSettings(); "
        "print(sorted({'fastapi', 'pydantic', 'uvicorn', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
