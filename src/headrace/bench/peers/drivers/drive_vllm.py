"""vLLM's CPU build: its own server, driven over HTTP on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import loop

PATIENCE_S = 540.0
TYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Vllm(loop.Engine):
    """A server on a free port of the loopback address, prefix reuse off."""

    def load(self, model: str, precision: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "peer",
             "--host", "127.0.0.1", "--port", str(port), "--dtype", TYPES[precision], "--max-model-len", str(context),
             "--max-num-seqs", str(sequences), "--no-enable-prefix-caching"],
            env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._root = f"http://127.0.0.1:{port}"
        self._wait()
        return {"ran": TYPES[precision], "url": f"{self._root}/v1", "model": "peer"}

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                raise RuntimeError(f"the server ended with status {self._server.returncode} while it started")
            try:
                urllib.request.urlopen(f"{self._root}/health", timeout=5).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            else:
                return
        raise RuntimeError(f"the server was not ready within {PATIENCE_S:.0f} s")

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        body = {
            "model": "peer", "prompt": prompts, "max_tokens": new, "temperature": 0.0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self._root}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            choices = json.load(answer)["choices"]
        return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]

    def close(self) -> None:
        self._server.terminate()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()


if __name__ == "__main__":
    loop.run(Vllm())
