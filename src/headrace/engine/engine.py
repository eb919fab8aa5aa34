"""The engine: one loop that admits, plans, packs, runs, samples and commits.

It knows nothing of texts, sockets or processes, and meets the model only as a :class:`Runner`, time only as a
:class:`Clock` and every scheduling decision as a :class:`Policy`, so the same loop serves, tests and simulates.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from headrace.core.batch import Packer, Segment
from headrace.core.clock import WallClock
from headrace.core.errors import HeadraceError, InvalidRequest, OutOfMemory
from headrace.core.outputs import EngineStats, SequenceDelta
from headrace.core.policy import Limits, Policy, StepPlan, View
from headrace.core.protocols import Clock, Closeable, ModelCard, Profile, Remembering, Runner, StepObserver
from headrace.core.request import Request
from headrace.core.retrieval import Retrieval
from headrace.engine.assembly import Assembled, assemble
from headrace.engine.drafting import Drafting
from headrace.engine.head import Head
from headrace.engine.kv import KVSpace
from headrace.engine.memory import StepBudget
from headrace.engine.process.admission import complete_request, with_retrieval
from headrace.engine.queue import WaitingQueue
from headrace.engine.sampling.sampler import stream_key
from headrace.engine.seams import Grammars, TokenSampler
from headrace.engine.sequence import Sequence
from headrace.engine.verify import settled

if TYPE_CHECKING:
    from headrace.core.batch import StepShape
    from headrace.core.speculation import DraftTree

_NONE = np.empty(0, np.int32)


class Engine:
    """Continuous batching over one runner. Not thread-safe: one thread calls everything.

    Args:
        runner: executes batches.
        space: slots and prefix cache.
        policy: decides who runs.
        sampler: draws tokens from logits.
        card: the model's limits.
        limits: bounds of a step.
        clock: source of time; the wall clock by default.
        grammars: compiler for structured output; None refuses such requests.
        profile: what steps cost, for the policy to ask.
        observer: is told what every step took.
        drafting: drafters, for policies that speculate; None never does.
        kv: how decode steps read the context of requests that do not say; None where the runner can but read all of it.
    """

    sequence_type: type[Sequence] = Sequence

    def __init__(
        self,
        runner: Runner,
        space: KVSpace,
        policy: Policy,
        sampler: TokenSampler,
        card: ModelCard,
        *,
        limits: Limits | None = None,
        clock: Clock | None = None,
        grammars: Grammars | None = None,
        profile: Profile | None = None,
        observer: StepObserver | None = None,
        drafting: Drafting | None = None,
        kv: Retrieval | None = None,
    ) -> None:
        self.runner, self.space, self.policy, self.sampler = runner, space, policy, sampler
        self.card, self.grammars = card, grammars
        self.profile, self.observer, self.drafting, self.kv = profile, observer, drafting, kv
        self.limits = limits or Limits()
        self.clock: Clock = clock or WallClock()
        self._budget = StepBudget(self.limits)
        self._waiting = WaitingQueue()
        self._running: dict[int, Sequence] = {}
        self._requests: dict[str, list[Sequence]] = {}
        self._packer = Packer()
        self._deltas: list[SequenceDelta] = []
        self._next_id = 0
        self._stats = EngineStats(slots_total=space.pool.size, step_limit=self.limits.max_step_tokens)

    # ---- what callers do -------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True while a request is open or a delta has not been handed out."""
        return bool(self._requests or self._deltas)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it could never be served; see :func:`headrace.engine.process.admission.complete_request`.
        """
        request = complete_request(request, self.card, self.limits, now=self.clock.now())
        request = with_retrieval(request, self.kv)
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is already open: choose another", field="id")
        sequence = self.sequence_type.of(request, self.card, self._take_id())
        structure = request.params.structure
        if structure is None:
            self._waiting.push(sequence)
        elif self.grammars is None:
            raise InvalidRequest("this engine was built without structured output", field="response_format")
        else:
            self._waiting.push_compiling(sequence, self.grammars.compile(structure))
        self._requests[request.id] = [sequence]

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one of its sequences, now (one that is not born yet, as it is born); unknown ids are ignored."""
        for sequence in list(self._requests.get(request_id, ())):
            if index is not None and sequence.width > 1:
                sequence.unwanted.add(index)
            elif index is None or sequence.index == index:
                self._abort(sequence)

    def step(self) -> list[SequenceDelta]:
        """Run one step and return what it brought forth (also of cancels and failures since the last)."""
        started = time.perf_counter()
        drafted = self._stats.draft_s
        self._start_compiled()
        self._admit()
        plan = self._plan()
        segments, scheduled, trees = self._assemble(plan)
        if segments:
            shape = self._run(segments, scheduled, trees)
            seconds = time.perf_counter() - started
            self._stats.count_step(seconds)
            if self.observer is not None and shape is not None:
                self.observer.observe(shape, (seconds - self._stats.draft_s + drafted) * 1e3)
        elif victim := next((v for v in plan.victims if v in self._running), None):
            # Everyone holds slots and nobody gets another: the least urgent gives way, or, alone, swaps its copy of a prefix
            # for the one that another published.
            self._preempt(self._running[victim])
        deltas, self._deltas = self._deltas, []
        return deltas

    def stats(self) -> EngineStats:
        """The current :class:`EngineStats` (the engine's own object: copy it to keep it)."""
        stats = self._stats
        stats.running = sum(s.width for s in self._running.values())
        stats.waiting = len(self._waiting)
        stats.slots_free, stats.slots_cached = self.space.pool.free, self.space.cached
        stats.prefilling = {
            s.request.id: s.timing.first_scheduled
            for s in self._running.values()
            if s.timing.first_token is None and s.timing.first_scheduled is not None
        }
        if self.observer is not None:
            self.observer.report(stats)
        return stats

    def abort_all(self) -> None:
        """Abort everything that is open."""
        for request_id in list(self._requests):
            self.cancel(request_id)

    def close(self) -> None:
        """Abort everything that is open, and let go of what the runner holds beyond this process."""
        self.abort_all()
        if isinstance(self.runner, Closeable):
            self.runner.close()
        if self.observer is not None:
            self.observer.close()

    def _abort(self, sequence: Sequence) -> None:
        self._finish(sequence, SequenceDelta(sequence.request.id, sequence.index, reason="abort"))
        self._stats.aborted += 1

    # ---- admission -------------------------------------------------------------------------------------------

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _start_compiled(self) -> None:
        idle = not self._running and not self._deltas
        for sequence, future in self._waiting.compiled(patience_s=0.005 if idle else 0.0):
            failure = future.exception()
            if failure is None and self.grammars is not None:
                sequence.grammar = self.grammars.start(future.result())
                self._waiting.push(sequence)
            else:
                self._fail(sequence, failure)

    def _view(self) -> View:
        return View(
            now=self.clock.now(),
            running=list(self._running.values()),
            waiting=self._waiting.ready,
            free_slots=self.space.available,
            total_slots=self.space.pool.size,
            limits=self._budget.limits,
            profile=self.profile,
            outlook=self.drafting.outlook if self.drafting is not None else None,
        )

    def _plan(self) -> StepPlan:
        """Ask the policy, after the drafts it wants have been made."""
        view = self._view()
        started = time.perf_counter()
        drafted = 0.0
        if self.drafting is not None and (draft := getattr(self.policy, "draft", None)) is not None:
            orders = draft(view)
            begun = time.perf_counter()
            view.candidates = self.drafting.draft(orders, self._running)
            drafted = time.perf_counter() - begun
            view.now = self.clock.now()
        plan = self.policy.plan(view)
        self._stats.draft_s += drafted
        self._stats.plan_s += time.perf_counter() - started - drafted
        return plan

    def _admit(self) -> None:
        if not self._waiting.ready:
            return
        by_id = {s.id: s for s in self._waiting.ready}
        for number in self.policy.admit(self._view()):
            sequence = by_id[number]
            self._waiting.discard(sequence)
            self._running[number] = sequence
            sequence.running = True
            cached = self.space.attach(sequence)
            if sequence.timing.first_scheduled is None:  # what it finds after a preemption is its own
                sequence.timing.first_scheduled = self.clock.now()
                sequence.timing.cached_tokens = cached
                self._stats.cached_tokens += cached

    # ---- assembling a step -----------------------------------------------------------------------------------

    def _assemble(self, plan: StepPlan) -> Assembled:
        return assemble(plan, self._running, self.space, self.drafting, self._preempt)

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; what nobody overwrites of its K and V is found again later."""
        self._forget(sequence)
        self.space.publish(sequence)
        self.space.release(sequence)
        del self._running[sequence.id]
        sequence.running = False
        sequence.timing.preemptions += 1
        self._stats.preemptions += 1
        self._waiting.push(sequence)

    # ---- running and committing ------------------------------------------------------------------------------

    def _run(
        self, segments: list[Segment], scheduled: list[Sequence], trees: list[DraftTree | None]
    ) -> StepShape | None:
        """Run and commit a step; its shape, or None when it did not fit."""
        batch = self._packer.pack(segments)
        try:
            result = self.runner.run(batch)
        except OutOfMemory as error:
            self._survive(error, segments, scheduled)
            return None
        except BaseException:  # an interrupt from the keyboard too: whoever catches it finds every slot accounted for
            self._undo(segments)
            raise
        self._budget.succeeded()
        drafted = sum(len(tree) for tree in trees if tree is not None)
        self._stats.count_forward(result.forward_s, batch.shape, drafted)
        heads = self._heads(segments, scheduled, trees)
        going = heads
        while True:  # a round draws one token for each: all of them, then those whose drafts have carried it
            outcomes = self.sampler.sample(result, [head.draw() for head in going])
            going = [head for head, outcome in zip(going, outcomes, strict=True) if head.take(outcome)]
            if not going:
                break
        now = self.clock.now()
        for head in heads:
            self._keep(head)
            self.commit(head, now)
        return batch.shape

    def _heads(self, segments: list[Segment], scheduled: list[Sequence], trees: list[DraftTree | None]) -> list[Head]:
        """Those who draw in this step."""
        heads: list[Head] = []
        row = 0
        for segment, sequence, tree in zip(segments, scheduled, trees, strict=True):
            if tree is not None:
                heads.append(Head(sequence, row, tree, segment.write_slots))
            else:
                sequence.context += len(segment.tokens)
                if len(segment.wanted):
                    heads += [Head(twin, row) for twin in self._fork(sequence)]
            row += len(segment.wanted)
        return heads

    def _keep(self, head: Head) -> None:
        """Keep the slots of the root and of the accepted nodes, free the others, and learn from the outcome."""
        if head.tree is None or self.drafting is None:
            return
        kept, gone = settled(head.slots, head.walk.path)
        head.sequence.settle(kept)
        self.space.pool.release(gone)
        head.delta.drafted, head.delta.accepted = len(head.tree), len(head.walk.path)
        self._stats.count_draft(head.delta.drafted, head.delta.accepted)
        self.drafting.verified(head.sequence.id, head.tree, head.walk.path)

    def _survive(self, error: OutOfMemory, segments: list[Segment], scheduled: list[Sequence]) -> None:
        """Undo a step that did not fit and shrink the next ones; a lone sequence at the floor is given up."""
        self._undo(segments)
        if not self._budget.shrink(sum(len(s.tokens) for s in segments)):
            self._fail(scheduled[-1], error)

    def _undo(self, segments: list[Segment]) -> None:
        """Hand back the slots a step was to write."""
        for segment in segments:
            self.space.pool.release(segment.write_slots)

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """The sequences that draw from this row: the leader, and its new siblings if its prompt has just ended."""
        if leader.output:
            return [leader]
        family = [leader]
        assert leader.params.seed is not None
        for index in range(1, leader.width):
            twin = leader.fork(self._take_id(), index, stream_key(leader.params.seed, index))
            twin.grammar = leader.grammar.fork() if leader.grammar else None
            self.space.fork(leader, twin)
            twin.running = True
            self._running[twin.id] = twin
            self._requests[leader.request.id].append(twin)
            family.append(twin)
        leader.width = 1
        for sequence in family:
            if sequence.index in leader.unwanted:
                self._abort(sequence)
        return [sequence for sequence in family if sequence.running]

    def commit(self, head: Head, now: float) -> None:
        """Tell the reader of a sequence what it drew, and end it where it ended.

        The K and V of all but the last token must be in its slots already.
        """
        sequence, delta = head.sequence, head.delta
        if head.error is not None:
            if delta.tokens:
                self._deltas.append(delta)
            self._fail(sequence, head.error)
            return
        timing = sequence.timing
        if timing.first_token is None:
            timing.first_token = now
            delta.timing = timing
            if sequence.index == 0:  # not before: logits that are no numbers would leave a bad prompt to be found
                self.space.publish(sequence)
        else:
            self._stats.verifications += 1
            delta.steps = 1
        timing.last_token = now
        timing.decoded = len(sequence.output)
        if delta.reason is None:
            self._deltas.append(delta)
        else:
            if delta.tokens[-1] in sequence.stop_ids:
                delta.stop_token = delta.tokens[-1]
            self._stats.finished += 1
            self._finish(sequence, delta)

    def _finish(self, sequence: Sequence, delta: SequenceDelta) -> None:
        """Take a sequence out of the engine and hand its slots back (its K and V stay findable)."""
        if sequence.running:
            del self._running[sequence.id]
            sequence.running = False
            self._forget(sequence)
            if delta.error is None:  # what a failed step wrote may be garbage: nobody else shall find it
                self.space.publish(sequence)
            self.space.release(sequence)
        else:
            self._waiting.discard(sequence)
        if self.drafting is not None:
            self.drafting.forget(sequence.id)
        family = self._requests[sequence.request.id]
        family.remove(sequence)
        if not family:
            del self._requests[sequence.request.id]
        delta.timing = sequence.timing
        self._deltas.append(delta)
        for index in range(1, sequence.width):  # siblings that were never born end with their leader
            self._deltas.append(
                SequenceDelta(delta.request_id, index, reason=delta.reason, timing=sequence.timing, error=delta.error)
            )

    def _forget(self, sequence: Sequence) -> None:
        if sequence.kv is not None and isinstance(self.runner, Remembering):
            self.runner.forget(sequence.id)

    def _fail(self, sequence: Sequence, failure: BaseException | None) -> None:
        error = failure if isinstance(failure, HeadraceError) else HeadraceError(f"internal error: {failure}")
        delta = SequenceDelta(sequence.request.id, sequence.index, reason="error", error=error)
        self._finish(sequence, delta)
