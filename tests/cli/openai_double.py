"""A small OpenAI-compatible server, written from the API's documentation, to talk to over a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Double:
    """What the server saw and how it answers.

    ``pieces`` is the answer, one event each; ``refusal`` (status, message) answers chats instead; ``break_off`` sends an error event
    after the first piece; ``hold`` keeps the stream open after the pieces until it is set.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["tiny", "other"]
        self.pieces = ["Hel", "lo"]
        self.refusal: tuple[int, str] | None = None
        self.break_off = False
        self.hold: threading.Event | None = None
        self.url = ""


@contextmanager
def serving() -> Iterator[Double]:
    """Run a :class:`Double` on a free port of the loopback interface."""
    double = Double()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def _json(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            double.keys.append(self.headers["Authorization"])
            self._json(200, {"object": "list", "data": [{"id": name} for name in double.models]})

        def do_POST(self) -> None:
            double.keys.append(self.headers["Authorization"])
            double.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if double.refusal:
                self._json(double.refusal[0], {"error": {"message": double.refusal[1], "type": "x", "code": "x"}})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self._stream()
            except OSError:
                return  # the client left

        def _stream(self) -> None:
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for piece in double.pieces:
                self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
                if double.break_off:
                    self._event({"error": {"message": "the engine died"}})
                    return
            self.wfile.write(b": keep-alive\n\n")
            if double.hold:
                double.hold.wait(30)
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self._event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(double.pieces)}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, body: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    double.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield double
    finally:
        if double.hold:
            double.hold.set()
        server.shutdown()
        server.server_close()
