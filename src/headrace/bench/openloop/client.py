"""A load client in a process of its own: ``python -m headrace.bench.openloop.client`` reads a job from standard input.

Open loop: every request goes out when it is due, however many answers are still missing. Closed loop (``concurrency`` set):
so many requests are open at any time. The job is one JSON object with the fields of :class:`Job`; what comes back is one JSON
line per request as it ends (:meth:`Answer.row`) and a last one that says how punctual the client itself was
(:meth:`Punctuality.row`). HTTP/1.1 is spoken over asyncio's streams, a connection per request: client and server share the
cores of one machine, so what the client spends distorts what it measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

HEARTBEAT_S = 0.02
LATE_MS = 5.0
"""A request sent later than this after it was due counts as late."""

MOST_TEXT = 300


@dataclass(slots=True)
class Job:
    """What to send.

    Attributes:
        url: OpenAI base URL, ``http://host:port/v1``.
        shots: requests in order of time: {"id", "at_s", "body"}; ``body`` is posted to ``/completions``.
        cutoff_s: when to give up on what is still open, seconds since the start.
        concurrency: closed loop with so many open requests, ``at_s`` ignored; None is open loop.
        gaps: whether to tell the milliseconds between tokens as well.
    """

    url: str
    shots: list[dict[str, Any]]
    cutoff_s: float
    concurrency: int | None = None
    gaps: bool = False


@dataclass(slots=True)
class Answer:
    """One request's answer while it comes in; times are seconds since the start, None for "not yet"."""

    id: str
    at_s: float
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None
    end_s: float = 0.0
    events: int = 0
    finished: bool = False
    error: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    gaps_ms: list[float] | None = None

    def take(self, line: bytes, now: float) -> None:
        """Take in one line of an event stream."""
        if not line.startswith(b"data:"):
            return
        text = line[5:].strip()
        if text == b"[DONE]":
            return
        event = json.loads(text)
        if event.get("error"):
            self.error = _message(event)
        self.usage = event.get("usage") or self.usage
        choices = event.get("choices")
        if choices:
            self.events += 1
            if self.gaps_ms is not None and self.last_s is not None:
                self.gaps_ms.append(round((now - self.last_s) * 1e3, 3))
            self.first_s = now if self.first_s is None else self.first_s
            self.last_s = now
            self.finished = self.finished or choices[0].get("finish_reason") is not None

    def row(self) -> dict[str, Any]:
        """The line that the client writes. ``tokens`` are the server's count, or else the events that came."""
        details = self.usage.get("prompt_tokens_details") or {}
        achieved = (self.usage.get("slo") or {}).get("achieved") or {}
        return {
            "id": self.id,
            "at_s": self.at_s,
            "sent_s": self.sent_s,
            "first_s": self.first_s,
            "last_s": self.last_s,
            "end_s": self.end_s,
            "tokens": self.usage.get("completion_tokens", self.events),
            "cached_tokens": details.get("cached_tokens", 0),
            "engine_ttft_ms": achieved.get("ttft_ms"),
            "finished": self.finished and self.error is None,
            "error": self.error,
            **({} if self.gaps_ms is None else {"gaps_ms": self.gaps_ms}),
        }


@dataclass(slots=True)
class Punctuality:
    """Whether the client kept its own time: how late each request left, and how late its event loop came round."""

    lags_ms: list[float] = field(default_factory=list)
    loop_ms: list[float] = field(default_factory=list)

    def row(self, wall_s: float) -> dict[str, Any]:
        """The client's last line."""
        lags, loop = sorted(self.lags_ms), sorted(self.loop_ms)
        return {
            "sent": len(lags),
            "late": sum(lag > LATE_MS for lag in lags),
            "lag_ms_p50": _quantile(lags, 0.5),
            "lag_ms_max": lags[-1] if lags else 0.0,
            "loop_lag_ms_p99": _quantile(loop, 0.99),
            "client_cpu_s": time.process_time(),
            "wall_s": wall_s,
        }


