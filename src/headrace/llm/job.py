"""One request of :class:`headrace.LLM` on its way: deltas go in, answers come out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.core.errors import InvalidRequest
from headrace.core.outputs import RequestTiming, SequenceDelta, TokenLogprobs
from headrace.core.request import SLO, Request
from headrace.llm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer


class Job:
    """A request with one text stream and one answer for each of its sequences.

    Args:
        request: what the engine was asked.
        prompt: its text, None where token ids were given.
        tokenizer: turns tokens into text.
    """

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer) -> None:
        from headrace.engine.text import TextStream

        self.request, self._prompt, self._tokenizer = request, prompt, tokenizer
        count = request.params.n
        self._streams = [TextStream(tokenizer, request.params) for _ in range(count)]
        self._answers = [CompletionOutput(index) for index in range(count)]
        self._timings: list[RequestTiming | None] = [None] * count
        if request.params.logprobs is not None:
            for answer in self._answers:
                answer.logprobs, answer.cumulative_logprob = [], 0.0

    @property
    def done(self) -> bool:
        """True when every answer has ended."""
        return all(answer.finish_reason is not None for answer in self._answers)

    def take(self, delta: SequenceDelta) -> bool:
        """Take in a delta.

        Returns:
            True when a stop string ended the answer before the engine knew, so that the sequence is to be cancelled.

        Raises:
            InvalidRequest: the request turned out to be one that cannot be served.
        """
        if isinstance(delta.error, InvalidRequest):
            raise delta.error
        answer = self._answers[delta.index]
        if answer.finish_reason is not None:
            return False  # the abort that answers our cancel
        if delta.error is not None:  # this answer is lost, the others are not
            answer.finish_reason, answer.error = "error", delta.error.message
            return False
        self._timings[delta.index] = delta.timing or self._timings[delta.index]
        new = self._streams[delta.index].push(delta)
        answer.text += new.text
        answer.token_ids += new.tokens
        for entry in new.logprobs or ():
            self._add_logprobs(answer, entry)
        if new.done:
            answer.finish_reason = new.finish_reason
            own_end = isinstance(new.stop_reason, int) and new.stop_reason not in self.request.params.stop_token_ids
            answer.stop_reason = None if own_end else new.stop_reason
        return new.done and delta.reason is None

    def output(self) -> RequestOutput:
        """The :class:`RequestOutput` as far as it has come."""
        return RequestOutput(
            request_id=self.request.id,
            prompt=self._prompt,
            prompt_token_ids=list(self.request.prompt),
            outputs=self._answers,
            finished=self.done,
            metrics=summarise([t for t in self._timings if t is not None], self.request.slo),
        )

    def _add_logprobs(self, answer: CompletionOutput, entry: TokenLogprobs) -> None:
        assert answer.logprobs is not None
        assert answer.cumulative_logprob is not None
        ranked = [(token, value, rank) for rank, (token, value) in enumerate(entry.top, 1)]
        chosen = (entry.token, entry.logprob, entry.rank)
        answer.logprobs.append(
            {token: Logprob(value, rank, self._tokenizer.token_text(token)) for token, value, rank in [*ranked, chosen]}
        )
        answer.cumulative_logprob += entry.logprob


def summarise(timings: list[RequestTiming], slo: SLO) -> RequestMetrics:
    """The metrics of a request from the timings of its answers; the slowest counts, so an SLO is met when all meet it."""
    ttft = max((t.ttft_ms for t in timings if t.ttft_ms is not None), default=None)
    tpot = max((t.tpot_ms for t in timings if t.tpot_ms is not None), default=None)
    return RequestMetrics(
        ttft_ms=ttft,
        tpot_ms=tpot,
        cached_tokens=max((t.cached_tokens for t in timings), default=0),
        preemptions=sum(t.preemptions for t in timings),
        slo_met=slo.met_by(ttft, tpot),
    )
