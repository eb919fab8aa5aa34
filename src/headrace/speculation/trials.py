"""Trying drafts again that were judged not to pay, at a bounded cost.

What is not drafted is not verified, and what is not verified teaches nothing: a source judged too dear would stay off for ever. So
each source is tried now and then, for a few sequences. A trial is won when so many tokens came of it that drafting for everybody would
have paid. After a won trial the next one follows at once, for twice as many sequences, so that what is known of the source catches up
in a few steps. Any other has to be earned: it waits until the time it will take is a small share of the time passed, and twice or four
times as long when more were lost in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.core.policy import SequenceView


@dataclass(slots=True)
class Trial:
    """A step in which some sequences are drafted for that would not be.

    Attributes:
        source: whose drafts are tried.
        before: sequence -> tokens it had.
        began: seconds on the engine's clock.
        least: tokens beyond its own that each sequence must gain for drafts to pay.
        spent: milliseconds that the trial took of everybody's step.
    """

    source: str
    before: dict[int, int]
    began: float
    least: float = 0.0
    spent: float = 0.0


@dataclass(slots=True)
class _Source:
    """What is known of a source that is not in use.

    Attributes:
        due: seconds on the engine's clock of its next trial; None until it is known.
        size: sequences of the next trial; 0 for a first one.
        lost: trials lost in a row.
        tried: trials of each sequence that runs.
    """

    due: float | None = None
    size: int = 0
    lost: int = 0
    tried: dict[int, int] = field(default_factory=dict)


class Trials:
    """When to try which source, and for whom.

    Args:
        share: of the time that trials which are lost may take.
        few: sequences of a first trial.
        most_lost: doublings of the wait after lost trials.
        faith: trials of a sequence before another one is tried instead.
    """

    def __init__(self, share: float = 0.01, few: int = 4, most_lost: int = 2, faith: int = 4) -> None:
        self._share, self.few, self._most_lost, self._faith = share, few, most_lost, faith
        self._sources: dict[str, _Source] = {}

    def due(self, source: str, now: float, takes: float) -> float:
        """When ``source``, which is not in use, is to be tried next; ``takes`` are the milliseconds that a trial should take."""
        known = self._sources.setdefault(source, _Source())
        if known.due is None:
            known.due = now + self._wait(takes, 0)
        return known.due

    def _wait(self, milliseconds: float, lost: int) -> float:
        """Seconds in which a trial is earned."""
        return milliseconds * 1e-3 / self._share * 2.0**lost

    def chosen(self, source: str, sequences: Sequence[SequenceView]) -> list[SequenceView]:
        """Whom to try ``source`` for: those tried before, so that what the drafter knows of them is used, then short texts."""
        known = self._sources[source]
        tried = known.tried
        ordered = sorted(sequences, key=lambda s: (tried.get(s.id, 0) // self._faith, -tried.get(s.id, 0), s.context))
        found = ordered[: known.size or self.few]
        known.tried = {s.id: tried.get(s.id, 0) for s in sequences if s.id in tried} | {
            s.id: tried.get(s.id, 0) + 1 for s in found
        }
        return found

    def settle(self, trial: Trial, decoded: Mapping[int, int]) -> bool:
        """Take in how a trial ended; whether it was won.

        Args:
            trial: with what it took.
            decoded: tokens of the sequences that still run, by number.
        """
        known = self._sources.get(trial.source)
        if known is None:  # in use by now, or never thought of
            return False
        gains = [decoded[number] - before - 1 for number, before in trial.before.items() if number in decoded]
        won = bool(gains) and sum(gains) >= trial.least * len(gains) and max(gains) > 0
        if won:
            known.due, known.lost = trial.began, 0
            known.size = 2 * (known.size or self.few)
        else:
            known.due = trial.began + self._wait(trial.spent, known.lost)
            known.lost = min(known.lost + 1, self._most_lost)
            known.size = self.few
        return won

    def trusted(self, source: str) -> None:
        """``source`` is in use: its next trial, should it be judged too dear again, is a first one that must be earned."""
        self._sources.pop(source, None)
