"""Which draft tokens a simulated target accepts, and what a draft believes about them. Pure: numbers in, numbers out.

**Truth.** The log odds that the draft's first choice is the target's token are ``ease`` plus three independent difficulties: of
the request, of the stretch of text it stands in, and of the token. Further choices take a fixed share of what is left
each. Difficulties are logistic, with the standard deviations stated in :class:`Acceptance`.

**Belief.** Policies are shown another probability: the true log odds divided by a temperature, plus a bias, plus noise
(:class:`Miscalibration`). Nobody but the verifier may look at :attr:`Node.accepted` and :attr:`Node.chance`.

**Fate.** Every draw is a function of (seed, request, source, place in the tree of all texts) and of nothing else: no generator
is advanced. The same node at the same position therefore lives or dies alike under every policy, whatever was drafted before,
beside or around it, and two policies can be compared request by request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from headrace.core.errors import InvalidRequest
from headrace.engine.sampling.rng import mix64

CHOICES = 8
"""Children of a node at most."""

UNIT_LOGISTIC = math.sqrt(3) / math.pi
"""A logistic variable times this has a standard deviation of 1."""

REQUEST, STRETCH, TOKEN, FATE, BELIEF = range(1, 6)
"""What a number is drawn for."""

_MOST = 0.9999


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How good a source of drafts is. Log odds throughout; spreads are standard deviations.

    Attributes:
        ease: of the first choice, where nothing is unusually hard or easy.
        request_spread, stretch_spread, token_spread: how much requests, stretches of text and single tokens differ.
        stretch: tokens of a stretch.
        sibling: what share of the probability left the next choice gets, in (0, 1).
    """

    ease: float
    request_spread: float = 0.5
    stretch_spread: float = 1.0
    token_spread: float = 1.0
    stretch: int = 12
    sibling: float = 0.4

    def __post_init__(self) -> None:
        spreads = (self.request_spread, self.stretch_spread, self.token_spread)
        if not (math.isfinite(self.ease) and all(s >= 0 and math.isfinite(s) for s in spreads)):
            raise InvalidRequest("acceptance: give a finite ease and spreads of at least 0", field="acceptance")
        if self.stretch < 1 or not 0 < self.sibling < 1:
            raise InvalidRequest("acceptance: stretch is at least 1 and sibling between 0 and 1", field="acceptance")


@dataclass(frozen=True, slots=True)
class Miscalibration:
    """How a draft's probabilities differ from the truth: log odds / temperature + bias + noise.

    Attributes:
        temperature: below 1 the draft is too sure of itself, above 1 too timid.
        bias: added to the log odds; above 0 it hopes for too much everywhere.
        noise: standard deviation of an error of its own at every node.
    """

    temperature: float = 0.8
    bias: float = 0.2
    noise: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.noise >= 0 or not math.isfinite(self.bias):
            raise InvalidRequest("miscalibration: temperature above 0, noise of at least 0", field="miscalibration")


EXACT = Miscalibration(temperature=1.0, bias=0.0, noise=0.0)
"""Beliefs that are the truth: for tests and for bounding what calibration can win."""


@dataclass(frozen=True, slots=True)
class Node:
    """A draft token, or the root of a draft: the last committed token.

    Attributes:
        position: index of the token in the answer; the root's is that of the last committed one (-1: the prompt's end).
        choice: 0 for the draft's first choice among its siblings, 1 for its second, ...
        belief: the probability, given its parent, that a policy may see.
        chance: the true one (0.0 below a node that is not accepted). For verifiers and tests alone.
        accepted: whether the target says this token after accepting everything above it. For verifiers alone.
        key: its place in the tree of all texts.
        request: the request's key.
    """

    position: int
    choice: int
    belief: float
    chance: float
    accepted: bool
    key: int = field(repr=False)
    request: int = field(repr=False)


