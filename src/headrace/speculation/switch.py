"""Speculation on and off: what was judged of drafting, how long that holds, and what is tried although it was judged too dear.

A judgement costs a fraction of a millisecond, which is nothing beside the step of a large model and much beside that of a small one.
So a depth is kept for a few steps, and where nothing pays the next judgement waits, longer each time, up to 256 steps or 0.2 s; a
change in the number of requests brings it forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace.core.policy import SequenceView, View
from headrace.core.speculation import DraftOrder
from headrace.speculation.policies.step import Step, orders
from headrace.speculation.trials import Trial, Trials

TRIAL_DEPTH = 2
"""Layers that are tried: what a source is worth shows in the first ones."""

PLANNING_MS = 0.25
"""What a step with drafts costs beside drafting and verifying: it has to be planned and learnt from. A trial takes twice that."""

MOST_STEPS, MOST_MS = 256.0, 200.0
"""Steps and milliseconds that pass at most before drafting is judged again."""

LEAST_MS = 25.0
"""Milliseconds between judgements, whatever comes and goes, while nothing is drafted."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to draft: ``depth`` layers by ``source`` (0: nothing pays) in steps of ``took`` milliseconds."""

    source: str
    depth: int
    took: float


class Switch:
    """The memory of a policy that speculates where it pays.

    The same view always gets the same answer, because all that is remembered is bound to the moment it was decided.

    Args:
        hold: steps for which a depth is kept.
        trials: when to try what is off; None never does.
    """

    def __init__(self, hold: int = 4, trials: Trials | None = None) -> None:
        self._hold, self._trials = hold, trials
        self._choice = Choice("", 0, 0.0)
        self._judged = self._until = self._soonest = float("-inf")
        self._decoding = self._running = -1
        self._pause = 0.0
        self._next_trial = float("-inf")
        self._trial: Trial | None = None
        self._tried: list[DraftOrder] = []

    def rests(self, view: View) -> bool:
        """Whether nothing is drafted now, which costs next to nothing to find out."""
        if self._choice.depth or self._trial is not None or view.now >= self._next_trial or not self._valid(view):
            return False
        return not any(s.speculate for s in view.running)

    def choice(self, step: Step, judge: Callable[[], Choice]) -> Choice:
        """What was judged, as long as it holds; else what ``judge`` says now."""
        view = step.view
        if view.now == self._judged or (
            self._valid(view) and (not self._choice.depth or self._decoding == len(step.decoding))
        ):
            return self._choice
        found = judge()
        if found.depth:
            self._pause, wait = 0.0, self._hold * found.took
            if self._trials is not None:
                self._trials.trusted(found.source)
        else:
            least, most = 2.0 * found.took, min(MOST_STEPS * found.took, MOST_MS)
            wait = self._pause = max(least, min(2.0 * self._pause, most))
        self._choice, self._judged, self._until = found, view.now, view.now + wait * 1e-3
        self._soonest = view.now + max(self._hold * found.took, LEAST_MS) * 1e-3
        self._decoding, self._running = len(step.decoding), len(view.running)
        return found

    def _valid(self, view: View) -> bool:
        """Whether the last judgement holds: not for long, and less so when as many do not run any more."""
        if self._choice.depth:
            return view.now < self._until
        return view.now < (self._until if len(view.running) == self._running else min(self._until, self._soonest))

    # ---- trials ----------------------------------------------------------------------------------------------

    def trial(self, step: Step) -> list[DraftOrder]:
        """Orders of a trial, where one is due of a source that is not in use."""
        view = step.view
        if self._trial is not None and self._trial.began == view.now:
            return self._tried
        self._settle(view)
        outlook = view.outlook
        used = self._choice.source if self._choice.depth else ""
        # Who drafts with a source that costs something asks the free ones as well.
        if self._trials is None or outlook is None or (used and used not in outlook.free):
            self._next_trial = float("inf")
            return []
        idle = [s for s in dict.fromkeys([*outlook.free, *outlook.sources]) if s != used]
        takes = {s: 2 * PLANNING_MS + outlook.drafts.draft_ms(s, self._trials.few, TRIAL_DEPTH, 1) for s in idle}
        due = {s: self._trials.due(s, view.now, takes[s]) for s in idle}
        self._next_trial = min(due.values(), default=float("inf"))
        able = [s for s in step.decoding if s.speculate is None and s.remaining > TRIAL_DEPTH]
        source = next((s for s in idle if due[s] <= view.now), None)
        if source is None or not able:
            return []
        chosen: list[SequenceView] = self._trials.chosen(source, able)
        self._trial = Trial(source, {s.id: s.decoded for s in chosen}, view.now)
        self._tried = orders(chosen, source, [TRIAL_DEPTH] * len(chosen))
        return self._tried

    def verifying(self, step: Step) -> set[int]:
        """Sequences all of whose candidates are verified because they are tried."""
        trial, candidates = self._trial, step.view.candidates
        if trial is None:
            return set()
        return {n for n in trial.before if n in candidates and candidates[n].source == trial.source}

    def planned(self, step: Step, nodes: int) -> None:
        """A trial's step is planned, with ``nodes`` for those tried: what it takes, and what it must bring to pay."""
        trial, outlook = self._trial, step.view.outlook
        if trial is None or outlook is None:
            return
        count, tried = len(step.decoding), len(trial.before)
        everybody = min(step.room, nodes * count // max(tried, 1))
        passes = step.passes(everybody)
        drafting = PLANNING_MS + outlook.drafts.draft_ms(trial.source, count, TRIAL_DEPTH, 1)
        trial.least = float((drafting + passes[everybody]) / passes[0]) - 1.0
        expected = outlook.drafts.draft_ms(trial.source, tried, TRIAL_DEPTH, 1)
        trial.spent = (
            2 * PLANNING_MS + max(expected, (step.view.now - trial.began) * 1e3) + float(passes[nodes] - passes[0])
        )

    def _settle(self, view: View) -> None:
        trial, self._trial = self._trial, None
        if trial is not None and self._trials is not None:
            self._trials.settle(trial, {s.id: s.decoded for s in view.running})
