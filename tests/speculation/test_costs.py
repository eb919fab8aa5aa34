"""Costs of drafting, learnt as drafts are made."""

from __future__ import annotations

import pytest

from headrace.speculation.costs import DraftTimes


def test_layers_cost_what_they_took() -> None:
    times = DraftTimes(unknown_ms=7.0)
    assert times.draft_ms("draft", 4, 3, 1) == 21.0
    times.observe("draft", 4, 3, 1, 6.0)
    assert times.draft_ms("draft", 4, 5, 1) == pytest.approx(10.0)
    assert times.draft_ms("draft", 0, 5, 1) == 0.0
    assert times.draft_ms("other", 4, 1, 1) == 7.0


def test_sizes_are_told_apart_and_the_nearest_stands_in() -> None:
    times = DraftTimes()
    times.observe("draft", 1, 1, 1, 2.0)
    times.observe("draft", 16, 1, 2, 40.0)
    assert times.draft_ms("draft", 2, 1, 1) == 2.0
    assert times.draft_ms("draft", 64, 1, 1) == 40.0


def test_a_hiccup_at_a_new_size_is_not_believed() -> None:
    """However large a size is, it costs at most so many times as much more as it has rows, and thrice for bad luck."""
    times = DraftTimes()
    times.observe("draft", 8, 1, 1, 2.0)
    times.observe("draft", 16, 1, 1, 900.0)
    assert times.draft_ms("draft", 16, 1, 1) == pytest.approx(12.0)
    times.observe("other", 16, 1, 1, 900.0)  # nothing to compare it with
    assert times.draft_ms("other", 16, 1, 1) == 900.0


def test_a_change_is_followed_and_a_hiccup_is_not() -> None:
    times = DraftTimes()
    times.observe("draft", 1, 1, 1, 2.0)
    times.observe("draft", 1, 1, 1, 2000.0)
    assert times.draft_ms("draft", 1, 1, 1) < 2.5
    for _ in range(50):
        times.observe("draft", 1, 1, 1, 4.0)
    assert times.draft_ms("draft", 1, 1, 1) == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
def test_nonsense_is_ignored(ms: float) -> None:
    times = DraftTimes(unknown_ms=3.0)
    times.observe("draft", 1, 1, 1, ms)
    assert times.draft_ms("draft", 1, 1, 1) == 3.0
