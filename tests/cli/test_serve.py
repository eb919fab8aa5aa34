from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests import tiny
from tests.cli.program import Program

from headrace.cli.launch import check_address, is_local, is_loopback
from headrace.cli.serve import api_keys, slo_classes
from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO
from headrace.server.slo.classes import SLOClasses


def test_keys_come_from_options_and_a_file_with_or_without_labels(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who may come in\nalice  s3cret\n\nbare\n")
    assert api_keys(["given"], file) == (("key-1", "given"), ("alice", "s3cret"), ("key-3", "bare"))
    assert api_keys([], None) == ()
    file.write_text("a b c\n")
    with pytest.raises(InvalidRequest, match="LABEL KEY"):
        api_keys([], file)


def test_a_key_is_not_shown_in_the_error_about_its_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice s3cret oops\n")
    with pytest.raises(InvalidRequest) as error:
        api_keys([], file)
    assert "s3cret" not in error.value.message


def classes(
    *given: str, file: Path | None = None, default: str | None = None, tiers: tuple[str, ...] = ()
) -> SLOClasses:
    return slo_classes(given, file, default, tiers)


def test_classes_come_from_options_and_a_file_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(
        "default: chat\n"
        "classes:\n  chat: {tpot: 50ms, ttft: 1s}\n  code: tpot_ms=30\n  batch:\n"
        "service_tiers:\n  priority: code\n"
    )
    found = classes("code:tpot=25ms", "fast:ttft_ms=300,tpot_ms=40", file=file, tiers=("flex=batch",))
    assert found.classes == {"chat": SLO(1000, 50), "code": SLO(None, 25), "batch": SLO(), "fast": SLO(300, 40)}
    assert found.default == "chat"
    assert found.tiers == {"priority": "code", "flex": "batch"}
    assert classes(file=file, default="code").default == "code"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("classes: [", "not YAML at line"),
        ("- chat", "mapping called classes"),
        ("classes: {chat: {tpot: 50}}", "with its unit"),
        ("classes: {chat: {tpt: 50ms}}", "'tpt' is no target"),
        ("classes: {chat: 50}", "write {tpot: 50ms"),
        ("classes: {none: {}}", "meaning of its own"),
        ("classes: {}\ndefault: chat", "default class is 'chat'"),
        ("classes: {}\nclases: 1", "'clases' is unknown"),
        ("classes: {}\nservice_tiers: {flex: bulk}", "'bulk', which is unknown"),
        ("classes: !!python/object/apply:os.system [true]", "not YAML"),
    ],
)
def test_a_bad_file_of_classes_is_refused_with_its_name_and_the_remedy(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as error:
        classes(file=file)
    assert says in error.value.message
    assert "\n" not in error.value.message


def test_what_is_known_to_be_on_this_machine(tmp_path: Path) -> None:
    assert is_local("bundled")
    assert is_local(str(tmp_path))
    assert is_local("./nowhere")
    assert not is_local("Qwen/Qwen3-0.6B")


def test_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.1", "example.org"))


def test_a_taken_port_is_refused_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidRequest, match="--port"):
            check_address("127.0.0.1", taken.getsockname()[1])
    check_address("127.0.0.1", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Program]:
    program = Program(str(folder), "--served-name", "tiny", "--api-key", "s3cret", "--tier", "fast:tpot_ms=1e6")
    yield program
    program.stop()


def test_it_listens_while_the_model_loads_and_tells_when_it_is_ready(server: Program) -> None:
    url = server.expect(r"listens at (\S+)")[1]
    assert httpx.get(f"{url}/health").status_code == 503
    server.expect(r"ready: tiny at ")
    assert httpx.get(f"{url}/health").status_code == 200
    assert "adaserve policy, 1 threads" in server.text
    assert "warning" not in server.text


def test_the_example_it_prints_works(server: Program) -> None:
    found = server.expect(r"try +curl (\S+) .*-d '(.*)'\n")
    url, body = found[1], json.loads(found[2])
    assert httpx.post(url, json=body).status_code == 401
    answer = httpx.post(
        url,
        json=body | {"max_tokens": 4, "service_tier": "fast"},
        headers={"authorization": "Bearer s3cret"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 4
    assert answer.json()["usage"]["slo"]["met"] is True


def test_the_other_commands_talk_to_it(server: Program) -> None:
    url = server.expect(r"headrace chat --url (\S+)")[1]
    command = [sys.executable, "-m", "headrace", "chat", "--url", url, "--max-tokens", "3", "--api-key", "s3cret"]
    done = subprocess.run(command, input="hi\n", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")


def group_lives(leader: int) -> bool:
    """Whether any process of the group that ``leader`` led is left."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_signal_ends_it_and_its_engine(server: Program) -> None:
    server.expect("ready: ")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    end = time.monotonic() + 20
    while group_lives(server.process.pid):  # Python's own resource tracker ends a moment after its parent
        assert time.monotonic() < end, "the engine outlived its server"
        time.sleep(0.05)
    assert "Traceback" not in server.text


def test_a_model_that_cannot_be_loaded_ends_it_with_status_2(tmp_path: Path) -> None:
    broken = tiny.checkpoint("llama", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    program = Program(str(broken), "--host", "0.0.0.0")
    assert program.process.wait(120) == 2
    program.expect("truncated", 5)
    assert "warning: 0.0.0.0 can be reached" in program.text  # no key was given
    assert "Traceback" not in program.text
    assert "ready" not in program.text
