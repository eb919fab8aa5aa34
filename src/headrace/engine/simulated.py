"""The engine without a model: steps cost profiled time on a virtual clock, and answers are as long as they may be.

Loop, policies, slots and prefix cache are the real ones; only runner, sampler and clock differ. Tokens of answers carry no
meaning: a request generates exactly ``max_tokens``. While everybody decodes and nobody can join, steps follow from each
other, and :class:`SimulatedEngine` takes many at once; the result is the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from headrace.core.batch import Batch, Packer, Segment, StepShape, step_shape
from headrace.core.clock import VirtualClock
from headrace.core.outputs import SequenceDelta
from headrace.core.policy import DraftingPolicy, Limits, Policy
from headrace.core.protocols import ModelCard, Profile, StepResult
from headrace.engine.drafting import Drafting
from headrace.engine.engine import Engine
from headrace.engine.head import Head
from headrace.engine.kv import KVSpace
from headrace.engine.sampling import Draw, Sampled
from headrace.engine.simulated_drafts import SimulatedDrafter, SimulatedSpeculation
from headrace.models.slots import SlotPool

VOCAB = 32_000


class SimulatedRunner:
    """Moves ``clock`` by what ``profile`` says a step costs; its results have no logits."""

    vocab_size = VOCAB

    def __init__(self, profile: Profile, clock: VirtualClock) -> None:
        self._profile, self._clock = profile, clock

    def run(self, batch: Batch) -> StepResult:
        """Spend the step's time."""
        seconds = self._profile.cost(batch.shape) * 1e-3
        self._clock.advance(seconds)
        return StepResult(logits=None, forward_s=seconds)


class SimulatedSampler:
    """Gives every sequence a token of its own, over and over, that never ends it."""

    def sample(self, result: StepResult, rows: Sequence[Draw]) -> list[Sampled]:
        """One token per draw."""
        return [Sampled(_token(draw.seed, draw.stop_ids)) for draw in rows]


def _token(seed: int, stop_ids: Sequence[int]) -> int:
    token = seed % VOCAB
    while token in stop_ids:
        token = (token + 1) % VOCAB
    return token


class ShapePacker(Packer):
    """Packs nothing but the size of a step, which is all a simulated runner looks at."""

    def pack(self, segments: Sequence[Segment]) -> Batch:
        """A batch without arrays."""
        none = np.empty(0, np.int32)
        return Batch(none, none, none, none, none, none, none, none, none, none, step_shape(segments))


class SimulatedEngine(Engine):
    """The engine on simulated hardware, able to take a stretch of equal decode steps at once.

    Args:
        profile: what steps cost; it must not change during a run.
        policy: who runs.
        clock: time, moved by the steps and by whoever replays arrivals.
        limits: bounds of a step.
        slots: tokens whose K and V fit the simulated memory.
        context: longest prompt plus output.
        prefix_cache: share the K and V of equal prefixes.
        speculation: drafts for policies that speculate; None has none.
        stretch: whether steps are taken ahead, as far as the policy's ``steady`` allows.

    Attributes:
        quiet_until: clock time of the next thing that comes from outside (an arrival, a cut-off); steps that begin later are
            not taken ahead. Infinite: nothing comes.
    """

    def __init__(
        self,
        profile: Profile,
        policy: Policy,
        clock: VirtualClock,
        *,
        limits: Limits | None = None,
        slots: int = 1 << 17,
        context: int = 1 << 14,
        prefix_cache: bool = False,
        speculation: SimulatedSpeculation | None = None,
        stretch: bool = True,
    ) -> None:
        super().__init__(
            SimulatedRunner(profile, clock),
            KVSpace(SlotPool(slots), prefix_cache=prefix_cache),
            policy,
            SimulatedSampler(),
            ModelCard("simulated", "", context=min(context, slots), vocab_size=VOCAB, stop_ids=()),
            limits=limits,
            clock=clock,
            profile=profile,
            drafting=None if speculation is None else self._drafting(speculation, clock),
        )
        self._packer = ShapePacker()
        self._profile, self._virtual = profile, clock
        drafts = speculation is not None and isinstance(policy, DraftingPolicy)
        self._steady = getattr(policy, "steady", "unqueued") if stretch and not drafts else "never"
        self.quiet_until = math.inf

    def _drafting(self, speculation: SimulatedSpeculation, clock: VirtualClock) -> Drafting:
        drafters = [
            SimulatedDrafter(
                name,
                model,
                speculation.costs,
                clock,
                find=lambda number: self._running[number],
                truth=lambda sequence: _token(sequence.draw_key, sequence.stop_ids),
                vocab_size=VOCAB,
            )
            for name, model in speculation.models.items()
        ]
        return Drafting(drafters, speculation.calibration, speculation.costs)

    def step(self) -> list[SequenceDelta]:
        """Run one step, or as many as follow from it."""
        most = self._ahead()
        if most < 2:
            return super().step()
        self._decode(most)
        deltas, self._deltas = self._deltas, []
        return deltas

    def _ahead(self) -> int:
        """Steps in which exactly the running sequences advance by a token each, up to the one that ends the first of them."""
        running = self._running.values()
        if self._steady == "never" or (self._steady == "unqueued" and self._waiting.ready):
            return 0
        if not running or any(s.pending != 1 or not s.output for s in running):
            return 0
        most = min(min(s.remaining for s in running), self.space.pool.free // len(running))
        if most < 2 or (self._waiting.ready and self.policy.admit(self._view())):
            return 0
        # Whoever cannot be admitted now cannot before a sequence ends, for until then only slots are used up.
        chunks = self.policy.plan(self._view()).chunks
        return most if len(chunks) == len(running) and all(tokens == 1 for _, tokens in chunks) else 0

    def _decode(self, most: int) -> None:
        family = list(self._running.values())
        rows = len(family)
        context = sum(s.context for s in family)
        taken = 0
        while taken < most and (not taken or self._virtual.now() < self.quiet_until):
            held = context + taken * rows
            self._virtual.advance(self._profile.cost(StepShape(0, rows, held, rows, held + rows)) * 1e-3)
            taken += 1
        self._stats.steps += taken
        self._stats.decode_tokens += taken * rows
        now = self._virtual.now()
        slots = self.space.reserve(taken * rows)
        assert slots is not None
        for place, sequence in enumerate(family):
            token = _token(sequence.draw_key, sequence.stop_ids)
            sequence.hold(slots[place * taken : (place + 1) * taken])
            sequence.context += taken
            sequence.extend([token] * (taken - 1))
            head = Head(sequence, 0)
            head.take(Sampled(token))
            self.commit(head, now)
            self._deltas[-1].tokens = [token] * taken
