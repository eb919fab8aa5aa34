"""Draft trees for tests: random ones, and every connected choice of their nodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from headrace.core.speculation import DraftTree


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 7) -> DraftTree:
    """A tree with random shape and probabilities; siblings share at most their parent's, some are certain."""
    count = draw(st.integers(0, max_nodes))
    parents: list[int] = []
    conditionals: list[float] = []
    spent: dict[int, float] = {}
    for node in range(count):
        parent = draw(st.integers(-1, node - 1))
        left = 1.0 - spent.get(parent, 0.0)
        share = draw(st.sampled_from([1.0, 0.5, 0.25, 0.9, 0.0]) | st.floats(0.01, 1.0))
        parents.append(parent)
        conditionals.append(left * share)
        spent[parent] = spent.get(parent, 0.0) + left * share
    return DraftTree.of(list(range(count)), parents, conditionals)


def connected(tree: DraftTree) -> Iterator[tuple[int, ...]]:
    """Every set of nodes that holds the parent of each of its nodes."""
    for size in range(len(tree) + 1):
        for nodes in itertools.combinations(range(len(tree)), size):
            if all(tree.parents[n] == -1 or int(tree.parents[n]) in nodes for n in nodes):
                yield nodes
