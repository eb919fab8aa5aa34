"""How much a step may hold after the device ran out of memory."""

from __future__ import annotations

from dataclasses import replace

from headrace.core.policy import Limits

FLOOR = 16
RECOVER_AFTER = 64


class StepBudget:
    """The limits of the next step: those configured, or less for a while after a step did not fit.

    A failed step halves the token budget; ``RECOVER_AFTER`` good steps double it again.
    """

    def __init__(self, limits: Limits) -> None:
        self._full = self.limits = limits
        self._good = 0

    def shrink(self, tokens: int) -> bool:
        """Halve the budget after a step of ``tokens`` rows failed; False when it is at the floor already."""
        if tokens <= FLOOR:
            return False
        self._cap(max(FLOOR, tokens // 2))
        return True

    def succeeded(self) -> None:
        """Note a step that fitted."""
        if self.limits is self._full:
            return
        self._good += 1
        if self._good >= RECOVER_AFTER:
            self._cap(2 * max(self.limits.max_step_tokens, self.limits.max_prefill_tokens))

    def _cap(self, rows: int) -> None:
        """Bound a step by ``rows`` and by what was configured."""
        full = self._full
        step, prefill = min(rows, full.max_step_tokens), min(rows, full.max_prefill_tokens)
        whole = (step, prefill) == (full.max_step_tokens, full.max_prefill_tokens)
        self.limits = full if whole else replace(full, max_step_tokens=step, max_prefill_tokens=prefill)
        self._good = 0
