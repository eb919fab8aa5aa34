"""``headrace serve`` from the outside."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time


class Program:
    """``headrace serve`` as a child, with what it wrote to its error stream."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "headrace", "serve", "--port", "0", "--threads", "1", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.text = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.text += line

    def expect(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.text)) is None:
            assert time.monotonic() < end, f"{pattern!r} did not come in {self.text!r}"
            time.sleep(0.05)
        return found

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
