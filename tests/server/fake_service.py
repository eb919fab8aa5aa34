"""A service that needs no model: it says what a test tells it to, as slowly and as faultily as told."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from headrace.core.errors import EngineUnavailable, HeadraceError, InvalidRequest
from headrace.core.outputs import (
    ACCEPTED,
    STEP_SECONDS,
    STEP_TOKENS,
    Counts,
    EngineStats,
    RequestTiming,
    SequenceDelta,
    TokenLogprobs,
)
from headrace.core.policy import Limits
from headrace.core.protocols import ModelCard, ServiceState
from headrace.core.request import Request
from headrace.engine.process.admission import complete_request

EOS = 256
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 256 + len(SPECIALS)
MODEL = "fake/bytes"
TEMPLATE = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' and loop.first -%}"
    "{{ raise_exception('a conversation does not start with the assistant') }}{%- endif -%}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}{{ suffix | default('') }}"
)


def write_byte_tokenizer(folder: Path) -> Path:
    """Save a tokenizer whose token ``i`` is byte ``i`` (then the specials), so that tests can count tokens by eye."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from headrace.models.text.detokenizer import _byte_alphabet

    vocabulary = _byte_alphabet()
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def echo(request: Request, index: int) -> bytes:
    """Say the prompt again (its bytes; specials left out)."""
    return bytes(token for token in request.prompt if token < 256)


