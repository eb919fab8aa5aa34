"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from headrace.server.api import refused
from headrace.server.api.feed import Piece
from headrace.server.api.generate import Head, answer, make_job
from headrace.server.api.logprobs import chat_logprobs
from headrace.server.api.prompts import chat_prompt, fit
from headrace.server.api.replies import ChatReply, error_replies, or_stream
from headrace.server.api.sampling import sampling_params
from headrace.server.api.schemas import ChatBody
from headrace.server.guards.limits import require_json
from headrace.server.serving import Server
from headrace.server.slo.targets import Headers

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer

router = APIRouter(dependencies=[Depends(require_json)])


class ChatShape:
    """Chat answers: a message, or a stream of deltas that starts with the role."""

    def __init__(self, head: Head, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._whole, self._chunk = head.as_dict("chat.completion"), head.as_dict("chat.completion.chunk")

    def reply(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs_of(piece),
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
            }
            for piece in pieces
        ]
        return {**self._whole, "choices": choices, "usage": usage}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Role, text and finish reason, each where there is one."""
        made = []
        if piece.first:
            made.append(self._event(piece.index, {"role": "assistant", "content": ""}))
        if piece.text or piece.logprobs:
            made.append(self._event(piece.index, {"content": piece.text}, logprobs=self._logprobs_of(piece)))
        if piece.finish_reason is not None:
            made.append(self._event(piece.index, {}, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason))
        return made

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last event, without choices."""
        return {**self._chunk, "choices": [], "usage": usage}

    def _event(self, index: int, delta: dict[str, Any], **rest: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **rest}
        return {**self._chunk, "choices": [choice]}

    def _logprobs_of(self, piece: Piece) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, piece.logprobs) if self._logprobs else None


@router.post(
    "/v1/chat/completions",
    response_model=ChatReply,
    responses={200: or_stream("chat.completion.chunk"), **error_replies(400, 401, 404, 408, 413, 415, 429, 500, 503)},
)
async def chat_completions(request: Request, body: ChatBody, server: Server, headers: Headers) -> Response:
    """Answer a conversation."""
    card = server.check_model(body.model)
    refused.check(body)
    tokenizer = await server.tokenizer()
    prompt = await chat_prompt(server, tokenizer, body)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = fit(card, [prompt], getattr(body, field), field=field, default=None)
    params = sampling_params(body, max_tokens)
    job = make_job(
        server,
        request,
        body,
        prefix="chatcmpl",
        card=card,
        tokenizer=tokenizer,
        prompts=[prompt],
        params=params,
        headers=headers,
    )
    shape = ChatShape(job.head, tokenizer, logprobs=params.logprobs is not None)
    return await answer(server, request, body, job, shape)
