"""The engine without a model: steps cost profiled time on a virtual clock, and answers are as long as they may be.

Loop, policies, slots and prefix cache are the real ones; only runner, sampler and clock differ. Tokens of answers carry no
meaning: a request generates exactly ``max_tokens``. While everybody decodes and nobody can join, steps follow from each
other, and :class:`SimulatedEngine` takes many at once; the result is the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from headrace.core.batch import Batch, Packer, Segment, StepShape, step_shape
from headrace.core.clock import VirtualClock
from headrace.core.outputs import SequenceDelta
from headrace.core.policy import DraftingPolicy, Limits, Policy, StepPlan
from headrace.core.protocols import ModelCard, Profile, StepResult
from headrace.engine.assembly import Assembled
from headrace.engine.drafting import Drafting
from headrace.engine.engine import Engine
from headrace.engine.head import Head
from headrace.engine.kv import KVSpace
from headrace.engine.sampling.sampler import Draw, Sampled
from headrace.engine.sequence import Sequence as EngineSequence
from headrace.engine.simulation.cohort import Cohort, CohortSequence, PromisingPool
from headrace.engine.simulation.drafts import SimulatedDrafter, SimulatedSpeculation

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
    """Gives every sequence a token of its own, over and over, that never ends it.

    Args:
        first: called before each draw.
    """

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        self._first = first

    def sample(self, result: StepResult, rows: Sequence[Draw]) -> list[Sampled]:
        """One token per draw."""
        self._first()
        return [Sampled(_token(draw.seed, draw.stop_ids)) for draw in rows]


def _token(seed: int, stop_ids: Sequence[int]) -> int:
    token = seed % VOCAB
    while token in stop_ids:
        token = (token + 1) % VOCAB
    return token


class ShapePacker(Packer):
    """Packs nothing but the size of a step, which is all a simulated runner looks at.

    Attributes:
        beside: the shape of what runs in the step besides its segments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.beside: StepShape | None = None

    def pack(self, segments: Sequence[Segment]) -> Batch:
        """A batch without arrays."""
        shape = step_shape(segments)
        if self.beside is not None:
            shape += self.beside
        none = np.empty(0, np.int32)
        return Batch(none, none, none, none, none, none, none, none, none, none, shape)


