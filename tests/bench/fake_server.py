"""An HTTP server that answers completions as badly as a test wants: slow, stuck, refusing, or cutting its stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import Any


class FakeServer:
    """Serves in a thread of its own until closed. How a request is treated is said by its ``user``:

    "" streams ``max_tokens`` tokens, one every ``tick_s``; "stuck" never answers; "429" and "500" refuse; "cut" closes the
    connection in the middle of the stream; "early" ends it properly but without a finish reason; "error" sends an error event;
    "nonsense" speaks no HTTP.
    """

    def __init__(self, tick_s: float = 0.002) -> None:
        self.tick_s = tick_s
        self.bodies: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))  # so that they end on a loop that still runs
        self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await self._take(reader, writer)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
            )
            body = json.loads(await reader.readexactly(size))
            self.bodies.append(body)
            await self._answer(writer, body, body.get("user", ""))
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any], kind: str) -> None:
        if kind == "stuck":
            await asyncio.sleep(3600)
        if kind == "nonsense":
            writer.write(b"220 smtp ready\r\n\r\n")
            return
        if kind in ("429", "500"):
            content = json.dumps({"error": {"message": f"refused with {kind}"}}).encode()
            writer.write(b"HTTP/1.1 %s No\r\ncontent-length: %d\r\n\r\n%s" % (kind.encode(), len(content), content))
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        count = body["max_tokens"]
        for number in range(count):
            await asyncio.sleep(self.tick_s)
            last = number == count - 1
            if kind == "cut" and number == count // 2:
                return
            if kind == "error" and number == count // 2:
                _event(writer, {"error": {"message": "the engine stopped"}})
                break
            reason = "length" if last and kind != "early" else None
            # Half of an event at a time, as a network may have it.
            _event(
                writer,
                {"choices": [{"index": 0, "text": "x", "finish_reason": reason}], "usage": None},
                halves=number == 1,
            )
        usage = {"completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 7},
                 "slo": {"achieved": {"ttft_ms": 1.5}}}  # fmt: skip
        if kind not in ("early", "error"):
            _event(writer, {"choices": [], "usage": usage})
            _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")


def _event(writer: asyncio.StreamWriter, content: dict[str, Any], *, halves: bool = False) -> None:
    data = b": a comment\n\ndata: " + json.dumps(content).encode() + b"\n\n"
    cut = len(data) // 2 if halves else len(data)
    for part in (data[:cut], data[cut:]):
        if part:
            _chunk(writer, part)


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
