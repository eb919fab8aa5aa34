"""Drafts by a smaller model of the same vocabulary, batched over requests, with slots of its own.

The draft model keeps K and V of what it has seen of a sequence, its own guesses included. When it is asked again it keeps what turned
out right, and feeds the rest of the text as one catch-up chunk: usually two tokens, more after steps without drafts, the whole prompt
at first. A catch-up that exceeds the rows of a pass is spread over several calls, which bring no draft yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from headrace.core.batch import Ints, Packer, Segment
from headrace.core.errors import OutOfMemory
from headrace.core.protocols import Runner
from headrace.core.speculation import DraftJob, DraftTree, Floats, empty_tree
from headrace.models.cache.slots import SlotPool
from headrace.speculation.beam import Beam

Likeliest = Callable[[object, int], tuple[Ints, Floats]]

_NONE = np.empty(0, np.int32)


@dataclass(slots=True)
class _Text:
    """What the draft model holds of a sequence.

    Attributes:
        tokens, slots: int32[c] tokens in order and where their K and V are.
        nodes: (place of the parent, token) -> (place, slot) of the last draft's fed nodes; the root's place is -1.
    """

    tokens: Ints = field(default_factory=lambda: _NONE)
    slots: Ints = field(default_factory=lambda: _NONE)
    nodes: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def held(self) -> Ints:
        """All its slots."""
        return np.concatenate([self.slots, np.array([slot for _, slot in self.nodes.values()], np.int32)])


class ModelDrafter:
    """Conforms to :class:`headrace.core.speculation.Drafter`.

    Args:
        runner: the draft model.
        pool: its slots; those of sequences not asked for lately are taken back when they run out.
        likeliest: the k best tokens of each row of logits with their log-probabilities,
            see :func:`headrace.models.beam.likeliest`.
        context: longest text the draft model can take.
        max_rows: rows of a pass.
        name: of the source.
    """

    def __init__(
        self,
        runner: Runner,
        pool: SlotPool,
        likeliest: Likeliest,
        *,
        context: int,
        max_rows: int = 512,
        name: str = "draft",
    ) -> None:
        self.name, self.free = name, False
        self._runner, self._pool, self._likeliest = runner, pool, likeliest
        self._context, self._max_rows = context, max_rows
        self._packer = Packer()
        self._texts: OrderedDict[int, _Text] = OrderedDict()

    def draft(self, jobs: Sequence[DraftJob]) -> list[DraftTree]:
        """One tree per job; empty for a sequence that is still being caught up with, or too long, or has no slots."""
        jobs = [self._readable(job) for job in jobs]
        trees = {job.sequence: empty_tree(self.name) for job in jobs}
        try:
            ready = self._caught_up(jobs)
            if ready:
                for job, tree in zip(ready, self._grown(ready), strict=True):
                    trees[job.sequence] = tree
        except OutOfMemory:  # a step without drafts is a step all the same
            for job in jobs:
                self.forget(job.sequence)
        return [trees[job.sequence] for job in jobs]

    def _readable(self, job: DraftJob) -> DraftJob:
        """``job`` in words the draft model has: a target's table may be longer, padded say, and reading beyond one's own is fatal."""
        last = self._runner.vocab_size - 1
        return job if job.tokens.max(initial=0) <= last else replace(job, tokens=np.minimum(job.tokens, last))

    def forget(self, sequence: int) -> None:
        """The sequence has ended: its slots are free."""
        text = self._texts.pop(sequence, None)
        if text is not None:
            self._pool.release(text.held)

    # ---- catching up -----------------------------------------------------------------------------------------

    def _caught_up(self, jobs: Sequence[DraftJob]) -> list[DraftJob]:
        """Those whose whole text, but for the root, can be in slots after the next pass."""
        asked = {job.sequence for job in jobs}
        budget = self._max_rows - len(jobs)
        ready: list[DraftJob] = []
        behind: list[Segment] = []
        for job in jobs:
            text = self._texts.setdefault(job.sequence, _Text())
            self._texts.move_to_end(job.sequence)
            self._agree(text, job.tokens)
            missing = len(job.tokens) - 1 - len(text.tokens)
            depth, width = max(j.depth for j in jobs), max(j.width for j in jobs)
            wanted = missing + 1 + (depth - 1) * width
            if len(job.tokens) + depth > self._context or not self._make_room(wanted, asked):
                continue
            if missing <= budget:
                budget -= missing
                ready.append(job)
            elif budget > 0:
                slots = self._pool.take(budget)
                behind.append(_chunk(job, text, slots, wanted=False))
                _append(text, job.tokens, slots)
                budget = 0
        if behind:
            self._runner.run(self._packer.pack(behind))
        return ready

    def _agree(self, text: _Text, tokens: Ints) -> None:
        """Keep what ``text`` holds of ``tokens`` without the last one, guesses that turned out right included; free the rest."""
        most = min(len(text.tokens), len(tokens) - 1)
        differs = np.flatnonzero(text.tokens[:most] != tokens[:most])
        kept = int(differs[0]) if len(differs) else most
        slots = [text.slots[:kept]]
        nodes = text.nodes
        gone = [text.slots[kept:]]
        if kept == len(text.tokens):
            place = -1
            while kept < len(tokens) - 1 and (place, int(tokens[kept])) in nodes:
                place, slot = nodes.pop((place, int(tokens[kept])))
                slots.append(np.array([slot], np.int32))
                kept += 1
        gone.append(np.array([slot for _, slot in nodes.values()], np.int32))
        self._pool.release(np.concatenate(gone))
        text.slots, text.tokens, text.nodes = np.concatenate(slots), tokens[:kept].copy(), {}

    def _make_room(self, count: int, asked: set[int]) -> bool:
        """Whether ``count`` slots are free, after forgetting those not asked for, the longest unused first."""
        for sequence in [s for s in self._texts if s not in asked]:
            if self._pool.free >= count:
                break
            self.forget(sequence)
        return self._pool.free >= count

    # ---- growing trees ---------------------------------------------------------------------------------------

    def _grown(self, jobs: list[DraftJob]) -> list[DraftTree]:
        """Trees of ``jobs``, layer by layer for all of them together."""
        texts = [self._texts[job.sequence] for job in jobs]
        depth, width = max(job.depth for job in jobs), max(job.width for job in jobs)
        room = self._pool.free - sum(len(job.tokens) - len(t.tokens) for job, t in zip(jobs, texts, strict=True))
        depth = max(1, min(depth, 1 + room // (len(jobs) * width)))
        beam = Beam(width, self.name)
        segments = []
        for job, text in zip(jobs, texts, strict=True):
            slots = self._pool.take(len(job.tokens) - len(text.tokens))
            segments.append(_chunk(job, text, slots, wanted=True))
            _append(text, job.tokens, slots)
        paths: list[list[list[int]]] = [
            [[]] for _ in jobs
        ]  # slots from the root's child to each node of the last layer
        while True:
            tokens, logs = self._likeliest(self._runner.run(self._packer.pack(segments)).logits, width)
            beam.grow(tokens.reshape(len(jobs), -1, width), logs.reshape(len(jobs), -1, width))
            if len(beam.tokens) == depth:
                return beam.trees([job.depth for job in jobs])
            segments = []
            for s, (job, text) in enumerate(zip(jobs, texts, strict=True)):
                made = self._layer(job, text, beam, s, paths[s])
                segments += made
                paths[s] = [[*paths[s][int(beam.above[-1][s, i])], int(m.write_slots[0])] for i, m in enumerate(made)]

    def _layer(self, job: DraftJob, text: _Text, beam: Beam, s: int, paths: list[list[int]]) -> list[Segment]:
        """One row for each node of the last layer of sequence ``s``, over its text and its ancestors."""
        layer = len(beam.tokens)
        start = sum(b.shape[1] for b in beam.tokens[:-1])
        above = start - (beam.tokens[-2].shape[1] if layer > 1 else 0)
        row, parents = beam.tokens[-1][s], beam.above[-1][s]
        slots = self._pool.take(len(row))
        made: list[Segment] = []
        for i in range(len(row)):
            parent = -1 if layer == 1 else above + int(parents[i])
            text.nodes.setdefault((parent, int(row[i])), (start + i, int(slots[i])))
            made.append(
                Segment(
                    sequence=job.sequence,
                    tokens=row[i : i + 1],
                    positions=np.array([len(text.tokens) + layer - 1], np.int32),
                    write_slots=slots[i : i + 1],
                    context_slots=np.concatenate([text.slots, np.array(paths[int(parents[i])], np.int32)]),
                    wanted=np.zeros(1, np.int32),
                    purpose="draft",
                )
            )
        return made


def _chunk(job: DraftJob, text: _Text, slots: Ints, *, wanted: bool) -> Segment:
    """The next ``len(slots)`` tokens of a job's text."""
    begin, count = len(text.tokens), len(slots)
    return Segment(
        sequence=job.sequence,
        tokens=job.tokens[begin : begin + count],
        positions=np.arange(begin, begin + count, dtype=np.int32),
        write_slots=slots,
        context_slots=text.slots,
        wanted=np.array([count - 1], np.int32) if wanted else _NONE,
        purpose="draft",
    )


def _append(text: _Text, tokens: Ints, slots: Ints) -> None:
    """Note that the next tokens are in ``slots``."""
    text.slots = np.concatenate([text.slots, slots])
    text.tokens = tokens[: len(text.slots)].copy()
