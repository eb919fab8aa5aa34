"""A hundred clients of every kind at once: patient, hasty, slow, and wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

JSON = {"content-type": "application/json"}
MALFORMED: list[tuple[str, bytes]] = [
    ("/v1/completions", b"{"),
    ("/v1/completions", b"{}"),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}'),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": 100000}'),
    ("/v1/completions", b'{"prompt": "a", "model": "other"}'),
    ("/v1/completions", b'{"prompt": [99999999]}'),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN, "stream": true}'),
    ("/v1/completions", b'{"prompt": "a", "guided_regex": "(", "stream": true}'),
    ("/v1/chat/completions", b'{"messages": []}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}'),
    ("/v1/chat/completions", b"[" * 50_000),
    ("/detokenize", b'{"tokens": [-1]}'),
    ("/nowhere", b"{}"),
]


@dataclass
class Report:
    """What the clients met: how often each kind went well, and everything that did not."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Swarm:
    """Clients that call ``url`` until ``seconds`` have passed.

    Args:
        url: where the server listens.
        clients: how many at once.
        seconds: for how long new requests are begun.
        max_tokens: longest answer asked for.
        seed: of what each client does.
    """

    def __init__(self, url: str, *, clients: int, seconds: float, max_tokens: int, seed: int = 0) -> None:
        self._url, self._clients, self._seconds, self._max_tokens = url, clients, seconds, max_tokens
        self._random = random.Random(seed)
        self.report = Report()
        self._kinds: list[tuple[int, str, Callable[[], Awaitable[None]]]] = [
            (35, "streamed", self._streamed),
            (10, "whole", self._whole),
            (20, "left a stream", self._leaves_stream),
            (10, "left a wait", self._leaves_wait),
            (10, "read slowly", self._slow),
            (15, "malformed", self._malformed),
        ]

    def run(self) -> Report:
        """Let them loose; returns when the last has finished."""
        asyncio.run(self._run())
        return self.report

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=self._clients * 2, max_keepalive_connections=self._clients)
        end = time.monotonic() + self._seconds
        async with httpx.AsyncClient(
            base_url=self._url, limits=limits, timeout=120, verify=False, trust_env=False
        ) as self._http:
            await asyncio.gather(*(self._client(end) for _ in range(self._clients)))

    async def _client(self, end: float) -> None:
        while time.monotonic() < end:
            _, name, act = self._random.choices(self._kinds, weights=[kind[0] for kind in self._kinds])[0]
            try:
                await act()
            except Exception as error:
                self.report.wrong.append(f"{name}: {error!r}")
                await asyncio.sleep(0.1)
            else:
                self.report.done[name] += 1

    def _request(self, **more: Any) -> tuple[str, dict[str, Any]]:
        pick = self._random
        words = " ".join(pick.choices(["river", "mill", "wheel", "stone", "water", "light"], k=pick.randint(1, 40)))
        body: dict[str, Any] = {"max_tokens": pick.randint(1, self._max_tokens), "n": pick.choice([1, 1, 1, 2]), **more}
        if pick.random() < 0.3:
            body["stop"] = [pick.choice(["the", "e", "."])]
        if pick.random() < 0.5:
            return "/v1/completions", {"prompt": words, **body}
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": words}], **body}

    async def _streamed(self, pause_s: float = 0.0) -> None:
        path, body = self._request(stream=True, stream_options={"include_usage": True})
        finished, events = 0, []
        async with self._http.stream("POST", path, json=body) as reply:
            _check(reply.status_code == 200, reply.status_code)
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])
                if pause_s:
                    await asyncio.sleep(pause_s)
        _check(events[-1] == "[DONE]", events[-1])
        for event in map(json.loads, events[:-1]):
            _check("error" not in event, event)
            finished += sum(choice["finish_reason"] is not None for choice in event["choices"])
        _check(finished == body["n"], f"{finished} of {body['n']} choices ended")

    async def _slow(self) -> None:
        await self._streamed(pause_s=0.05)

    async def _whole(self) -> None:
        path, body = self._request()
        reply = await self._http.post(path, json=body)
        _check(reply.status_code == 200, reply.text)
        _check(len(reply.json()["choices"]) == body["n"], reply.text)

    async def _leaves_stream(self) -> None:
        path, body = self._request(stream=True, ignore_eos=True)
        left = self._random.randint(0, 12)
        async with self._http.stream("POST", path, json=body) as reply:
            _check(reply.status_code == 200, reply.status_code)
            async for _ in reply.aiter_lines():
                left -= 1
                if left <= 0:
                    return

    async def _leaves_wait(self) -> None:
        path, body = self._request(ignore_eos=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._random.uniform(0.01, 0.5)):
                await self._http.post(path, json=body)

    async def _malformed(self) -> None:
        path, body = self._random.choice(MALFORMED)
        reply = await self._http.post(path, content=body, headers=JSON)
        _check(400 <= reply.status_code < 500, f"{body[:60]!r} got {reply.status_code}: {reply.text[:200]}")
        _check(set(reply.json()) == {"error"}, reply.text)


def _check(good: bool, what: object) -> None:
    if not good:
        raise AssertionError(str(what)[:300])