class AcceptanceModel:
    """Draft trees and chains of one source, node by node.

    Args:
        acceptance: how good the source is.
        miscalibration: how it misjudges itself.
        seed: of everything drawn.
        source: name of the source; two sources meet the same requests and stretches, but fail at different tokens.

    Attributes:
        world, source: keys of what is drawn for requests and stretches, and for the source's own tokens.
    """

    def __init__(
        self,
        acceptance: Acceptance,
        miscalibration: Miscalibration | None = None,
        *,
        seed: int = 0,
        source: str = "draft",
    ) -> None:
        self.acceptance, self.miscalibration = acceptance, miscalibration or Miscalibration()
        self.world = mix64(seed + 1)
        self.source = mix64(self.world ^ int.from_bytes(source.encode(), "little"))
        self._places: dict[tuple[int, int], float] = {}

    def root(self, request: int, decoded: int) -> Node:
        """The root after ``decoded`` committed tokens.

        Args:
            request: any integer that is the request's own under every policy (the engine's ``Sequence.draw_key``).
            decoded: tokens of the answer so far.
        """
        return Node(decoded - 1, 0, 1.0, 1.0, True, path_key(request, decoded - 1), request)

    def children(self, node: Node, width: int = 1) -> list[Node]:
        """The ``width`` (at most :data:`CHOICES`) likeliest tokens after ``node``, best first by truth and by belief alike."""
        place = node.position + 1
        odds = self._log_odds(node, place)
        chance = expit(odds)
        belief = self.belief(odds, node.key)
        fate = uniform(self.source, node.key, FATE) if node.accepted else 1.0
        left, unsure = 1.0, 1.0
        found: list[Node] = []
        for choice in range(min(width, CHOICES)):
            if choice:
                chance = min(chance, self.acceptance.sibling * left)
                belief = min(belief, self.acceptance.sibling * unsure)
            accepted = 1.0 - left <= fate < 1.0 - left + chance
            key = path_key(node.request, place) if accepted else self.rejected_key(node.key, choice)
            found.append(Node(place, choice, belief, chance if node.accepted else 0.0, accepted, key, node.request))
            left -= chance
            unsure -= belief
        return found

    def chain(self, root: Node, depth: int) -> list[Node]:
        """The first choice after ``root``, the first choice after that, ... ``depth`` nodes."""
        nodes: list[Node] = []
        for _ in range(depth):
            root = self.children(root)[0]
            nodes.append(root)
        return nodes

    def belief(self, odds: float, parent: int) -> float:
        """What a draft believes of its first choice, whose true log odds are ``odds``, below the node with the key ``parent``."""
        wrong = self.miscalibration
        error = logistic(self.source, parent, BELIEF) * wrong.noise if wrong.noise else 0.0
        return expit(odds / wrong.temperature + wrong.bias + error)

    def rejected_key(self, parent: int, choice: int = 0) -> int:
        """Key of a node that is not the target's token, below the node with the key ``parent``."""
        return mix64(mix64(self.source ^ parent) + choice + 1)

    def _log_odds(self, node: Node, place: int) -> float:
        """Of the first choice at ``place`` after ``node``."""
        setting = self.acceptance
        block = place // setting.stretch
        around = self._places.get((node.request, block))
        if around is None:
            if len(self._places) > 1 << 16:
                self._places.clear()
            around = self._places[node.request, block] = (
                setting.ease
                + setting.request_spread * logistic(self.world, node.request, REQUEST)
                + setting.stretch_spread * logistic(self.world, path_key(node.request, block), STRETCH)
            )
        return around + setting.token_spread * logistic(self.source, node.key, TOKEN)


def draft_token(node: Node, truth: int, vocab_size: int) -> int:
    """The token id a simulated draft proposes at ``node``.

    Args:
        truth: what the simulated target says at this position.
        vocab_size: above :data:`CHOICES`; siblings get different ids.
    """
    return truth if node.accepted else (truth + 1 + node.choice) % vocab_size


def path_key(request: int, position: int) -> int:
    """Key of the accepted text of ``request`` up to ``position``: there is only one."""
    return mix64(mix64(request) + position + 2)


def uniform(world: int, key: int, purpose: int) -> float:
    """A draw in (0, 1) that depends on the arguments only."""
    return ((mix64(mix64(world + purpose) ^ key) >> 11) + 0.5) * 2.0**-53


def logistic(world: int, key: int, purpose: int) -> float:
    """A draw from the logistic distribution of mean 0 and standard deviation 1."""
    u = uniform(world, key, purpose)
    return math.log(u / (1.0 - u)) * UNIT_LOGISTIC


def expit(x: float) -> float:
    """Probability of log odds ``x``, kept below 1."""
    return min(1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0, _MOST)
