"""What a policy sees and what it decides. Policies are pure: plain data in, plain data out, no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from headrace.core.batch import Ints
from headrace.core.request import SLO
from headrace.core.speculation import DraftPlan, DraftTree, Outlook

if TYPE_CHECKING:
    from headrace.core.protocols import Profile


class SequenceView(Protocol):
    """One sequence as a policy sees it; read only. Times are seconds on the engine's clock."""

    @property
    def id(self) -> int:
        """The engine's number for the sequence, rising with submission."""

    @property
    def priority(self) -> int:
        """Lower runs sooner."""

    @property
    def arrival(self) -> float:
        """When the request reached us."""

    @property
    def owner(self) -> str:
        """Label of who pays."""

    @property
    def slo(self) -> SLO:
        """Latency targets."""

    @property
    def context(self) -> int:
        """Tokens whose K and V are in slots."""

    @property
    def pending(self) -> int:
        """Known tokens not in slots yet: the rest of the prompt, or 1 while decoding."""

    @property
    def decoded(self) -> int:
        """Tokens generated so far."""

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""

    @property
    def width(self) -> int:
        """Sequences it stands for: n until a request with ``n > 1`` forks, then 1."""

    @property
    def first_token(self) -> float | None:
        """When the first token was committed."""

    @property
    def speculate(self) -> bool | None:
        """The client's word on speculation: True forces it on, False off, None leaves it to the policy."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that hold for every step.

    Attributes:
        max_sequences: sequences running at once.
        max_step_tokens: rows in one step (the token budget).
        max_prefill_tokens: rows of prompts in one step of a prefill-only policy.
    """

    max_sequences: int = 64
    max_step_tokens: int = 512
    max_prefill_tokens: int = 2048


@dataclass(slots=True)
class View:
    """The engine's state before a step.

    ``running`` are admitted sequences in order of admission, ``waiting`` the queue ordered by (priority, arrival, id).
    ``free_slots`` counts slots that are free or held only by evictable cached prefixes. ``profile`` tells what a step
    of any shape would cost now, None where nobody measured: a policy must do without. ``outlook`` is what may be
    expected of drafts (None: there is no drafter), ``candidates`` the drafts made for this step, by sequence, with
    calibrated probabilities.
    """

    now: float
    running: Sequence[SequenceView]
    waiting: Sequence[SequenceView]
    free_slots: int
    total_slots: int
    limits: Limits
    profile: Profile | None = None
    outlook: Outlook | None = None
    candidates: Mapping[int, DraftTree] = field(default_factory=dict)


@dataclass(slots=True)
class StepPlan:
    """What runs in a step.

    Attributes:
        chunks: (sequence id, tokens) in order of importance; a decoding sequence gets 1. A count above what is pending is
            cut to it.
        victims: ids to preempt, first to go first, should slots run out. A sequence preempts only those before it in this
            order (any, if it is not in it), and none that has got its chunk of this step. Those left out are never preempted.
        nodes: sequence id -> int32[k], the nodes of its candidate tree to verify beside its chunk of 1, each after its parent;
            the first ones are kept should slots be short. Ignored for a sequence without a chunk.
    """

    chunks: list[tuple[int, int]] = field(default_factory=list)
    victims: list[int] = field(default_factory=list)
    nodes: dict[int, Ints] = field(default_factory=dict)


Steadiness = Literal["always", "unqueued", "never"]
"""When a plan that gives every running sequence one token, with nobody to admit, stays the plan until a sequence ends or one
arrives: always; only while nobody waits (the default); or the policy must see every step."""


class Policy(Protocol):
    """Decides who runs. Both calls are functions of the view.

    A policy that needs memory keeps it itself, changes it in these two calls only and gives the same answer to the same view
    twice. An optional attribute ``steady`` (:data:`Steadiness`) tells simulators which steps they may take ahead.
    """

    def admit(self, view: View) -> list[int]:
        """Ids of waiting sequences to admit now, in order; the engine admits them all."""

    def plan(self, view: View) -> StepPlan:
        """What the admitted sequences do in this step."""


@runtime_checkable
class DraftingPolicy(Policy, Protocol):
    """A policy that speculates: it is asked for a draft plan first, and then plans with the candidates in view."""

    def draft(self, view: View) -> DraftPlan:
        """Which admitted sequences to draft for, how deep and how wide; asked only while ``view.outlook`` is there."""
