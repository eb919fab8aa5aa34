"""Feeding a runner by hand: sequences with scattered slots, cut into chunks, decode steps and trees."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from tests import tiny

from headrace.core.batch import Ints, Packer, Segment
from headrace.models.cache.slots import SlotPool
from headrace.models.runner import ModelRunner

TOLERANCE = 1e-4  # largest difference of two float32 forwards of a tiny model that rounding may cause


def ints(values: object) -> Ints:
    return np.asarray(values, np.int32)


def make_runner(family: str, attention: str = "reference", slots: int = 512) -> ModelRunner:
    return ModelRunner(tiny.loaded(family), SlotPool(slots), attention)


def truth(module: torch.nn.Module, ids: Ints) -> torch.Tensor:
    """float32[n, vocabulary]: the whole forward of one sequence by transformers' own attention."""
    with torch.inference_mode():
        return module(torch.from_numpy(ids).long()[None], use_cache=False).logits[0].float()


@dataclass
class Fed:
    """A sequence on its way into slots.

    ``ids`` are all its tokens, ``slots`` as many slots in any order, ``done`` how many are in.
    """

    ids: Ints
    slots: Ints
    done: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    def chunk(self, count: int) -> Segment:
        lo, hi = self.done, min(self.done + count, len(self.ids))
        self.done = hi
        rows = ints(np.arange(lo, hi))
        return Segment(0, self.ids[lo:hi], rows, self.slots[lo:hi], self.slots[:lo], ints(np.arange(hi - lo)))

    def tree(self, tokens: Ints, parents: Ints, slots: Ints) -> Segment:
        """Tree nodes after what is done; a root's position follows the last token's."""
        depth = ints(np.zeros(len(parents)))
        for node, parent in enumerate(parents):
            depth[node] = 0 if parent < 0 else depth[parent] + 1
        rows = ints(np.arange(len(tokens)))
        return Segment(
            0, tokens, depth + self.done, slots, self.slots[: self.done], rows, parents=parents, purpose="verify"
        )


def feed(runner: ModelRunner, sequences: list[Fed], counts: list[int]) -> None:
    """One step: ``counts[i]`` tokens of sequence i (0: it sits out), logits appended to the sequences."""
    taking = [s for s, count in zip(sequences, counts, strict=True) if count and s.done < len(s.ids)]
    chosen = [count for s, count in zip(sequences, counts, strict=True) if count and s.done < len(s.ids)]
    segments = [s.chunk(count) for s, count in zip(taking, chosen, strict=True)]
    logits = runner.run(Packer().pack(segments)).logits
    parts = logits.split([len(segment.tokens) for segment in segments])
    for sequence, part in zip(taking, parts, strict=True):
        sequence.logits.append(part)


def scattered(lengths: list[int], seed: int, pool: int = 512) -> list[Fed]:
    """Sequences of random tokens over disjoint slots in random order."""
    rng = np.random.default_rng(seed)
    order, at, out = ints(rng.permutation(pool)), 0, []
    for length in lengths:
        out.append(Fed(ints(rng.integers(4, tiny.VOCAB, length)), order[at : at + length]))
        at += length
    return out


def random_tree(rng: np.random.Generator, nodes: int) -> Ints:
    """Parents of a random tree whose first node is the root."""
    return ints([-1, *(int(rng.integers(0, i)) for i in range(1, nodes))])


def path_to(parents: Ints, node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    return path[::-1]
