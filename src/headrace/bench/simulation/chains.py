"""Chains of a fixed length, replayed without an engine.

Under :class:`headrace.speculation.policies.fixed.FixedChain` a step follows from lengths and fates alone: nobody is asked what a draft
is worth. So the same schedule is worked out on arrays, some fifty times faster, and comes to the same numbers to the last bit as the
replay through the engine, which a test holds it to. Where slots or rows could run short it declines, and the engine is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.bench.metrics import RequestRow
from headrace.bench.simulation.replay import START
from headrace.bench.workloads.arrivals import Arrival
from headrace.core.batch import StepShape
from headrace.core.policy import Limits
from headrace.core.protocols import Profile
from headrace.core.speculation import DraftCosts
from headrace.engine.sampling.rng import stream_key
from headrace.engine.simulation.acceptance import AcceptanceModel
from headrace.engine.simulation.paths import path

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SOURCE = "draft"
_NEVER = -1.0


@dataclass(slots=True)
class ChainReplay:
    """What came of a replay.

    Attributes:
        rows: one per request, in order of arrival.
        steps, verifications, drafted, accepted: as in :class:`headrace.core.outputs.EngineStats`.
        virtual_s: when it ended on the clock of the replay.
    """

    rows: list[RequestRow]
    steps: int = 0
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    virtual_s: float = 0.0


class NeedsEngine(Exception):
    """Slots or rows might not suffice, or requests have priorities: what happens then is for the engine to say."""


def replay_chains(
    arrivals: Sequence[Arrival],
    length: int,
    profile: Profile,
    costs: DraftCosts,
    model: AcceptanceModel,
    limits: Limits,
    *,
    slots: int = 1 << 17,
    context: int = 1 << 14,
) -> ChainReplay:
    """Replay ``arrivals`` with a chain of ``length`` for everybody in every step, prompts first.

    Args:
        arrivals: in order of time.
        length: nodes of every chain.
        profile: what a step costs; rows alone may count.
        costs: what drafting costs.
        model: the drafts' fates; the request that arrives n-th is drawn for as request n.
        limits, slots, context: of the engine.

    Raises:
        NeedsEngine: the engine would have to choose who gets what.
    """
    if any(a.priority or a.prompt_tokens + a.output_tokens > context for a in arrivals):
        raise NeedsEngine
    run = _Run(arrivals, length, profile, costs, model, limits, slots)
    while run.open:
        run.step()
    return run.result()


class _Run:
    """The state of a replay. Requests are numbered in order of arrival; running ones are kept in that order too."""

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        length: int,
        profile: Profile,
        costs: DraftCosts,
        model: AcceptanceModel,
        limits: Limits,
        slots: int,
    ) -> None:
        self._arrivals, self._length, self._profile, self._costs = arrivals, length, profile, costs
        self._limits, self._slots = limits, slots
        self._times = np.array([START + a.time_s for a in arrivals])
        self._out: Ints = np.array([a.output_tokens for a in arrivals], np.int64)
        self._held: Ints = np.array([a.prompt_tokens for a in arrivals], np.int64)
        self._pending = self._held.copy()
        self._done: Ints = np.zeros(len(arrivals), np.int64)
        self._first: Floats = np.full(len(arrivals), _NEVER)
        self._last: Floats = np.full(len(arrivals), _NEVER)
        self._wins = _wins(model, int(self._out.max(initial=1)), length, len(arrivals))
        self._running: Ints = np.empty(0, np.int64)
        self._come = self._admitted = 0
        self._now = START
        self._counts = ChainReplay([])
        self.open = len(arrivals)

    def step(self) -> None:
        """Take in who has come, then run a step or wait."""
        self._come += int(np.searchsorted(self._times[self._come :], self._now, side="right"))
        places = self._limits.max_sequences - len(self._running)
        newcomers = np.arange(self._admitted, min(self._come, self._admitted + places))
        self._admitted += len(newcomers)
        self._running = np.concatenate([self._running, newcomers])
        if not len(self._running):
            self._now += max(0.0, float(self._times[self._come]) - self._now)
            return
        self._counts.steps += 1
        prompts = self._running[self._pending[self._running] > 0]
        if len(prompts):
            self._prefill(prompts)
        else:
            self._decode()

    def _prefill(self, prompts: Ints) -> None:
        """As many prompts as fit whole, or a piece of the first."""
        budget, total, taken = self._limits.max_prefill_tokens, 0, []
        for number, pending in zip(prompts.tolist(), self._pending[prompts].tolist(), strict=True):
            if total and total + pending > budget:
                break
            taken.append((number, min(pending, budget)))
            total += min(pending, budget)
        self._check_room(0)
        self._pass(total, 0)
        for number, size in taken:
            self._pending[number] -= size
            if not self._pending[number]:
                self._done[number], self._first[number], self._last[number] = 1, self._now, self._now
        self._leave()

    def _decode(self) -> None:
        mine = self._running
        depths = np.clip(self._out[mine] - self._done[mine] - 1, 0, self._length)
        nodes = int(depths.sum())
        self._check_room(nodes)
        if nodes > self._limits.max_step_tokens - len(mine):
            raise NeedsEngine
        asked = int((depths > 0).sum())
        if asked:
            self._now += self._costs.draft_ms(SOURCE, asked, int(depths.max()), 1) * 1e-3
        self._pass(0, len(mine) + nodes)
        won = np.minimum(self._wins[mine, self._done[mine]], depths)
        self._done[mine] += won + 1
        self._last[mine] = self._now
        self._counts.verifications += len(mine)
        self._counts.drafted += nodes
        self._counts.accepted += int(won.sum())
        self._leave()

    def _pass(self, prompt: int, decode: int) -> None:
        """Spend the time of a step of so many rows."""
        self._now += self._profile.cost(StepShape(prompt, decode, 0, 0, 0)) * 1e-3

    def _check_room(self, nodes: int) -> None:
        mine = self._running
        if int((self._held[mine] + self._done[mine]).sum()) + nodes + 2 * len(mine) > self._slots:
            raise NeedsEngine

    def _leave(self) -> None:
        """Those who have all their tokens."""
        stay = self._done[self._running] < self._out[self._running]
        self.open -= int((~stay).sum())
        self._running = self._running[stay]

    def result(self) -> ChainReplay:
        """Rows and counts."""
        self._counts.rows = [self._row(number, arrival) for number, arrival in enumerate(self._arrivals)]
        self._counts.virtual_s = self._now - START
        return self._counts

    def _row(self, number: int, arrival: Arrival) -> RequestRow:
        came, first, last = (float(times[number]) for times in (self._times, self._first, self._last))
        decoded = int(self._done[number])
        return RequestRow(
            id=str(number),
            category=arrival.category,
            owner=arrival.owner,
            arrival_s=came,
            end_s=last,
            prompt_tokens=int(self._held[number]),
            output_tokens=int(self._out[number]),
            decoded=decoded,
            cached_tokens=0,
            preemptions=0,
            finished=True,
            ttft_ms=(first - came) * 1e3,
            tpot_ms=(last - first) / (decoded - 1) * 1e3 if decoded > 1 else None,
            e2e_ms=(last - came) * 1e3,
            slo_ttft_ms=arrival.slo.ttft_ms,
            slo_tpot_ms=arrival.slo.tpot_ms,
        )


def _wins(model: AcceptanceModel, places: int, most: int, requests: int) -> Ints:
    """int64[R, P + 1]: how many of ``most`` drafts in a row are accepted from each place of each request's answer on."""
    accepted = np.stack([path(model, stream_key(number), places).accepted for number in range(requests)])
    wins = np.zeros((requests, places + 1), np.int64)
    for place in range(places - 1, -1, -1):
        wins[:, place] = np.where(accepted[:, place], np.minimum(wins[:, place + 1] + 1, most), 0)
    return wins