class Client:
    """Sends a job's requests and reports each answer as it ends."""

    def __init__(self, job: Job) -> None:
        parts = urlsplit(job.url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._job = job
        # Written out before the clock starts: making a body is not what is measured.
        path = f"{parts.path.rstrip('/')}/completions"
        self._bodies = [_request(path, parts.netloc, shot["body"]) for shot in job.shots]
        self._start = 0.0
        self.punctuality = Punctuality()

    async def run(self) -> None:
        """Send everything, and wait for the answers until ``cutoff_s``."""
        loop = asyncio.get_running_loop()
        self._start = loop.time() + 0.05
        heart = asyncio.create_task(self._heartbeat())
        tasks: set[asyncio.Task[None]] = set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._start + self._job.cutoff_s):
                await (self._open_loop(tasks) if self._job.concurrency is None else self._closed_loop(tasks))
                await asyncio.gather(*tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        heart.cancel()
        _write(self.punctuality.row(loop.time() - self._start))

    async def _open_loop(self, tasks: set[asyncio.Task[None]]) -> None:
        for number, shot in enumerate(self._job.shots):
            await asyncio.sleep(max(0.0, self._start + shot["at_s"] - self._now()))
            tasks.add(asyncio.create_task(self._one(number, shot)))

    async def _closed_loop(self, tasks: set[asyncio.Task[None]]) -> None:
        coming: Iterator[tuple[int, dict[str, Any]]] = enumerate(self._job.shots)

        async def worker() -> None:
            for number, shot in coming:
                await self._one(number, {**shot, "at_s": self._now() - self._start})

        tasks.update(asyncio.create_task(worker()) for _ in range(self._job.concurrency or 1))

    async def _one(self, number: int, shot: dict[str, Any]) -> None:
        answer = Answer(shot["id"], shot["at_s"], gaps_ms=[] if self._job.gaps else None)
        answer.sent_s = self._now() - self._start
        self.punctuality.lags_ms.append((answer.sent_s - answer.at_s) * 1e3)
        try:
            await self._exchange(self._bodies[number], answer)
        except asyncio.CancelledError:
            answer.error = "cut off"
            raise
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            cut = isinstance(error, EOFError)  # asyncio.IncompleteReadError is one
            answer.error = "the stream was cut" if cut else f"{type(error).__name__}: {error}"[:MOST_TEXT]
        finally:
            answer.end_s = self._now() - self._start
            if not answer.finished and answer.error is None:
                answer.error = "the stream ended before its last token"
            _write(answer.row())

    async def _exchange(self, request: bytes, answer: Answer) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request)
            status, headers = await _head(reader)
            if status != 200:
                answer.error = f"HTTP {status}: {_message(_as_json(await _whole(reader, headers)))}"[:MOST_TEXT]
                return
            rest = b""
            async for data in _chunks(reader, headers):
                *lines, rest = (rest + data).split(b"\n")
                now = self._now() - self._start
                for line in lines:
                    answer.take(line, now)
        finally:
            writer.close()

    async def _heartbeat(self) -> None:
        while True:
            due = self._now() + HEARTBEAT_S
            await asyncio.sleep(HEARTBEAT_S)
            self.punctuality.loop_ms.append(max(0.0, self._now() - due) * 1e3)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _request(path: str, host: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\naccept: text/event-stream\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + content


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first = (await reader.readuntil(b"\r\n")).split(b" ", 2)
    if len(first) < 2 or not first[0].startswith(b"HTTP/"):
        raise ValueError(f"no HTTP answer: {first[0][:40]!r}")
    headers: dict[str, str] = {}
    while line := (await reader.readuntil(b"\r\n")).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(first[1]), headers


async def _chunks(reader: asyncio.StreamReader, headers: dict[str, str]) -> Any:
    """The body's parts as they come; raises EOFError when it ends before it should."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while data := await reader.read(1 << 16):
            yield data


async def _whole(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    return b"".join([part async for part in _chunks(reader, headers)])


def _as_json(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError:
        return {"error": content.decode("utf-8", "replace")}
    return data if isinstance(data, dict) else {"error": str(data)}


def _message(data: dict[str, Any]) -> str:
    error = data.get("error", data)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:MOST_TEXT]


def _quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def _write(row: dict[str, Any]) -> None:
    print(json.dumps(row, separators=(",", ":")), flush=True)


def main() -> None:
    """Entry point of the client's process."""
    job = Job(**json.load(sys.stdin))
    client = Client(job)
    gc.freeze()
    gc.disable()  # a collection would delay whatever is due meanwhile
    asyncio.run(client.run())


if __name__ == "__main__":
    main()
