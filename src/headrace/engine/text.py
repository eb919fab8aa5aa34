"""From the engine's tokens to the text a client sees: incremental decoding, stop strings, aligned log-probabilities.

It runs beside whoever talks to the client, not in the step loop. The outcome does not depend on how tokens were grouped
into deltas: a stop string ends the text at the first character that completes one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headrace.core.outputs import FinishReason, SequenceDelta, TokenLogprobs
from headrace.core.request import SamplingParams


class Decoder(Protocol):
    """Text of a growing list of tokens, see :mod:`headrace.models.text.detokenizer`."""

    @property
    def pending(self) -> bool:
        """Whether tokens were pushed whose text has not been returned yet."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain after ``ids``."""

    def flush(self) -> str:
        """The rest."""


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def stream(self, skip_special_tokens: bool = True, *, continues: bool = False) -> Decoder:
        """A decoder for one sequence, which may continue a prompt."""


@dataclass(slots=True)
class TextDelta:
    """New text of one sequence.

    Attributes:
        text: certain text; later deltas only append to it.
        tokens: the ids behind ``text``, in order; tokens whose text is held back come with it.
        logprobs: one entry per token of ``tokens``, or None when not asked for (a token's text: ``Tokenizer.token_text``).
        finish_reason: set with the last delta.
        stop_reason: the stop string or stop id that ended the text, or None.
        done: no further delta follows.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    done: bool = False


class TextStream:
    """The text of one sequence.

    Args:
        tokenizer: decodes the tokens.
        params: of the request; ``stop``, ``include_stop``, ``min_tokens``, ``logprobs`` and ``skip_special_tokens`` matter here.

    Attributes:
        stopped: a stop string was found: cancel the sequence, whatever else it brings is discarded.
        tokens: tokens that count, the one that completed a stop string included.
    """

    def __init__(self, tokenizer: Decodes, params: SamplingParams) -> None:
        self._params = params
        self._decoder = tokenizer.stream(params.skip_special_tokens, continues=True)
        self._stops = [_StopMatcher(text) for text in params.stop]
        self._text = ""  # decoded but not returned
        self._start = 0  # characters returned so far
        self._queue: deque[_Held] = deque()  # tokens not returned
        self._unplaced: list[_Held] = []  # those of the queue whose text is still in the decoder
        self._done = False
        self.stopped = False
        self.tokens = 0

    def push(self, delta: SequenceDelta) -> TextDelta:
        """The text that ``delta`` makes certain; empty once :attr:`stopped` or finished."""
        if self._done:
            return self._result("", [], done=True)
        hide_last = delta.stop_token is not None and delta.reason == "stop" and not self._params.include_stop
        logprobs = delta.logprobs
        for place, token in enumerate(delta.tokens):
            held = _Held(token, None if logprobs is None else logprobs[place])
            self._queue.append(held)
            self._unplaced.append(held)
            self.tokens += 1
            hidden = hide_last and place == len(delta.tokens) - 1
            new = "" if hidden else self._decoder.push((token,))
            stop = self._extend(new)
            if stop is not None:
                return self._stop(stop)
            if not self._decoder.pending:
                self._place()
        if delta.reason is not None:
            return self._end(delta)
        return self._release(self._start + len(self._text) - self._held_back())

    def _extend(self, new: str) -> _StopMatcher | None:
        """Append decoded text, up to the end of the first stop string that counts; which one, when one was found."""
        if not self._stops:
            self._text += new
            return None
        counts = self.tokens > self._params.min_tokens
        for place, char in enumerate(new):
            found = [stop for stop in self._stops if stop.step(char)]
            if found and counts:
                self._text += new[: place + 1]
                return max(found, key=lambda stop: len(stop.text))
        self._text += new
        return None

    def _held_back(self) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        if self._params.include_stop:
            return 0
        return max((stop.matched for stop in self._stops), default=0)

    def _place(self) -> None:
        """Everything decoded so far ends here: so do the tokens whose place was open."""
        end = self._start + len(self._text)
        for held in self._unplaced:
            held.end = end
        self._unplaced.clear()

    def _stop(self, stop: _StopMatcher) -> TextDelta:
        if not self._params.include_stop:
            self._text = self._text[: -len(stop.text)]
        self.stopped = True
        return self._finish("stop", stop.text)

    def _end(self, delta: SequenceDelta) -> TextDelta:
        stop = self._extend(self._decoder.flush())
        if stop is not None:
            return self._stop(stop)
        return self._finish(delta.reason, delta.stop_token if delta.reason == "stop" else None)

    def _finish(self, reason: FinishReason | None, stop: str | int | None) -> TextDelta:
        """Everything left, with the reason."""
        self._done = True
        text, held = self._text, list(self._queue)
        self._text = ""
        self._queue.clear()
        self._unplaced.clear()
        result = self._result(text, held, done=True)
        result.finish_reason, result.stop_reason = reason, stop
        return result

    def _release(self, end: int) -> TextDelta:
        """Text up to character ``end`` and the tokens that end there or before."""
        cut = end - self._start
        text, self._text = self._text[:cut], self._text[cut:]
        self._start = end
        ready = []
        while self._queue and self._queue[0].end is not None and self._queue[0].end <= end:
            ready.append(self._queue.popleft())
        return self._result(text, ready)

    def _result(self, text: str, held: list[_Held], *, done: bool = False) -> TextDelta:
        logprobs = None
        if self._params.logprobs is not None:
            logprobs = [item.logprobs for item in held if item.logprobs is not None]
        return TextDelta(text, [item.token for item in held], logprobs, done=done)


@dataclass(slots=True)
class _Held:
    """A token that has not been returned; ``end`` is the character its text ends at, once known."""

    token: int
    logprobs: TokenLogprobs | None
    end: int | None = None


class _StopMatcher:
    """Finds one stop string character by character (Knuth, Morris and Pratt).

    ``matched`` is the length of the longest proper prefix of the stop string that ends the text so far.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._back = [0] * (len(text) + 1)  # longest proper border of each prefix
        border = 0
        for place in range(1, len(text)):
            while border and text[place] != text[border]:
                border = self._back[border]
            border += text[place] == text[border]
            self._back[place + 1] = border

    def step(self, char: str) -> bool:
        """Whether ``char`` completes the stop string."""
        matched = self.matched
        while matched and self.text[matched] != char:
            matched = self._back[matched]
        matched += self.text[matched] == char
        complete = matched == len(self.text)
        self.matched = self._back[matched] if complete else matched
        return complete
