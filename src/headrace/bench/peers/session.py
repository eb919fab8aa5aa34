"""A running engine: a child process that is spoken to in lines of JSON, and that may hang, crash or talk nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.core.errors import HeadraceError

LOAD_S, CONVERT_S, ANSWER_S, CLOSE_S = 600.0, 1800.0, 120.0, 15.0
"""How long a driver may take, in seconds: to load a model, to convert one, to generate, to end."""
OVERTIME_S = 30.0
"""How much longer than its cut-off a replay may take: a step that has begun ends first."""


class PeerFailed(HeadraceError):
    """A peer hung, crashed, answered nonsense or refused. It costs the peer's rows and nothing else."""

    code = "peer_failed"


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens per prompt, and the seconds the driver measured around the call."""

    tokens: list[list[int]]
    seconds: float


class Driver:
    """A driver's process and the exchange with it: one question at a time. A context manager.

    Args:
        name: for messages.
        command: the driver's command line.
        environment: of the process; its threads are set there.

    Raises:
        PeerFailed: the process cannot be started.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._dead = False
        try:
            # A session of its own, so that servers and pools it starts can be stopped and ended with it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise PeerFailed(f"{name} does not start: {error}") from error
        threading.Thread(target=self._read, name=f"peer-{name}", daemon=True).start()

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            PeerFailed: the driver refused (it can be asked again), or it hung, ended or answered nonsense: then it is killed.
        """
        if self._dead:
            raise PeerFailed(f"{self.name} is not running")
        line = json.dumps({"op": op, **arguments}) + "\n"
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(line.encode())
            stdin.flush()
            answer = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise self._killed(f"gave no answer to {op!r} within {timeout_s:g} s") from None
        except OSError:
            answer = b""
        if not answer:
            raise self._killed(f"ended during {op!r}")
        try:
            found = json.loads(answer)
            good = found["ok"]
        except (ValueError, KeyError, TypeError):
            raise self._killed(f"answered {op!r} with {answer[:80]!r}, which is not the drivers' protocol") from None
        if not good:
            raise PeerFailed(f"{self.name} refused {op!r}: {found.get('error')}")
        return dict(found)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the driver and all it started; nothing happens to one that has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Ask the driver to end, and see that it and everything it started does."""
        if not self._dead:
            with contextlib.suppress(PeerFailed):
                self.ask("close", CLOSE_S)
            self._kill()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def _killed(self, what: str) -> PeerFailed:
        last = self._last_words()
        self._kill()
        status = self._process.returncode
        return PeerFailed(f"{self.name} {what} (status {status}){'; its last words: ' + last if last else ''}")

    def _kill(self) -> None:
        self._dead = True
        self.signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._log):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _last_words(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""


def environment_of(threads: int) -> dict[str, str]:
    """Our environment without what would lead another Python astray, with the thread count every library reads, and offline."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    count = str(threads)
    return kept | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Session:
    """An engine with a model loaded. A context manager.

    Attributes:
        name: the engine's name.
        precision: the class of weights asked for.
        ran: in which precision it really computes, in the engine's words.
        url, model: its OpenAI-compatible API and the model's name there, or None.
    """

    def __init__(self, driver: Driver, precision: str, loaded: Mapping[str, Any]) -> None:
        self.name = driver.name
        self.precision = precision
        self.ran = str(loaded.get("ran", precision))
        self.url: str | None = loaded.get("url")
        self.model: str | None = loaded.get("model")
        self._driver = driver

    def generate(self, prompts: list[list[int]], new: int, *, timeout_s: float = ANSWER_S) -> Answer:
        """``new`` greedy tokens per prompt, end-of-text ignored.

        Raises:
            PeerFailed: as :meth:`Driver.ask`, or there were more or fewer tokens than asked for.
        """
        found = self._driver.ask("generate", timeout_s, prompts=prompts, new=new)
        tokens = found.get("tokens", [])
        if [len(row) for row in tokens] != [new] * len(prompts):
            raise PeerFailed(
                f"{self.name} made {[len(row) for row in tokens]} tokens where {new} were wanted from each of {len(prompts)}"
            )
        return Answer(tokens, float(found["seconds"]))

    def replay(self, requests: Sequence[Mapping[str, Any]], cutoff_s: float) -> list[dict[str, Any]]:
        """Open loop inside the peer's process.

        Args:
            requests: each with ``id``, ``at_s``, ``prompt`` (token ids) and ``new``.
            cutoff_s: seconds from the start after which the peer is to cancel what is open.

        Returns:
            Per request ``id``, ``at_s``, ``first_s``, ``end_s`` (seconds from the start, where it came that far) and ``tokens``.

        Raises:
            PeerFailed: as :meth:`Driver.ask`; also for engines without such a mode, which can be asked other things afterwards.
        """
        answer = self._driver.ask("replay", cutoff_s + OVERTIME_S, requests=list(requests), cutoff_s=cutoff_s)
        rows: list[dict[str, Any]] = answer["rows"]
        return rows

    def pause(self) -> None:
        """Stop every thread of the engine, so that none spins while others are measured."""
        self._driver.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        self._driver.signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process, paused or not."""
        self.resume()
        self._driver.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_driver(name: str, python: Path, script: Path, arguments: Sequence[str], threads: int) -> Driver:
    """The process of a driver script under an interpreter."""
    return Driver(name, [str(python), str(script), *arguments], environment_of(threads))
