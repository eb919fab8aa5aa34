"""What chat and text completions have in common: submitting, streaming or collecting, and letting go."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest
from starlette.responses import Response

from headrace.core.protocols import ModelCard
from headrace.core.request import Request, SamplingParams
from headrace.core.retrieval import Retrieval
from headrace.server.api.feed import Feed
from headrace.server.api.schemas import GenerationBody
from headrace.server.api.shape import Shape
from headrace.server.api.stream import EventStream, watching
from headrace.server.errors import json_response
from headrace.server.guards.access import CLIENT_LEFT
from headrace.server.serving import Serving
from headrace.server.slo.targets import SLOHeaders, Targets, resolve

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer

_SPECULATE = {"on": True, "off": False, "auto": None, None: None}


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of an answer starts with."""

    id: str
    created: int
    model: str
    fingerprint: str
    tier: str | None

    def as_dict(self, kind: str) -> dict[str, Any]:
        """The fields, with ``object`` set to ``kind``."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "service_tier": self.tier,
        }


@dataclass(frozen=True, slots=True)
class Job:
    """A request that has been understood and tokenised."""

    head: Head
    requests: tuple[Request, ...]
    tokenizer: Tokenizer
    targets: Targets


def make_job(
    serving: Serving,
    http: HttpRequest,
    body: GenerationBody,
    *,
    prefix: str,
    card: ModelCard,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    headers: SLOHeaders,
) -> Job:
    """Turn prompts and parameters into engine requests, with the client's targets, priority and label."""
    name = f"{prefix}-{uuid.uuid4().hex}"
    targets = resolve(body, headers, serving.settings.slo_classes)
    requests = tuple(
        Request(
            id=name if len(prompts) == 1 else f"{name}-{number}",
            prompt=tuple(prompt),
            params=params,
            priority=body.priority or 0,
            slo=targets.slo,
            tier=targets.name,
            arrival=getattr(http.state, "arrival", 0.0) or time.monotonic(),
            cache_salt=body.cache_salt or "",
            owner=getattr(http.state, "owner", ""),
            speculate=_SPECULATE[body.speculate],
            kv=None if body.kv is None else Retrieval(body.kv.mode, body.kv.budget),
        )
        for number, prompt in enumerate(prompts)
    )
    head = Head(name, int(time.time()), card.name, serving.fingerprint(), targets.tier)
    return Job(head, requests, tokenizer, targets)


async def answer(serving: Serving, http: HttpRequest, body: GenerationBody, job: Job, shape: Shape) -> Response:
    """Submit the job and answer in full or as a stream. The feed is closed whichever way this ends."""
    feed = Feed(
        serving.service,
        job.tokenizer,
        job.requests,
        slo_class=job.targets.name,
        on_open=serving.opened,
        on_close=_closer(serving, http),
    )
    await feed.open()
    try:
        if not body.stream:
            return await _collect(feed, http, shape)
        settings = serving.settings
        constrained = job.requests[0].params.structure is not None
        async with watching(http.receive, feed.abandon):
            await feed.settle(settings.grammar_wait_s if constrained else settings.accept_wait_s)
        if feed.error is not None:
            raise feed.error
        options = body.stream_options
        return EventStream(
            feed,
            shape,
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            settings=settings,
        )
    except BaseException:
        await feed.close()
        raise


def _closer(serving: Serving, http: HttpRequest) -> Callable[[Feed], None]:
    endpoint = http.url.path.rsplit("/v1/", 1)[-1].replace("/", "_")

    def close(feed: Feed) -> None:
        serving.closed(feed)
        outcome = feed.outcome()
        serving.metrics.count_outcome(endpoint, outcome)
        http.state.note = outcome.note(feed.requests[0].id)

    return close


async def _collect(feed: Feed, http: HttpRequest, shape: Shape) -> Response:
    """Wait for the whole answer, or for the client to leave."""
    async with watching(http.receive, feed.abandon):
        while not feed.done:
            await feed.wait()
    await feed.close()
    if feed.error is not None:
        raise feed.error
    if feed.gone:
        return Response(status_code=CLIENT_LEFT)  # nobody reads it; the log shows it
    return json_response(shape.reply(feed.take(), feed.outcome().usage()))
