"""Which replays a simulated comparison needs: loads, targets, overload and ablations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest

from headrace.bench.adaserve.setups import ABLATIONS, BLIND, POLICIES, RIVALS, SETUPS, VARIANTS, VLLM

OVERLOAD = 1.39
"""Times the highest published rate: the overload in which feeding hopeless requests hurts everybody."""

TIGHT_RATE = 4.0
"""Requests a second of the sweep over SLO scales, as in figure 11."""

URGENT = 1.2
"""Multiple of the baseline TPOT that the trace promises its most urgent class."""

EDGES = (2.4, 4.8)
"""Requests a second at which every model is simulated beside its own published rates."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One replay.

    Attributes:
        model: key of :data:`headrace.bench.adaserve.setups.SETUPS`.
        rate: requests a second.
        policy: a policy's name, that of a published system, or an ablation.
        tightness: multiples of the baseline TPOT that the most urgent class is promised, a row for each; None keeps the trace's.
            Several only for policies that look at no target.
        count: requests to replay; None replays all.
        seed: of the drafts' fates.
    """

    model: str
    rate: float
    policy: str
    tightness: tuple[float | None, ...] = (None,)
    count: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to compare.

    Attributes:
        models, policies: names.
        rates: requests a second, instead of each setup's own.
        pace: factor on a setup's own rates, for traces whose requests are longer or shorter than the published one's.
        tightness: SLO scales at :data:`TIGHT_RATE`, the trace's own beside.
        overload: factors on the highest rate.
        ablations: names, at the highest rate and in overload.
        count: requests of each replay; None replays the whole trace.
        seeds: fates to replay everything with.
    """

    models: tuple[str, ...] = tuple(SETUPS)
    policies: tuple[str, ...] = POLICIES
    rates: tuple[float, ...] = ()
    pace: float = 1.0
    tightness: tuple[float, ...] = (1.6, 1.0, 0.8, 0.6)
    overload: tuple[float, ...] = (OVERLOAD,)
    ablations: tuple[str, ...] = tuple(VARIANTS)
    count: int | None = None
    seeds: tuple[int, ...] = (0,)

    def cells(self) -> list[Cell]:
        """All replays: policies before ablations, and of each published rates, the highest first,
        overload, SLO scales and further rates; models take turns."""
        found: list[Cell] = []
        for seed in self.seeds:
            for group in (self._rates, self._overload, self._tight, self._edges, self._ablations):
                by_turns = zip_longest(*(group(model) for model in self.models))
                found += [replace(cell, count=self.count, seed=seed) for turn in by_turns for cell in turn if cell]
        return sorted(dict.fromkeys(found), key=lambda cell: cell.policy in ABLATIONS)

    def own_rates(self, model: str) -> tuple[float, ...]:
        """Requests a second at which ``model`` is simulated."""
        return self.rates or tuple(round(rate * self.pace, 3) for rate in SETUPS[model].rates)

    def _ours(self) -> list[str]:
        """Policies that draft at our cost, and those that do not draft."""
        return [name for name in self.policies if name not in VLLM]

    def _rates(self, model: str) -> list[Cell]:
        return [Cell(model, rate, policy) for rate in self.own_rates(model)[::-1] for policy in self.policies]

    def _over(self, model: str) -> list[float]:
        return [round(self.own_rates(model)[-1] * factor, 3) for factor in self.overload]

    def _overload(self, model: str) -> list[Cell]:
        return [Cell(model, rate, policy) for rate in self._over(model) for policy in self._ours()]

    def _tight(self, model: str) -> list[Cell]:
        if not self.tightness:
            return []
        rate = round(TIGHT_RATE * self.pace, 3)
        scales: tuple[float | None, ...] = (None, *self.tightness)
        found = []
        for policy in self._ours():
            together = [scales] if policy in BLIND else [(scale,) for scale in scales]
            found += [Cell(model, rate, policy, scale) for scale in together]
        return found

    def _edges(self, model: str) -> list[Cell]:
        if self.rates or not self.tightness:
            return []
        compared = [name for name in self.policies if name in RIVALS or name == "adaserve"]
        rates = [round(rate * self.pace, 3) for rate in EDGES if rate not in SETUPS[model].rates]
        return [Cell(model, rate, policy) for rate in rates for policy in compared]

    def _ablations(self, model: str) -> list[Cell]:
        rates = [self.own_rates(model)[-1], *self._over(model)]
        return [Cell(model, rate, policy) for rate in rates for policy in self.ablations if policy in ABLATIONS]


def quick(sweep: Sweep) -> Sweep:
    """A part of ``sweep`` that takes about half a minute: one model at its highest rate, few requests, four policies."""
    model = sweep.models[0]
    return replace(
        sweep,
        models=(model,),
        rates=sweep.own_rates(model)[-1:],
        policies=tuple(name for name in sweep.policies if name in ("chunked", "spec-4", "adaptive-chain", "adaserve")),
        count=min(sweep.count or 200, 200),
        tightness=(),
        overload=(),
        ablations=(),
    )
