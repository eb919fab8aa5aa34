"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from headrace.core.errors import InvalidRequest
from headrace.server.api import refused
from headrace.server.api.feed import Piece
from headrace.server.api.generate import Head, answer, make_job
from headrace.server.api.logprobs import CompletionLogprobs
from headrace.server.api.prompts import Prompt, completion_prompts, fit
from headrace.server.api.replies import CompletionReply, error_replies, or_stream
from headrace.server.api.sampling import sampling_params
from headrace.server.api.schemas import CompletionBody
from headrace.server.guards.limits import require_json
from headrace.server.serving import Server
from headrace.server.slo.targets import Headers

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer

router = APIRouter(dependencies=[Depends(require_json)])

DEFAULT_MAX_TOKENS = 16


class CompletionShape:
    """Text continuations. ``echoes`` has, per choice, the prompt's text to put before it (empty for none)."""

    def __init__(self, head: Head, tokenizer: Tokenizer, *, logprobs: bool, echoes: Sequence[str]) -> None:
        self._echoes = echoes
        self._head = head.as_dict("text_completion")
        self._logprobs = [CompletionLogprobs(tokenizer, len(echo)) for echo in echoes] if logprobs else None

    def reply(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        return {**self._head, "choices": [self._choice(piece) for piece in pieces], "usage": usage}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """One event."""
        return [{**self._head, "choices": [self._choice(piece)]}]

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last event, without choices."""
        return {**self._head, "choices": [], "usage": usage}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._logprobs[piece.index].render(piece.logprobs)
        return {
            "index": piece.index,
            "text": (self._echoes[piece.index] if piece.first else "") + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }


@router.post(
    "/v1/completions",
    response_model=CompletionReply,
    responses={200: or_stream("text_completion"), **error_replies(400, 401, 404, 408, 413, 415, 429, 500, 503)},
)
async def completions(request: Request, body: CompletionBody, server: Server, headers: Headers) -> Response:
    """Continue one or more prompts."""
    card = server.check_model(body.model)
    refused.check(body)
    if body.echo and body.logprobs is not None:
        raise InvalidRequest(
            "echo with logprobs would need log-probabilities of the prompt, which are not served: leave one of them out",
            field="echo",
            code="unsupported_parameter",
        )
    tokenizer = await server.tokenizer()
    prompts = await completion_prompts(server, tokenizer, body)
    ids = [prompt.tokens for prompt in prompts]
    max_tokens = fit(card, ids, body.max_tokens, field="max_tokens", default=DEFAULT_MAX_TOKENS)
    params = sampling_params(body, max_tokens)
    job = make_job(
        server,
        request,
        body,
        prefix="cmpl",
        card=card,
        tokenizer=tokenizer,
        prompts=ids,
        params=params,
        headers=headers,
    )
    echoes = _echoes(prompts, params.n, bool(body.echo))
    shape = CompletionShape(job.head, tokenizer, logprobs=params.logprobs is not None, echoes=echoes)
    return await answer(server, request, body, job, shape)


def _echoes(prompts: Sequence[Prompt], n: int, echo: bool) -> list[str]:
    return [prompt.text if echo else "" for prompt in prompts for _ in range(n)]
