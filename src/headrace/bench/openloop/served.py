"""``headrace serve`` as a child: started as anybody would start it, watched, stopped, and stopped for good when we end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from headrace.core.errors import EngineUnavailable

START_S = 240.0
STOP_S = 5.0
LISTENING = re.compile(r"listens at (\S+)")
METRIC = re.compile(r"^headrace_(\w+?)(?:_total)? ([-+0-9.eE]+)$", re.MULTILINE)


class Served:
    """A server process over the engine's process, and what can be seen of both from outside.

    Args:
        model: folder, hub name or ``bundled``.
        options: further options of ``headrace serve``.
        timeout_s: how long it may take until requests are served.

    Raises:
        EngineUnavailable: it ended or did not become ready; the message has its last line.
    """

    def __init__(self, model: str, options: Sequence[str] = (), *, timeout_s: float = START_S) -> None:
        handle, name = tempfile.mkstemp(prefix="headrace-serve-", suffix=".log")
        self._log = Path(name)
        command = [sys.executable, "-m", "headrace", "serve", model, "--port", "0", "--drain-timeout", "1", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=handle, stdin=subprocess.DEVNULL, start_new_session=True
        )
        os.close(handle)
        try:
            self.root = self._wait_ready(time.monotonic() + timeout_s)
            card = httpx.get(f"{self.root}/v1/models", timeout=10, trust_env=False).json()["data"][0]
            self.model, self.context = str(card["id"]), int(card["max_model_len"])
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """OpenAI base URL."""
        return f"{self.root}/v1"

    @property
    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self.process.poll() is None

    def stats(self) -> dict[str, float]:
        """Gauges and counters without labels, by name without ``headrace_`` and ``_total``; empty when there is no answer."""
        try:
            text = httpx.get(f"{self.root}/metrics", timeout=5, trust_env=False).text
        except httpx.HTTPError:
            return {}
        return {name: float(value) for name, value in METRIC.findall(text)}

    def processes(self) -> dict[str, Any]:
        """psutil's processes: "server", and "engine" where it runs."""
        import psutil

        server = psutil.Process(self.process.pid)
        found = {"server": server}
        for child in server.children():
            if any("spawn_main" in part for part in child.cmdline()):
                found["engine"] = child
        return found

    def pause(self) -> None:
        """Stop server and engine where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End server and engine, and remove the log; harmless when called again."""
        if self.alive:
            self.resume()
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self._signal(signal.SIGKILL)  # whoever is left of its group
        self.process.wait()
        self._log.unlink(missing_ok=True)

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _wait_ready(self, end: float) -> str:
        root = ""
        while time.monotonic() < end:
            if not self.alive:
                break
            if not root:
                found = LISTENING.search(self._log.read_text(errors="replace"))
                root = found[1] if found else ""
            elif self._healthy(root):
                return root
            time.sleep(0.1)
        said = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        why = "ended" if not self.alive else "did not become ready in time"
        raise EngineUnavailable(f"headrace serve {why}: {said[-1]}")

    @staticmethod
    def _healthy(root: str) -> bool:
        try:
            return httpx.get(f"{root}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False
