"""A sequence made up, for tests of policies."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.core.request import SLO


@dataclass
class Fake:
    """A sequence as a policy sees it; conforms to :class:`headrace.core.policy.SequenceView`."""

    id: int
    pending: int = 1
    decoded: int = 1
    context: int = 0
    priority: int = 0
    arrival: float = 0.0
    width: int = 1
    remaining: int = 10
    owner: str = ""
    slo: SLO = field(default_factory=SLO)
    first_token: float | None = None
    speculate: bool | None = None
