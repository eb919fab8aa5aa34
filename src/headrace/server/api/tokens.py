"""POST /tokenize and /detokenize, as in vLLM."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.responses import Response

from headrace.core.errors import InvalidRequest
from headrace.server.api.prompts import chat_prompt, off_loop
from headrace.server.api.replies import DetokenizeReply, TokenizeReply, error_replies
from headrace.server.api.schemas import DetokenizeBody, TokenizeBody
from headrace.server.errors import encode, json_response
from headrace.server.guards.limits import require_json
from headrace.server.serving import Server

router = APIRouter(dependencies=[Depends(require_json)])

_ERRORS = error_replies(400, 401, 404, 408, 413, 415, 429, 500, 503)


@router.post("/tokenize", response_model=TokenizeReply, responses=_ERRORS)
async def tokenize(body: TokenizeBody, server: Server) -> Response:
    """Token ids of a prompt or of a conversation."""
    card = server.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", field="prompt")
    tokenizer = await server.tokenizer()
    if body.messages is not None:
        tokens = list(await chat_prompt(server, tokenizer, body))
    else:
        text, special = body.prompt or "", body.add_special_tokens is not False
        tokens = await off_loop(server, len(text), "prompt", lambda: tokenizer.encode(text, special))

    def answer() -> bytes:
        texts = [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        return encode({"tokens": tokens, "count": len(tokens), "max_model_len": card.context, "token_strs": texts})

    content = await off_loop(server, len(tokens), "prompt", answer)
    return Response(content, media_type="application/json")


@router.post("/detokenize", response_model=DetokenizeReply, responses=_ERRORS)
async def detokenize(body: DetokenizeBody, server: Server) -> Response:
    """Text of token ids."""
    server.check_model(body.model)
    tokenizer = await server.tokenizer()
    if any(token >= tokenizer.vocab_size for token in body.tokens):
        raise InvalidRequest(f"tokens holds an id outside 0..{tokenizer.vocab_size - 1}", field="tokens")
    skip = bool(body.skip_special_tokens)

    def decode() -> str:
        return tokenizer.decode(body.tokens, skip_special_tokens=skip)

    return json_response({"prompt": await off_loop(server, len(body.tokens), "tokens", decode)})
