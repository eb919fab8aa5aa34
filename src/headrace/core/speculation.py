"""Drafts: tokens offered to a model ahead of its own, and what policies know of their chances and costs.

A :class:`DraftTree` hangs below the last committed token of a sequence (the root, which is not one of its nodes). The model verifies
the root and some nodes in one pass, and commits its own tokens as far as a node carries each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headrace.core.batch import Ints

Floats = NDArray[np.float64]

ROOT = -1


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Candidate continuations of one sequence.

    Attributes:
        tokens: int32[m].
        parents: int32[m], index of each node's parent, below its own; -1 for the root.
        depths: int32[m], 1 for children of the root.
        probabilities: float64[m], estimated probability that the model's own tokens follow the path from the root to the node; never
            above the parent's.
        source: name of the drafter.
    """

    tokens: Ints
    parents: Ints
    depths: Ints
    probabilities: Floats
    source: str = ""

    @classmethod
    def of(cls, tokens: ArrayLike, parents: ArrayLike, conditionals: ArrayLike, source: str = "") -> DraftTree:
        """A tree from each node's probability given its parent; depths and path probabilities are derived.

        Raises:
            ValueError: lengths differ, a parent does not come before its child, or a probability is outside of [0, 1].
        """
        ids, above = np.asarray(tokens, np.int32), np.asarray(parents, np.int32)
        given = np.asarray(conditionals, np.float64)
        if not len(ids) == len(above) == len(given):
            raise ValueError(f"{len(ids)} tokens, {len(above)} parents and {len(given)} probabilities")
        if len(given) and not (given.min() >= 0.0 and given.max() <= 1.0):
            raise ValueError(f"probabilities run from {given.min()} to {given.max()}: give values from 0 to 1")
        depths, paths = np.empty(len(ids), np.int32), np.empty(len(ids), np.float64)
        for node, parent in enumerate(above.tolist()):
            if not ROOT <= parent < node:
                raise ValueError(f"parents[{node}] is {parent}: a parent must come before its child (or be -1)")
            depths[node] = 1 if parent == ROOT else depths[parent] + 1
            paths[node] = given[node] * (1.0 if parent == ROOT else paths[parent])
        return cls(ids, above, depths, paths, source)

    @classmethod
    def chain(cls, tokens: ArrayLike, conditionals: ArrayLike, source: str = "") -> DraftTree:
        """A tree of width 1."""
        ids = np.asarray(tokens, np.int32)
        count = len(ids)
        return cls(
            ids,
            np.arange(-1, count - 1, dtype=np.int32),
            np.arange(1, count + 1, dtype=np.int32),
            np.cumprod(np.asarray(conditionals, np.float64), dtype=np.float64),
            source,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every node is the child of the one before it."""
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    @property
    def conditionals(self) -> Floats:
        """float64[m]: each node's probability given its parent (0 below a node of probability 0)."""
        above = np.where(self.parents == ROOT, 1.0, self.probabilities[self.parents])
        return np.divide(self.probabilities, above, out=np.zeros(len(self)), where=above > 0)

    def part(self, nodes: Ints) -> DraftTree:
        """The tree of ``nodes`` (ascending) alone, renumbered.

        Raises:
            ValueError: a node's parent is not among them.
        """
        places = np.full(len(self) + 1, -2, np.int32)
        places[nodes] = np.arange(len(nodes), dtype=np.int32)
        places[ROOT] = ROOT
        parents = places[self.parents[nodes]]
        if len(parents) and parents.min() < ROOT:
            orphan = int(nodes[int(parents.argmin())])
            raise ValueError(f"node {orphan} is chosen without its parent {int(self.parents[orphan])}")
        return DraftTree(self.tokens[nodes], parents, self.depths[nodes], self.probabilities[nodes], self.source)


def empty_tree(source: str = "") -> DraftTree:
    """A tree without nodes: nothing to offer."""
    none = np.empty(0, np.int32)
    return DraftTree(none, none, none, np.empty(0), source)


@dataclass(frozen=True, slots=True)
class DraftOrder:
    """What to draft for one sequence: a tree of at most ``depth`` layers of ``width`` nodes by the drafter called ``source``."""

    sequence: int
    source: str
    depth: int
    width: int = 1


@dataclass(slots=True)
class DraftPlan:
    """What to draft before a step; sequences that are not named get no draft."""

    orders: list[DraftOrder] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DraftJob:
    """An order with the text it is about.

    Attributes:
        sequence: the engine's number for the sequence.
        tokens: int32[t], everything known of it, the root last; valid during the call.
        depth, width: at most so many layers of so many nodes.
    """

    sequence: int
    tokens: Ints
    depth: int
    width: int = 1


class Drafter(Protocol):
    """Makes draft trees. It may keep what it knows of a sequence until it is told to forget it."""

    @property
    def name(self) -> str:
        """The source's name, as plans and measurements call it."""

    @property
    def free(self) -> bool:
        """Whether drafting costs next to nothing: such a drafter is asked first, and its tree taken where it promises as much."""

    def draft(self, jobs: Sequence[DraftJob]) -> list[DraftTree]:
        """One tree per job, in order; an empty one where it has nothing to offer.

        Which tree comes out never changes the text of an answer, only how soon it is there.
        """

    def forget(self, sequence: int) -> None:
        """The sequence has ended."""


class DraftCosts(Protocol):
    """What drafting costs."""

    def draft_ms(self, source: str, sequences: int, depth: int, width: int) -> float:
        """Predicted milliseconds to draft ``depth`` layers of ``width`` nodes for ``sequences`` sequences together."""

    def observe(self, source: str, sequences: int, depth: int, width: int, ms: float) -> None:
        """Learn what such a draft took."""


class Calibration(Protocol):
    """How likely drafts are to be what the model says; learnt while they are verified."""

    def survival(self, sequences: Sequence[int], source: str, depth: int) -> Floats:
        """float64[depth, S]: chances that chains of ``source`` are accepted to each depth (1 first), before there is a draft."""

    def calibrated(self, sequence: int, tree: DraftTree) -> DraftTree:
        """``tree`` with probabilities that are true on average."""

    def observe(self, sequence: int, tree: DraftTree, accepted: Sequence[int]) -> None:
        """Learn from a verified tree as its drafter made it (probabilities not calibrated).

        Args:
            tree: the nodes that were verified.
            accepted: nodes of the accepted path, from the root down.
        """

    def forget(self, sequence: int) -> None:
        """The sequence has ended."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a policy may expect of drafts.

    Attributes:
        sources: names of the drafters that cost something, the best first; of the free ones where there is no other.
        drafts: what drafting costs.
        calibration: what becomes of drafts.
        free: names of the drafters that cost nothing. They are asked before any other; a plan names one where no other pays.
    """

    sources: tuple[str, ...]
    drafts: DraftCosts
    calibration: Calibration
    free: tuple[str, ...] = ()
