"""A language model without a network: the next token is a hash of all tokens found through the slots.

Whoever mixes up slots, positions or context gets different text, so engine tests need no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from headrace.core.batch import Batch
from headrace.core.clock import VirtualClock
from headrace.core.errors import OutOfMemory
from headrace.core.policy import Limits, Policy
from headrace.core.protocols import ModelCard, Profile, StepResult
from headrace.core.request import Request, SamplingParams
from headrace.engine.drafting import Drafting
from headrace.engine.engine import Engine
from headrace.engine.kv import KVSpace
from headrace.engine.policies import get_policy
from headrace.engine.sampling.sampler import Draw, Sampled, stream_key
from headrace.models.cache.slots import SlotPool

VOCAB = 97
EOS = 0


def next_token(tokens: list[int], key: int) -> int:
    """What the fake model says after ``tokens`` to the sequence whose draws are keyed ``key``."""
    value = 17 + key % 1009
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return value % VOCAB


def answer(request: Request, index: int = 0) -> list[int]:
    """The whole answer the engine must give."""
    tokens = list(request.prompt)
    out: list[int] = []
    assert request.params.max_tokens is not None
    assert request.params.seed is not None
    key = stream_key(request.params.seed, index)
    while len(out) < request.params.max_tokens:
        token = next_token(tokens, key)
        tokens.append(token)
        out.append(token)
        if token == EOS and not request.params.ignore_eos:
            break
    return out


@dataclass
class HashRunner:
    """Keeps the token written to each slot and hashes what a segment can see through its slot tables."""

    pool: SlotPool
    clock: VirtualClock
    vocab_size: int = VOCAB
    batches: list[int] = field(default_factory=list)
    largest: int | None = None
    """Rows above which a step runs out of memory."""

    def __post_init__(self) -> None:
        self.tokens = np.full(self.pool.size, -1)
        self.positions = np.full(self.pool.size, -1)

    def run(self, batch: Batch) -> StepResult:
        if self.largest is not None and batch.tokens > self.largest:
            raise OutOfMemory(f"{batch.tokens} rows")
        self.batches.append(batch.tokens)
        self.clock.advance(0.01)
        self.tokens[batch.write_slots] = batch.ids
        self.positions[batch.write_slots] = batch.positions
        seen: list[list[int]] = []
        for s in range(batch.segments):
            context = batch.context_slots[batch.context_starts[s] : batch.context_starts[s + 1]]
            rows = slice(batch.query_starts[s], batch.query_starts[s + 1])
            assert (self.positions[context] == np.arange(len(context))).all()
            paths = visible(batch, s)
            assert batch.positions[rows].tolist() == [len(context) + len(path) - 1 for path in paths]
            for row in batch.head_rows:
                if rows.start <= row < rows.stop:
                    own = batch.ids[rows][paths[row - rows.start]]
                    seen.append([*self.tokens[context].tolist(), *own.tolist()])
        return StepResult(logits=seen)


def visible(batch: Batch, s: int) -> list[list[int]]:
    """For each row of a segment the rows of it that it sees, in order: those before it, or its ancestors in a tree."""
    rows = int(batch.query_starts[s + 1] - batch.query_starts[s])
    words = batch.mask_words[batch.mask_starts[s] : batch.mask_starts[s + 1]].view(np.uint32)
    if not len(words):
        return [list(range(row + 1)) for row in range(rows)]
    table = words.reshape(rows, -1)
    return [[j for j in range(rows) if table[i, j // 32] >> np.uint32(j % 32) & np.uint32(1)] for i in range(rows)]


class HashSampler:
    """Turns what the runner saw into the next token, a different one for each draw key."""

    def sample(self, result: StepResult, rows: list[Draw]) -> list[Sampled]:
        return [Sampled(next_token(result.logits[d.row], d.seed), None) for d in rows]


def engine(
    slots: int = 400,
    *,
    policy: str | Policy = "chunked",
    prefix_cache: bool = True,
    largest: int | None = None,
    drafting: Drafting | None = None,
    profile: Profile | None = None,
    **limits: int,
) -> Engine:
    """An engine over the fake model on a virtual clock."""
    pool = SlotPool(slots)
    clock = VirtualClock(100.0)
    card = ModelCard("fake", "", context=min(200, slots), vocab_size=VOCAB, stop_ids=(EOS,))
    return Engine(
        HashRunner(pool, clock, largest=largest),
        KVSpace(pool, prefix_cache=prefix_cache),
        get_policy(policy) if isinstance(policy, str) else policy,
        HashSampler(),
        card,
        drafting=drafting,
        profile=profile,
        limits=Limits(**{"max_sequences": 8, "max_step_tokens": 32, "max_prefill_tokens": 64} | limits),
        clock=clock,
    )


def request(name: str, prompt: list[int], **params: object) -> Request:
    """A request with a fixed seed."""
    return Request(name, tuple(prompt), SamplingParams(**{"seed": 7} | params))  # type: ignore[arg-type]
