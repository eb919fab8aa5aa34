from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
from tests.cli.openai_double import serving

from headrace.cli.chat import Conversation

CHAT = [sys.executable, "-m", "headrace", "chat"]


def piped(lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHAT, *options], input=lines, capture_output=True, text=True, timeout=60, check=False)


def test_a_conversation_keeps_its_turns_until_reset() -> None:
    talk = Conversation("m", "be brief", {"temperature": 0.5})
    talk.add("one", "two")
    assert talk.payload("three") == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
        "temperature": 0.5,
    }
    assert talk.obey("/reset") == "conversation forgotten"
    assert [m["role"] for m in talk.payload("x")["messages"]] == ["system", "user"]


def test_slash_commands() -> None:
    talk = Conversation("m")
    talk.add("one", "two")
    assert talk.obey("/system  answer in verse ") == "system prompt set"
    assert (talk.system, talk.turns) == ("answer in verse", [])
    talk.obey("/system")
    assert talk.system is None
    assert "/reset" in (talk.obey("/help") or "")
    assert "no command /nonsense" in (talk.obey("/nonsense") or "")
    assert talk.obey("/exit") is None


def test_each_line_of_a_pipe_is_a_turn_and_only_answers_are_printed() -> None:
    with serving() as double:
        done = piped("hi\n\nagain\n", "--url", double.url, "--system", "S", "--temperature", "0", "--max-tokens", "9")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello\nHello\n", "")
    first, second = double.requests
    assert [m["content"] for m in first["messages"]] == ["S", "hi"]
    assert [m["content"] for m in second["messages"]] == ["S", "hi", "Hello", "again"]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("tiny", 0, 9)
    assert "top_p" not in first  # what was not asked for is the server's to choose


def test_exit_leaves_before_the_input_ends() -> None:
    with serving() as double:
        done = piped("/exit\nhi\n", "--url", double.url)
    assert (done.returncode, done.stdout, double.requests) == (0, "", [])


def test_nobody_there_is_one_line_with_the_remedy() -> None:
    with serving() as double:
        url = double.url
    done = piped("hi\n", "--url", url)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "headrace serve" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_refused_turn_ends_a_pipe_with_status_2() -> None:
    with serving() as double:
        double.refusal = (400, "the prompt is too long")
        done = piped("hi\n", "--url", double.url)
    assert done.returncode == 2
    assert "the prompt is too long" in done.stderr
    assert "Traceback" not in done.stderr


class Terminal:
    """The program on a pseudo-terminal, with everything it wrote so far."""

    def __init__(self, *options: str) -> None:
        self._near, far = pty.openpty()
        self.process = subprocess.Popen([*CHAT, *options], stdin=far, stdout=far, stderr=far, start_new_session=True)
        os.close(far)
        self.text = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._near, 4096)
            except OSError:
                return
            self.text += data.decode(errors="replace")

    def type(self, line: str) -> None:
        os.write(self._near, line.encode() + b"\n")

    def expect(self, text: str, count: int = 1) -> None:
        end = time.monotonic() + 30
        while self.text.count(text) < count:
            assert time.monotonic() < end, f"{text!r} did not come {count} times in {self.text!r}"
            time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_ctrl_c_stops_the_answer_and_keeps_the_talk() -> None:
    with serving() as double:
        double.hold = threading.Event()
        terminal = Terminal("--url", double.url)
        terminal.expect("/help")
        terminal.type("hi")
        terminal.expect("Hello")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.expect("[stopped]")
        double.hold.set()
        terminal.type("again")
        terminal.expect("Hello", 2)
        terminal.expect("first token after", 2)
        terminal.type("/exit")
        assert terminal.process.wait(30) == 0
    assert [m["content"] for m in double.requests[1]["messages"]] == ["hi", "Hello", "again"]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_an_error_does_not_end_an_interactive_talk() -> None:
    with serving() as double:
        double.refusal = (429, "queue is full")
        terminal = Terminal("--url", double.url)
        terminal.type("hi")
        terminal.expect("queue is full")
        double.refusal = None
        terminal.type("again")
        terminal.expect("Hello")
        terminal.type("/exit")
        assert terminal.process.wait(30) == 0
    assert [m["content"] for m in double.requests[1]["messages"]] == ["again"]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_ctrl_c_at_the_prompt_leaves_with_130() -> None:
    with serving() as double:
        terminal = Terminal("--url", double.url)
        terminal.expect(">\x1b[0m ")
        os.kill(terminal.process.pid, signal.SIGINT)
        assert terminal.process.wait(30) == 130
