"""Which nodes of the candidate trees to verify: the two phases of AdaServe (EuroSys 2026, algorithms 1 and 2), as array arithmetic.

A verified node adds its path probability to the tokens a request may expect of a step; the root adds 1. The SLO phase
gives every request the fewest nodes from which it expects what it needs, the throughput phase spends the rest of the
budget where a node is likeliest to be accepted. With true probabilities and without caps the outcome is optimal: no
other choice of connected trees expects more tokens.

Where the paper's pseudocode and its text differ, the text holds: path probabilities count, not conditional ones, and
no more nodes are taken than the budget has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from headrace.core.speculation import Floats
from headrace.speculation.forest import Counts, Forest

Urgency = Literal["most", "least", "fewest"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What each request gets.

    Attributes:
        taken: int64[R], nodes of each request, its best ones.
        owed: int64[R], those of them that the SLO phase gave.
        met: bool[R], whether the request may expect what it needs.
    """

    taken: Counts
    owed: Counts
    met: np.ndarray[tuple[int], np.dtype[np.bool_]]

    @property
    def total(self) -> int:
        """Nodes in all."""
        return int(self.taken.sum())


def select(
    forest: Forest,
    need: Floats,
    budget: int,
    *,
    n_max: int | None = None,
    first: Urgency = "most",
    weights: Floats | None = None,
    worth: Callable[[int, Floats], int] | None = None,
) -> Selection:
    """Run both phases.

    Args:
        forest: the candidates.
        need: float64[R], tokens each request needs of this step, the root's included; at most 1 for one that is owed nothing.
        budget: nodes to give away, roots not counted.
        n_max: most nodes the SLO phase gives to one request.
        first: whom the SLO phase serves first: those who need the "most" or the "least" tokens, each as far as the budget goes; or
            those who need the "fewest" nodes, each with all that it needs or none, for some of them rescue nobody.
        weights: float64[R], what a token of each request counts for in the throughput phase, 1 by default; a request that
            counts for nothing gets none there.
        worth: called as ``worth(nodes owed, gains)`` with the gains of the throughput phase's candidates, best first; how many of
            them to take. By default all that the budget has.
    """
    owed = slo_phase(forest, need, budget, n_max=n_max, first=first)
    places = forest.merged(owed, weights)
    if weights is not None:
        places = places[weights[forest.owners[places]] > 0]
    places = places[: max(0, budget - int(owed.sum()))]
    if worth is not None:
        places = places[: worth(int(owed.sum()), forest.gains[places])]
    taken = owed + np.bincount(forest.owners[places], minlength=len(forest))
    return Selection(taken, owed, forest.expected(taken) >= need - 1e-12)


def slo_phase(
    forest: Forest, need: Floats, budget: int, *, n_max: int | None = None, first: Urgency = "most"
) -> Counts:
    """int64[R]: nodes each request gets for its target; arguments as for :func:`select`."""
    fewest = forest.fewest(need)
    within = forest.sizes if n_max is None else np.minimum(forest.sizes, n_max)
    whole = first == "fewest"
    wanted = np.where(fewest > within, 0, fewest) if whole else np.minimum(fewest, within)
    key = {"most": -need, "least": need, "fewest": wanted}[first]
    turn = np.argsort(key, kind="stable")
    before = np.cumsum(wanted[turn]) - wanted[turn]
    given = np.clip(budget - before, 0, wanted[turn])
    if whole:  # ascending, so nobody behind one that does not fit would
        given[given < wanted[turn]] = 0
    owed = np.zeros(len(forest), np.int64)
    owed[turn] = given
    return owed


def best_yield(expected: float, gains: Floats, spent: Floats) -> int:
    """How many nodes make a step commit the most tokens a millisecond; the fewest of equals.

    Args:
        expected: tokens the step commits without any of these nodes.
        gains: float64[k], what each further node adds, best first.
        spent: float64[at least k + 1], milliseconds of the step with 0, 1, ... of them.
    """
    tokens = np.empty(len(gains) + 1)
    tokens[0] = expected
    np.cumsum(gains, out=tokens[1:])
    tokens[1:] += expected
    return int((tokens / spent[: len(tokens)]).argmax())


def ladder(low: int, high: int) -> list[int]:
    """low, then steps that grow by about a half, then high; ascending and distinct."""
    rungs, step = [low], 1
    while rungs[-1] < high:
        rungs.append(min(high, rungs[-1] + step))
        step = max(step + 1, step * 3 // 2)
    return rungs
