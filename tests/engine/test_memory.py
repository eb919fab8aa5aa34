"""The token budget after a step that did not fit."""

from __future__ import annotations

import pytest

from headrace.core.policy import Limits
from headrace.engine.memory import FLOOR, RECOVER_AFTER, StepBudget


def test_a_failed_step_halves_the_budget_and_good_ones_bring_it_back() -> None:
    full = Limits(max_step_tokens=64, max_prefill_tokens=64)
    budget = StepBudget(full)
    assert budget.shrink(60)
    assert budget.limits.max_step_tokens == budget.limits.max_prefill_tokens == 30
    for _ in range(RECOVER_AFTER - 1):
        budget.succeeded()
    assert budget.limits.max_step_tokens == 30
    budget.succeeded()
    assert budget.limits.max_step_tokens == 60
    for _ in range(RECOVER_AFTER):
        budget.succeeded()
    assert budget.limits is full


@pytest.mark.parametrize(("step", "prefill"), [(32, 512), (512, 32), (300, 300)])
def test_neither_shrinking_nor_recovering_exceeds_what_was_configured(step: int, prefill: int) -> None:
    budget = StepBudget(Limits(max_step_tokens=step, max_prefill_tokens=prefill))
    assert budget.shrink(max(step, prefill))
    for _ in range(10 * RECOVER_AFTER):
        assert budget.limits.max_step_tokens <= step
        assert budget.limits.max_prefill_tokens <= prefill
        budget.succeeded()
    assert (budget.limits.max_step_tokens, budget.limits.max_prefill_tokens) == (step, prefill)


def test_at_the_floor_there_is_nothing_to_shrink() -> None:
    budget = StepBudget(Limits())
    assert not budget.shrink(FLOOR)
    assert budget.limits == Limits()
