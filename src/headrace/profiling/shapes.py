"""Which steps to measure, and segments that make a step of a given shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.core.batch import Ints, Segment, StepShape

_NONE = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class EvenStep:
    """A step of equal prompt chunks and equal decoding sequences.

    Attributes:
        prompts, chunk, prompt_context: prompt chunks, tokens in each (at least 2), and tokens before each.
        decodes, decode_context: sequences that decode one token each, and tokens before it.
    """

    prompts: int = 0
    chunk: int = 0
    prompt_context: int = 0
    decodes: int = 0
    decode_context: int = 0

    @property
    def shape(self) -> StepShape:
        """The step's shape."""
        p, d = self.prompts, self.decodes
        return StepShape(
            prefill_tokens=p * self.chunk,
            decode_tokens=d,
            context=p * self.prompt_context + d * self.decode_context,
            sequences=p + d,
            attended=p * self.chunk * (self.prompt_context + self.chunk) + d * (self.decode_context + 1),
        )

    @property
    def slots(self) -> int:
        """Slots the step needs: contexts and new tokens."""
        return self.prompts * (self.prompt_context + self.chunk) + self.decodes * (self.decode_context + 1)

    def segments(self, vocab_size: int, seed: int = 0) -> list[Segment]:
        """Segments of the step over slots ``0..slots - 1``, with tokens drawn by ``seed``; every segment wants its last row.

        Chunks that do not end their prompt want no row when served; wanting one keeps the cost on the safe side.
        """
        generator = np.random.default_rng(seed)
        made: list[Segment] = []
        at = 0
        parts = [(self.chunk, self.prompt_context)] * self.prompts + [(1, self.decode_context)] * self.decodes
        for number, (rows, held) in enumerate(parts):
            slots = np.arange(at, at + held + rows, dtype=np.int32)
            at += held + rows
            made.append(_segment(number, generator.integers(0, vocab_size, rows, np.int32), slots))
        return made


def _segment(number: int, tokens: Ints, slots: Ints) -> Segment:
    rows, held = len(tokens), len(slots) - len(tokens)
    return Segment(
        sequence=number,
        tokens=tokens,
        positions=np.arange(held, held + rows, dtype=np.int32),
        write_slots=slots[held:],
        context_slots=slots[:held],
        wanted=np.array([rows - 1], np.int32),
    )


def grid(*, max_sequences: int, max_step_tokens: int, context: int, slots: int) -> list[EvenStep]:
    """The steps to measure: decodes, prompts, and both together, at several contexts.

    Args:
        max_sequences, max_step_tokens: the engine's limits.
        context: longest prompt plus output.
        slots: size of the slot pool; steps that do not fit are left out.
    """
    decodes = doubling(1, max_sequences)
    chunks = doubling(4, min(max_step_tokens, context))
    contexts = [c for c in (16, 128, 512, 1024, 2048, 4096) if c < context]
    steps = [EvenStep(decodes=n, decode_context=c) for n in decodes for c in contexts]
    steps += [EvenStep(prompts=1, chunk=n) for n in chunks]
    steps += [EvenStep(prompts=1, chunk=n, prompt_context=c) for n in chunks[2::2] for c in contexts[1::2]]
    steps += [EvenStep(prompts=4, chunk=n // 4) for n in chunks if n >= 32]
    steps += [
        EvenStep(prompts=1, chunk=n - d, decodes=d, decode_context=c)
        for n in chunks[3::2]
        for d in decodes[2::2]
        for c in contexts[1:4:2]
        if n - d > 1
    ]
    return _usable(steps, max_step_tokens, context, slots)


def spread_out(steps: Sequence[EvenStep]) -> list[EvenStep]:
    """``steps`` so that every beginning of the list tells much for the time it takes.

    The smallest step comes first, then always the one farthest from those before it for its cost. The distance is that of the
    logarithms of rows, decoding rows, context and attended pairs; the cost, before anything is measured, is taken to grow with the
    rows. Measured: with time for a sixth of the grid, unseen steps are predicted as well as from all of it; in order of distance alone
    the time is gone after a few large prompts.
    """
    if not steps:
        return []
    shapes = [s.shape for s in steps]
    table = np.log2(
        1.0
        + np.array(
            [(s.prefill_tokens + s.decode_tokens, s.decode_tokens, s.context, s.attended) for s in shapes], float
        )
    )
    cost = 16.0 + np.array([s.prefill_tokens + s.decode_tokens for s in shapes], float)
    order = [int(table.sum(axis=1).argmin())]
    nearest = np.full(len(steps), np.inf)
    while len(order) < len(steps):
        nearest = np.minimum(nearest, np.abs(table - table[order[-1]]).sum(axis=1))
        nearest[order] = -1.0
        order.append(int((nearest / cost).argmax()))
    return [steps[i] for i in order]


def held_out(
    *, max_sequences: int, max_step_tokens: int, context: int, slots: int, count: int = 24, seed: int = 1
) -> list[EvenStep]:
    """Steps drawn at random between the grid's, to test predictions on; arguments as for :func:`grid`."""
    generator = np.random.default_rng(seed)
    taken = {
        s.shape
        for s in grid(max_sequences=max_sequences, max_step_tokens=max_step_tokens, context=context, slots=slots)
    }
    found: list[EvenStep] = []
    for _ in range(100 * count):
        decodes = int(np.exp(generator.uniform(0, np.log(max_sequences + 1)))) if generator.random() < 0.8 else 0
        rows = int(np.exp(generator.uniform(np.log(2), np.log(max_step_tokens + 1)))) if generator.random() < 0.6 else 0
        held = int(generator.integers(8, max(9, min(context - 1, 1500))))
        before = int(generator.integers(0, max(1, min(context - rows, 1000)))) if generator.random() < 0.4 else 0
        prompts = int(rows > 1)
        step = EvenStep(prompts, rows * prompts, before * prompts, decodes, held * min(decodes, 1))
        if step.shape not in taken and _usable([step], max_step_tokens, context, slots):
            found.append(step)
            taken.add(step.shape)
        if len(found) == count:
            break
    return found


def doubling(low: int, high: int) -> list[int]:
    """low, 2 low, 4 low ... and ``high`` itself; empty when ``high < low``."""
    values = []
    while low < high:
        values.append(low)
        low *= 2
    return [*values, high] if low <= high or values else []


def _usable(steps: Sequence[EvenStep], rows: int, context: int, slots: int) -> list[EvenStep]:
    return [
        s
        for s in dict.fromkeys(steps)
        if 0 < s.prompts * s.chunk + s.decodes <= rows
        and s.slots <= slots
        and s.prompt_context + s.chunk <= context
        and s.decode_context + 1 <= context
    ]
