"""Trials of sources that are off: earned by time, growing with success, rarer with failure."""

from __future__ import annotations

import pytest
from tests.speculation.policies.views import Fake

from headrace.speculation.trials import Trial, Trials


def tried(trials: Trials, now: float, gain: int, *, spent: float = 2.0, least: float = 0.5) -> int:
    """A trial at ``now`` in which everybody gains ``gain`` tokens beyond its own; for how many it was."""
    sequences = [Fake(n, decoded=10) for n in range(30)]
    chosen = trials.chosen("draft", sequences)
    trial = Trial("draft", {s.id: s.decoded for s in chosen}, now, least, spent)
    trials.settle(trial, {s.id: s.decoded + 1 + gain for s in sequences})
    return len(chosen)


def test_a_first_trial_is_earned() -> None:
    trials = Trials(share=0.01)
    assert trials.due("draft", 100.0, 2.0) == pytest.approx(100.2)  # 2 ms are a hundredth of 200
    assert trials.due("draft", 100.1, 2.0) == pytest.approx(100.2)


def test_lost_trials_become_rarer_up_to_a_bound() -> None:
    trials, now, waits = Trials(share=0.01, most_lost=2), 100.0, []
    for _ in range(5):
        now = trials.due("draft", now, 2.0)
        tried(trials, now, 0)
        waits.append(trials.due("draft", now, 2.0) - now)
    assert waits == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.8])


def test_won_trials_follow_each_other_and_grow() -> None:
    trials, now = Trials(few=4), 100.0
    trials.due("draft", now, 2.0)
    sizes = []
    for _ in range(4):
        sizes.append(tried(trials, now, 1))
        assert trials.due("draft", now, 2.0) <= now
    assert sizes == [4, 8, 16, 30]
    assert tried(trials, now, 0) == 30
    assert trials.due("draft", now, 2.0) > now
    assert tried(trials, now, 0) == 4


def test_less_than_what_pays_is_lost() -> None:
    trials = Trials()
    trials.due("draft", 1.0, 2.0)
    tried(trials, 1.0, 1, least=1.5)
    assert trials.due("draft", 1.0, 2.0) > 1.0


def test_the_same_sequences_are_tried_a_few_times_then_others() -> None:
    """A drafter that has read a text can go on with it, but one text that is hard shall not speak for all."""
    trials = Trials(few=2, faith=3)
    trials.due("draft", 1.0, 2.0)
    sequences = [Fake(n, context=100 - n) for n in range(6)]
    rounds = [sorted(s.id for s in trials.chosen("draft", sequences)) for _ in range(6)]
    assert rounds[0] == rounds[1] == rounds[2] == [4, 5]
    assert rounds[3] == rounds[4] == rounds[5] == [2, 3]


def test_who_has_ended_teaches_nothing_and_use_forgets_all() -> None:
    trials = Trials()
    trials.due("draft", 1.0, 2.0)
    trials.settle(Trial("draft", {1: 5}, 1.0, 0.5, 2.0), {})
    assert trials.due("draft", 1.0, 2.0) > 1.0
    trials.trusted("draft")
    assert not trials.settle(Trial("draft", {1: 5}, 1.0, 0.5, 2.0), {1: 9})
    assert trials.due("draft", 50.0, 2.0) == pytest.approx(50.2)
