"""Which tokens are always attended, which are searched, and how many of them are fetched: plain numbers, no tensors.

A context is three regions (paper section 3, sheet 3.1): *initial* tokens and a *local* window, always attended, and the *middle*
between them, of which the best are retrieved.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Window:
    """Sizes in tokens for a context of one length."""

    initial: int
    local: int
    retrieved: int

    @property
    def attended(self) -> int:
        """Tokens of the past that a step reads."""
        return self.initial + self.local + self.retrieved

    def middle(self, length: int) -> tuple[int, int]:
        """First and last + 1 token of the middle of a context of ``length``; empty ones have the two equal."""
        first = min(self.initial, length)
        return first, max(first, length - self.local)


@dataclass(frozen=True, slots=True)
class Regions:
    """How a budget is spent.

    Attributes:
        budget: share of the context that a step may attend to, in (0, 1]; 1 attends to everything.
        initial: tokens at the start that are always attended.
        local_share: share of the budget that goes to the local window; the paper's code gives it half.
        growing: whether retrieved tokens follow the length of the context; else the prompt's length settles them, as in the
            paper's code, so that a long answer is attended ever more sparsely.
    """

    budget: float = 0.1
    initial: int = 32
    local_share: float = 0.5
    growing: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.budget <= 1.0:
            raise InvalidRequest(
                f"budget is {self.budget}: give a share of the context above 0 and up to 1", field="budget"
            )
        if self.initial < 0:
            raise InvalidRequest(f"initial is {self.initial}: give 0 tokens or more", field="initial")
        if not 0.0 <= self.local_share <= 1.0:
            raise InvalidRequest(f"local_share is {self.local_share}: give a share from 0 to 1", field="local_share")

    def window(self, prompt: int, length: int) -> Window:
        """Sizes for a context of ``length`` tokens that began with a prompt of ``prompt``.

        The local window stays as the prompt settled it, because tokens leave it one at a time.
        """
        if self.budget == 1.0:
            return Window(self.initial, 0, max(0, length - self.initial))
        local = int(max(0, prompt - self.initial) * self.budget * self.local_share)
        base = max(prompt, length) if self.growing else prompt
        return Window(self.initial, local, int(max(0, base - self.initial) * self.budget * (1.0 - self.local_share)))
