"""One sequence: its tokens, its slot table and where it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headrace.core.batch import Segment
from headrace.core.outputs import RequestTiming
from headrace.core.request import SLO, Request, SamplingParams
from headrace.core.speculation import ROOT
from headrace.engine.sampling.rng import stream_key

if TYPE_CHECKING:
    from headrace.core.batch import Ints
    from headrace.core.protocols import ModelCard
    from headrace.core.retrieval import Retrieval
    from headrace.core.speculation import DraftTree
    from headrace.engine.structured.grammar import GrammarState

_NONE = np.empty(0, np.int32)


class Sequence:
    """Tokens and K/V slots of one answer; conforms to :class:`headrace.core.policy.SequenceView`.

    ``tokens[:length]`` are all known tokens (prompt, then output); ``slots[:context]`` hold the K and V of the first
    ``context`` of them, in order. A request with ``n > 1`` starts as one sequence of ``width`` n, which forks once its
    prompt is in slots; ``unwanted`` are those of its siblings that were cancelled before.
    """

    __slots__ = (
        "arrival", "context", "draw_key", "grammar", "id", "index", "kv", "length", "max_tokens", "output", "owner",
        "priority", "prompt_length", "request", "running", "slo", "slots", "stop_ids", "timing", "tokens", "unwanted", "width",
    )  # fmt: skip

    def __init__(
        self, number: int, request: Request, index: int, *, draw_key: int, stop_ids: tuple[int, ...], max_tokens: int
    ) -> None:
        self.id = number
        self.request = request
        self.index = index
        self.priority = request.priority
        self.arrival = request.arrival
        self.owner = request.owner
        self.slo: SLO = request.slo
        self.kv = request.kv
        self.draw_key = draw_key
        self.stop_ids = stop_ids
        self.max_tokens = max_tokens
        self.width = 1
        self.unwanted: set[int] = set()
        self.running = False
        self.grammar: GrammarState | None = None
        self.prompt_length = len(request.prompt)
        self.tokens: Ints = np.empty(self.prompt_length + min(max_tokens, 256), np.int32)
        self.tokens[: self.prompt_length] = request.prompt
        self.length = self.prompt_length
        self.slots: Ints = np.empty(len(self.tokens), np.int32)
        self.context = 0
        self.output: list[int] = []
        self.timing = RequestTiming(arrival=request.arrival)

    @classmethod
    def of(cls, request: Request, card: ModelCard, number: int) -> Sequence:
        """The sequence that stands for all of ``request``, whose ``seed`` and ``max_tokens`` are set."""
        params = request.params
        assert params.seed is not None
        assert params.max_tokens is not None
        eos = () if params.ignore_eos else card.stop_ids
        stop_ids = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
        sequence = cls(
            number, request, 0, draw_key=stream_key(params.seed), stop_ids=stop_ids, max_tokens=params.max_tokens
        )
        sequence.width = params.n
        return sequence

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.request.params

    @property
    def pending(self) -> int:
        """Known tokens whose K and V are not in slots yet."""
        return self.length - self.context

    @property
    def decoded(self) -> int:
        """Tokens generated so far."""
        return len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_tokens - len(self.output)

    @property
    def first_token(self) -> float | None:
        """When the first token was committed, in seconds on the engine's clock."""
        return self.timing.first_token

    @property
    def speculate(self) -> bool | None:
        """The client's word on speculation."""
        return self.request.speculate

    def append(self, token: int) -> None:
        """Add a generated token; its K and V are pending."""
        if self.length == len(self.tokens):
            self._grow(2 * self.length)
        self.tokens[self.length] = token
        self.length += 1
        self.output.append(token)

    def extend(self, tokens: list[int]) -> None:
        """Add several generated tokens."""
        end = self.length + len(tokens)
        if end > len(self.tokens):
            self._grow(max(end, 2 * len(self.tokens)))
        self.tokens[self.length : end] = tokens
        self.length = end
        self.output += tokens

    def hold(self, slots: Ints) -> None:
        """Note ``slots`` as the room for the next ``len(slots)`` tokens, pending or to come; ``context`` does not move yet."""
        end = self.context + len(slots)
        if end > len(self.slots):
            self._grow(max(end, 2 * len(self.slots)))
        self.slots[self.context : end] = slots

    def segment(self, slots: Ints) -> Segment:
        """The next ``len(slots)`` pending tokens; the logits of the last known one are wanted."""
        begin, count = self.context, len(slots)
        end = begin + count
        return Segment(
            sequence=self.id,
            tokens=self.tokens[begin:end],
            positions=np.arange(begin, end, dtype=np.int32),
            write_slots=slots,
            context_slots=self.slots[:begin],
            wanted=np.arange(count - 1, count, dtype=np.int32) if end == self.length else _NONE,
            kv=self._retrieval() if count == 1 else None,
        )

    def tree_segment(self, slots: Ints, tree: DraftTree) -> Segment:
        """The newest token as root with ``tree`` below it, in ``slots`` (root first); the logits of every row are wanted."""
        begin, count = self.context, len(slots)
        return Segment(
            sequence=self.id,
            tokens=np.concatenate([self.tokens[begin : begin + 1], tree.tokens]),
            positions=np.concatenate([np.array([begin], np.int32), begin + tree.depths]),
            write_slots=slots,
            context_slots=self.slots[:begin],
            wanted=np.arange(count, dtype=np.int32),
            parents=None if tree.is_chain else np.concatenate([np.array([ROOT], np.int32), tree.parents + 1]),
            purpose="verify",
            kv=self._retrieval(),
        )

    @property
    def exact(self) -> int:
        """Tokens at the start whose K and V were computed with the whole context in view, as anybody else's would be."""
        return self.context if self._retrieval() is None else min(self.context, self.prompt_length)

    def _retrieval(self) -> Retrieval | None:
        """How a decode step reads the context now."""
        return self.kv if self.kv is not None and self.output and self.kv.applies(self.context) else None

    def settle(self, kept: Ints) -> None:
        """Note that the next ``len(kept)`` tokens have their K and V in ``kept``, whatever slots were held for them."""
        self.hold(kept)
        self.context += len(kept)

    def fork(self, number: int, index: int, draw_key: int) -> Sequence:
        """A sibling with the same tokens and slot table (the caller shares the slots' references)."""
        twin = type(self)(
            number, self.request, index, draw_key=draw_key, stop_ids=self.stop_ids, max_tokens=self.max_tokens
        )
        twin.slots[: self.context] = self.slots[: self.context]
        twin.context = self.context
        twin.timing.first_scheduled = self.timing.first_scheduled
        twin.timing.cached_tokens = self.timing.cached_tokens
        return twin

    def _grow(self, capacity: int) -> None:
        for name in ("tokens", "slots"):
            old = getattr(self, name)
            new = np.empty(capacity, np.int32)
            new[: len(old)] = old
            setattr(self, name, new)
