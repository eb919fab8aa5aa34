"""Checks a request against what the engine can ever serve, and fills in what it left open. Pure; used on both sides."""

from __future__ import annotations

import secrets
from dataclasses import replace

from headrace.core.errors import ContextTooLong, InvalidRequest
from headrace.core.policy import Limits
from headrace.core.protocols import ModelCard
from headrace.core.request import Request
from headrace.core.retrieval import Retrieval


def complete_request(request: Request, card: ModelCard, limits: Limits, *, now: float) -> Request:
    """Return ``request`` with ``max_tokens``, ``seed`` and ``arrival`` set.

    Raises:
        ContextTooLong: prompt plus wanted output exceed ``card.context``.
        InvalidRequest: empty prompt, ids outside the vocabulary, ``n`` above the sequences that can run.
    """
    prompt, params = request.prompt, request.params
    if not prompt:
        raise InvalidRequest("prompt holds no token: give at least one", field="prompt")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= card.vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(
            f"prompt holds token id {bad}, outside the model's vocabulary 0..{card.vocab_size - 1}", field="prompt"
        )
    for token in (*params.logit_bias, *params.stop_token_ids):
        if not 0 <= token < card.vocab_size:
            name = "logit_bias" if token in params.logit_bias else "stop_token_ids"
            raise InvalidRequest(
                f"{name} holds token id {token}, outside the vocabulary 0..{card.vocab_size - 1}", field=name
            )
    if params.n > limits.max_sequences:
        raise InvalidRequest(
            f"n is {params.n}, but the server runs at most {limits.max_sequences} sequences at once: lower n", field="n"
        )
    room = card.context - len(prompt)
    wanted = max(params.max_tokens or 1, params.min_tokens)
    if room < wanted:
        raise ContextTooLong(
            f"the prompt has {len(prompt)} tokens and {wanted} more are asked for, but the context holds "
            f"{card.context}: shorten the prompt" + (" or lower max_tokens" if room > 0 else ""),
            field="prompt" if room <= 0 else "max_tokens",
        )
    return replace(
        request,
        params=params.with_(
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
        ),
        arrival=request.arrival or now,
    )


def with_retrieval(request: Request, default: Retrieval | None) -> Request:
    """``request`` with its way to read the context settled; None where it reads all of it always.

    Raises:
        InvalidRequest: it insists on retrieval, and ``default`` is None: the engine cannot.
    """
    wish = request.kv or default
    if wish is not None and wish.mode == "full":
        wish = None
    if default is None and wish is not None:
        if wish.mode == "auto":
            return replace(request, kv=None)
        raise InvalidRequest(
            "this model reads its whole context here (retrieval needs a CPU with a C++ compiler, plain full attention and one rank): "
            "leave kv out, or give kv.mode auto",
            field="kv.mode",
        )
    return replace(request, kv=wish)