class SimulatedEngine(Engine):
    """The engine on simulated hardware, able to take a stretch of equal decode steps at once.

    Sequences that decode in step form a cohort and are advanced together, whether prompts run beside them or not; one that is
    paused, preempted, cancelled or has ended leaves it.

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

    sequence_type = CohortSequence

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
        pool = PromisingPool(slots)
        super().__init__(
            SimulatedRunner(profile, clock),
            KVSpace(pool, prefix_cache=prefix_cache),
            policy,
            SimulatedSampler(self._draw_cohort),
            ModelCard("simulated", "", context=min(context, slots), vocab_size=VOCAB, stop_ids=()),
            limits=limits,
            clock=clock,
            profile=profile,
            drafting=None if speculation is None else self._drafting(speculation, clock),
        )
        self._packer: ShapePacker = ShapePacker()
        self._pool, self._cohort = pool, Cohort(pool)
        self._due: list[int] = []
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
        order = self._ahead()
        if not order:
            return super().step()
        self._decode(order)
        deltas, self._deltas = self._deltas, []
        return deltas

    def settle(self) -> None:
        """Write down what has happened so far: for whoever wants to read open sequences from outside."""
        for sequence in list(self._cohort.members.values()):
            self._leave(sequence)

    # ---- many steps at once ----------------------------------------------------------------------------------

    def _ahead(self) -> list[int]:
        """Who decodes in the next steps, in the plan's order, if exactly the running sequences do; else nobody."""
        if self._steady == "never" or (self._steady == "unqueued" and self._waiting.ready):
            return []
        self._gather()
        rows = len(self._running)
        if not rows or len(self._cohort) != rows or self._pool.free < rows:
            return []
        if self._waiting.ready and self.policy.admit(self._view()):
            return []
        # Whoever cannot be admitted now cannot before a sequence ends, for until then only slots are used up.
        chunks = self.policy.plan(self._view()).chunks
        fits = len(chunks) == rows and all(tokens == 1 for _, tokens in chunks)
        return [number for number, _ in chunks] if fits else []

    def _gather(self) -> None:
        """Let those who decode now join the cohort."""
        if len(self._cohort) < len(self._running):
            for number, sequence in self._running.items():
                if number not in self._cohort and sequence.pending == 1 and sequence.output:
                    assert isinstance(sequence, CohortSequence)
                    self._cohort.join(sequence)

    def _decode(self, order: list[int]) -> None:
        cohort, cost, clock = self._cohort, self._profile.cost, self._virtual
        rows = len(cohort)
        most = min(cohort.first_end, self._pool.free // rows)
        taken = 0
        while taken < most and (not taken or clock.now() < self.quiet_until):
            clock.advance(cost(cohort.shape(taken)) * 1e-3)
            taken += 1
        self._stats.steps += taken
        self._stats.decode_tokens += taken * rows
        cohort.advance(taken, clock.now())
        self._end_members(order)

    # ---- one step, of the cohort and of others ---------------------------------------------------------------

    def _assemble(self, plan: StepPlan) -> Assembled:
        """As every engine; a cohort that runs whole, or not at all, needs no segments."""
        self._due = []
        if not self._cohort:
            return super()._assemble(plan)
        due = [number for number, tokens in plan.chunks if number in self._cohort and tokens]
        others = [(number, tokens) for number, tokens in plan.chunks if number not in self._cohort]
        need = len(due) + sum(min(tokens, self._running[number].pending) for number, tokens in others)
        if len(due) in (0, len(self._cohort)) and need <= self._pool.free:
            self._packer.beside = self._cohort.shape() if due else None
            self._pool.promised += len(due)
            assembled = super()._assemble(StepPlan(others, plan.victims))
            self._pool.promised -= len(due)
            if assembled[0]:
                self._due = due
                return assembled
        self.settle()
        self._packer.beside = None
        return super()._assemble(plan)

    def _draw_cohort(self) -> None:
        """The cohort's part of a step that has run."""
        due, self._due = self._due, []
        if due:
            self._packer.beside = None
            self._cohort.advance(1, self._virtual.now())
            self._end_members(due)

    def _end_members(self, order: list[int]) -> None:
        """Finish those who have all their tokens, in ``order``."""
        ended = self._cohort.ended()
        if len(ended) > 1:
            ended.sort(key=lambda sequence: order.index(sequence.id))
        for sequence in ended:
            lag = self._cohort.leave(sequence)
            token = _token(sequence.draw_key, sequence.stop_ids)
            sequence.extend([token] * (lag - 1))
            head = Head(sequence, 0)
            head.take(Sampled(token))
            self.commit(head, self._cohort.last)
            self._deltas[-1].tokens = [token] * lag

    def _leave(self, sequence: CohortSequence) -> None:
        """Let a member go on alone, with everything written down that a reader of its answer must learn."""
        lag = self._cohort.leave(sequence)
        if lag:
            tokens = [_token(sequence.draw_key, sequence.stop_ids)] * lag
            sequence.extend(tokens)
            sequence.timing.last_token, sequence.timing.decoded = self._cohort.last, len(sequence.output)
            self._deltas.append(SequenceDelta(sequence.request.id, sequence.index, tokens=tokens))

    def _preempt(self, sequence: EngineSequence) -> None:
        if sequence.id in self._cohort:
            self._leave(self._cohort.members[sequence.id])
        super()._preempt(sequence)

    def _finish(self, sequence: EngineSequence, delta: SequenceDelta) -> None:
        if sequence.id in self._cohort:
            self._leave(self._cohort.members[sequence.id])
        super()._finish(sequence, delta)