@dataclass
class FakeService:
    """Scripted :class:`headrace.core.protocols.Service`.

    Attributes:
        say: the bytes a sequence generates before end-of-text; repeated without end under ``ignore_eos``.
        delay_s: pause before each step.
        burst: tokens per delta.
        refuse: raised by ``submit`` (``eager``) or before the first delta.
        fail_at, failure: after so many steps the request ends with this error.
        compile_s: how long a regular expression takes to be found good or bad.
        vanish_at: after so many steps the iterator just ends, as no good service does.
    """

    say: Callable[[Request, int], bytes] = echo
    delay_s: float = 0.0
    burst: int = 1
    eager: bool = True
    refuse: HeadraceError | None = None
    fail_at: int | None = None
    failure: HeadraceError | None = None
    vanish_at: int | None = None
    compile_s: float = 0.0
    context: int = 2048
    state: ServiceState = "ready"
    seen: list[Request] = field(default_factory=list)
    live: dict[str, Request] = field(default_factory=dict)
    cancelled: list[tuple[str, int | None]] = field(default_factory=list)
    steps: int = 0

    @property
    def card(self) -> ModelCard:
        if self.state == "loading":
            raise EngineUnavailable("loading")
        return ModelCard(MODEL, "/nowhere", self.context, VOCABULARY, (EOS,), created=1_700_000_000, dtype="float32")

    def submit(self, request: Request) -> AsyncIterator[SequenceDelta]:
        if self.eager:
            self._check(request)
        return self._run(request)

    def _check(self, request: Request) -> None:
        if self.state != "ready":
            raise EngineUnavailable(f"the engine is {self.state}")
        if self.refuse is not None:
            raise self.refuse
        complete_request(request, self.card, Limits(), now=time.monotonic())

    async def _run(self, request: Request) -> AsyncIterator[SequenceDelta]:
        self._check(request)
        request = complete_request(request, self.card, Limits(), now=time.monotonic())
        self.seen.append(request)
        self.live[request.id] = request
        left = set(range(request.params.n))
        try:
            async for delta in self._deltas(request):
                if delta.reason is not None:
                    left.discard(delta.index)
                yield delta
        finally:
            del self.live[request.id]
            if left:
                self.cancelled.append((request.id, None))

    async def _deltas(self, request: Request) -> AsyncIterator[SequenceDelta]:
        structure = request.params.structure
        if structure is not None and structure.kind == "regex":
            await asyncio.sleep(self.compile_s)
            try:
                re.compile(structure.spec)
            except re.error as error:
                broken = InvalidRequest(f"structured_outputs: {error}", field="structured_outputs")
                yield SequenceDelta(request.id, 0, reason="error", error=broken)
                return
        open_ones = {i: self._script(request, i) for i in range(request.params.n)}
        timings = {i: RequestTiming(request.arrival, first_scheduled=time.monotonic()) for i in open_ones}
        step = 0
        while open_ones:
            await asyncio.sleep(self.delay_s)
            if self.vanish_at is not None and step >= self.vanish_at:
                return
            for index in tuple(open_ones):
                if self.fail_at is not None and step >= self.fail_at:
                    delta = SequenceDelta(request.id, index, reason="error", error=self.failure)
                elif (request.id, index) in self.cancelled:
                    delta = SequenceDelta(request.id, index, reason="abort", timing=timings[index])
                else:
                    delta = self._step(request, index, open_ones[index], timings[index])
                if delta.reason is not None:
                    del open_ones[index]
                yield delta
            step += 1
            self.steps += 1

    def _script(self, request: Request, index: int) -> list[int]:
        said = list(self.say(request, index))
        limit = request.params.max_tokens or 0
        if request.params.ignore_eos:
            return (said * (limit // max(1, len(said)) + 1))[:limit]
        return [*said, EOS][:limit]

    def _step(self, request: Request, index: int, left: list[int], timing: RequestTiming) -> SequenceDelta:
        tokens, left[:] = left[: self.burst], left[self.burst :]
        now = time.monotonic()
        first = timing.first_token is None
        timing.first_token = timing.first_token or now
        timing.last_token, timing.decoded, timing.cached_tokens = now, timing.decoded + len(tokens), 3
        delta = SequenceDelta(request.id, index, tokens, steps=0 if first else 1)
        if request.params.logprobs is not None:
            delta.logprobs = [_logprobs(token, request.params.logprobs) for token in tokens]
        if tokens and tokens[-1] == EOS and not request.params.ignore_eos:
            delta.reason, delta.stop_token = "stop", EOS
        elif not left:
            delta.reason = "length"
        if first or delta.reason is not None:
            delta.timing = replace(timing)
        return delta

    def cancel(self, request_id: str, index: int | None = None) -> None:
        if request_id in self.live:
            self.cancelled.append((request_id, index))

    async def stats(self) -> EngineStats:
        held = sum(len(request.prompt) for request in self.live.values())
        return EngineStats(
            running=len(self.live),
            slots_total=4096,
            slots_free=4096 - held,
            steps=self.steps,
            prefill_tokens=sum(len(request.prompt) for request in self.seen),
            decode_tokens=3 * self.steps,
            drafted=2 * self.steps,
            accepted=self.steps,
            step_limit=512,
            step_ms=2.0,
            forward_ms=1.5,
            step_seconds=_filled(STEP_SECONDS, 0.002, 0.002, 0.002),
            forward_seconds=_filled(STEP_SECONDS, 0.0015, 0.0015, 0.0015),
            prefill_per_step=_filled(STEP_TOKENS, 7),
            decode_per_step=_filled(STEP_TOKENS, 3),
            verify_per_step=_filled(STEP_TOKENS, 0),
            accepted_per_draft=_filled(ACCEPTED, 2),
            predicted_steps=3,
            predicted_seconds=0.5,
            profile_error_p50=0.04,
        )

    async def drain(self, timeout_s: float) -> None:
        self.state = "draining"
        end = time.monotonic() + timeout_s
        while self.live and time.monotonic() < end:
            await asyncio.sleep(0.01)


def _logprobs(token: int, top: int) -> TokenLogprobs:
    """Made-up values that a test can predict: the token itself is the second most likely."""
    likely = [((token + 1) % 256, -0.5), (token, -1.25), ((token + 2) % 256, float("-inf"))]
    return TokenLogprobs(token, -1.25, 2, tuple(likely[:top]))


def _filled(bounds: tuple[float, ...], *values: float) -> Counts:
    counts = Counts(bounds)
    for value in values:
        counts.add(value)
    return counts
