"""Lossless verification of any draft tree: draw from the model, go on where a node carries what was drawn.

At each node the next token is drawn exactly as without a draft: same logits, same processing, same random number. If
a child carries it, its logits are known already and the walk goes on there; if not, the drawn token is still the
model's own and the walk ends. A draft therefore never changes a token, only how many come out of a step. The chance
to go on at a node is the probability of its children together, which no lossless rule exceeds for a fixed set of
children.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from headrace.core.batch import Ints
from headrace.core.speculation import ROOT, DraftTree

T = TypeVar("T")


class Walk:
    """A way down a tree, from the root to the last node whose token the model drew too.

    Attributes:
        path: nodes behind it, from the root's child down.
    """

    __slots__ = ("_children", "path")

    def __init__(self, tree: DraftTree | None) -> None:
        self._children: dict[tuple[int, int], int] = {}
        if tree is not None:
            # Nodes with the same text hold the same K and V: the first stands for all of them, children included.
            same: list[int] = []
            for node, (parent, token) in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)):
                above = ROOT if parent == ROOT else same[parent]
                same.append(self._children.setdefault((above, token), node))
        self.path: list[int] = []

    @property
    def node(self) -> int:
        """Where it stands; ``ROOT`` at first."""
        return self.path[-1] if self.path else ROOT

    def step(self, token: int) -> bool:
        """Go to the child that carries ``token``; False, and it stays, when there is none."""
        child = self._children.get((self.node, token))
        if child is None:
            return False
        self.path.append(child)
        return True


def verify(tree: DraftTree, draw: Callable[[int], T], token_of: Callable[[T], int]) -> tuple[list[T], list[int]]:
    """Walk a tree whose logits are all known.

    Args:
        tree: the verified nodes.
        draw: called with ``ROOT``, then with each accepted node; draws the token that follows it.
        token_of: the token of what ``draw`` returns.

    Returns:
        What was drawn, one more than the accepted nodes, and the accepted nodes from the root down.
    """
    walk, drawn = Walk(tree), []
    while True:
        drawn.append(draw(walk.node))
        if not walk.step(token_of(drawn[-1])):
            return drawn, walk.path


def settled(slots: Ints, path: list[int]) -> tuple[Ints, Ints]:
    """Which of a verified segment's slots hold the committed tokens, in order, and which are free again.

    Args:
        slots: int32[1 + k], of the root and the k verified nodes.
        path: accepted nodes, indices into the k.
    """
    rows = [0, *(node + 1 for node in path)]
    kept = slots[rows]
    gone = slots.copy()
    gone[rows] = -1
    return kept, gone[gone >= 0]
