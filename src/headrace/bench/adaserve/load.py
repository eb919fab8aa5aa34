"""What is sent to the real pair: the trace's prompts cut to a short context, its classes scaled to this machine, at any rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.bench.workloads.arrivals import Arrival, excerpt, rescaled
from headrace.bench.workloads.traces import load_trace
from headrace.core.request import SLO, Request, SamplingParams

if TYPE_CHECKING:
    from headrace.bench.adaserve.pair import Bench

PAPER_BASELINE_MS = 30.0
"""TPOT of a lone request where the traces come from: their absolute targets were set beside it."""

URGENT = 1.2
"""Multiple of the baseline for requests that bring no target."""


@dataclass(frozen=True, slots=True)
class Texts:
    """A trace's requests as token ids.

    Attributes:
        arrivals: in order, targets still the trace's (multiples of a baseline of 1 ms; absolute ones as they are).
        prompts: token ids of each, cut.
        answer: tokens of every answer.
    """

    arrivals: tuple[Arrival, ...]
    prompts: tuple[tuple[int, ...], ...]
    answer: int

    def piece(
        self, rate: float, count: int, baseline_ms: float, *, seed: int, name: str, start: float
    ) -> list[Request]:
        """``count`` consecutive requests from a place drawn by ``seed``, at ``rate`` a second from ``start`` on.

        Targets are multiples of ``baseline_ms``: absolute ones are scaled as the baseline is to the trace's own machine.
        """
        numbered = [replace(a, owner=str(i)) for i, a in enumerate(self.arrivals)]
        part = rescaled(excerpt(numbered, count, seed=seed), rate)
        return [
            Request(
                id=f"{name}-{place}",
                prompt=self.prompts[int(a.owner)],
                params=SamplingParams(temperature=0.0, max_tokens=self.answer, ignore_eos=True, seed=place),
                slo=scaled_slo(a, baseline_ms),
                tier=a.category or None,
                arrival=start + a.time_s,
            )
            for place, a in enumerate(part)
        ]


def read(
    trace: Path, encode: Callable[[str], Sequence[int]], *, context: int, answer: int, vocab_size: int, most: int = 600
) -> Texts:
    """The first ``most`` requests of a trace; prompts are cut to ``context`` less the answer, those without text are drawn.

    Raises:
        InvalidRequest: the trace cannot be read.
    """
    from headrace.bench.workloads.arrivals import prompt_of

    arrivals = load_trace(trace, baseline_tpot_ms=1.0, slo=SLO(tpot_ms=URGENT * PAPER_BASELINE_MS))[:most]
    room = context - answer
    prompts = [
        tuple(prompt_of(a, i, vocab_size=vocab_size, tokenize=lambda text: encode(text)[:room]))[:room] or (0,)
        for i, a in enumerate(arrivals)
    ]
    return Texts(tuple(arrivals), tuple(prompts), answer)


def scaled_slo(arrival: Arrival, baseline_ms: float) -> SLO:
    """An arrival's targets for a machine whose lone request takes ``baseline_ms`` a token."""
    slo = arrival.slo
    by = baseline_ms if _relative(arrival.category) else baseline_ms / PAPER_BASELINE_MS
    return SLO(
        ttft_ms=None if slo.ttft_ms is None else slo.ttft_ms * baseline_ms / PAPER_BASELINE_MS,
        tpot_ms=None if slo.tpot_ms is None else slo.tpot_ms * by,
    )


def _relative(category: str) -> bool:
    """Whether the category is a ``slo_ratio`` above 0, which was read as a multiple of 1 ms."""
    try:
        return float(category) > 0
    except ValueError:
        return False


def lone_tpot_ms(bench: Bench, texts: Texts, count: int) -> list[float]:
    """TPOT of ``count`` requests, each alone and without drafts."""
    engine = bench.use("chunked")
    found = []
    for place in range(count):
        request = texts.piece(1.0, 1, 1e6, seed=place, name=f"lone-{place}", start=0.0)[0]
        engine.add(replace(request, arrival=0.0, slo=SLO()))
        while engine.busy:
            ended = [delta.timing for delta in engine.step() if delta.reason is not None]
            found += [timing.tpot_ms for timing in ended if timing is not None and timing.tpot_ms is not None]
    return found


def saturation(bench: Bench, texts: Texts, count: int) -> float:
    """Requests a second without drafts when all of ``count`` come at once."""
    engine = bench.use("chunked")
    begun = engine.clock.now()
    for request in texts.piece(1e6, count, 1e6, seed=1, name="full", start=begun):
        engine.add(replace(request, arrival=begun))
    while engine.busy:
        engine.step()
    return count / (engine.clock.now() - begun)
