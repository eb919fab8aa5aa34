"""What a sweep sends: named workloads cut to a model's context, pieces of them at a rate, and service classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from headrace.bench.openloop.shots import Shot, shots_of
from headrace.bench.workloads.arrivals import Arrival, excerpt, poisson, rescaled, scaled
from headrace.bench.workloads.traces import load_trace
from headrace.core.request import SLO

DRAWN = "poisson"
DRAWN_COUNT = 4096

CLASSES: dict[str, tuple[float, float]] = {"tight": (4.0, 2.0), "normal": (8.0, 4.0), "loose": (24.0, 12.0)}
"""Service classes: TTFT and TPOT targets as multiples of what a lone request gets."""


@dataclass(frozen=True, slots=True)
class Lone:
    """What a request gets that has the server to itself: medians in milliseconds, as the client sees them.

    ``front_ms`` is what passes between client and engine: TTFT as the client sees it less TTFT as the engine does.
    """

    ttft_ms: float
    tpot_ms: float
    front_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """A workload that fits the model.

    Attributes:
        name: how rows call it.
        arrivals: with lengths that fit; times are the workload's own.
        prompt_scale, output_scale: factors by which lengths were shrunk.
        drawn: arrival times are drawn anew for every piece; False takes consecutive arrivals of a recording.
    """

    name: str
    arrivals: Sequence[Arrival]
    prompt_scale: float = 1.0
    output_scale: float = 1.0
    drawn: bool = False

    def piece(self, rate: float, seconds: float, *, seed: int, most: int = 1000) -> list[Arrival]:
        """About ``seconds`` of the workload at ``rate`` requests a second, at least 2 and at most ``most`` requests, from time 0."""
        count = min(max(2, round(rate * seconds)), most)
        if not self.drawn:
            return rescaled(excerpt(self.arrivals, count, seed=seed), rate)
        chosen = excerpt(self.arrivals, count, seed=seed)
        times = [a.time_s for a in poisson(rate, count, seed=seed)]
        return [replace(a, time_s=time - times[0]) for a, time in zip(chosen, times, strict=True)]


def drawn_load(context: int, *, seed: int) -> Load:
    """Poisson arrivals with log-normal lengths (medians 96 and 40 tokens): short questions, some long ones."""
    generator = np.random.default_rng((seed, 9))
    prompts = np.exp(generator.normal(np.log(96), 0.8, DRAWN_COUNT)).round().astype(int).tolist()
    outputs = np.exp(generator.normal(np.log(40), 0.5, DRAWN_COUNT)).round().astype(int).tolist()
    arrivals = [Arrival(float(i), max(p, 4), max(o, 2)) for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))]
    fitting, by_prompt, by_output = scaled(arrivals, context, most=0.99)
    return Load(DRAWN, fitting, by_prompt, by_output, drawn=True)


def recorded_load(path: Path, context: int, lone: Lone, *, seed: int) -> Load:
    """A trace file's workload, named after the file; raises as :func:`headrace.bench.workloads.traces.load_trace`."""
    arrivals = load_trace(path, baseline_tpot_ms=lone.tpot_ms, seed=seed)
    fitting, by_prompt, by_output = scaled(arrivals, context)
    return Load(path.name.split(".")[0], fitting, by_prompt, by_output)


def with_classes(arrivals: Sequence[Arrival], lone: Lone, *, seed: int) -> list[Arrival]:
    """Arrivals without targets of their own get a service class each, drawn evenly; the class is their category."""
    generator = np.random.default_rng((seed, 7))
    names = list(CLASSES)
    made = []
    for arrival in arrivals:
        name = names[int(generator.integers(len(names)))]
        if arrival.slo == SLO():
            ttft, tpot = CLASSES[name]
            slo = SLO(round(lone.ttft_ms * ttft, 3), round(lone.tpot_ms * tpot, 3))
            arrival = replace(arrival, slo=slo, category=name)
        made.append(arrival)
    return made


@dataclass(frozen=True, slots=True)
class Model:
    """What shots depend on: vocabulary, longest prompt plus output used, and the tokeniser for traces with texts."""

    vocab_size: int
    context: int
    tokenize: Callable[[str], Sequence[int]] | None = None

    def shots(self, arrivals: Sequence[Arrival], *, seed: int) -> list[Shot]:
        """Shots whose drawn tokens belong to ``seed`` alone, so that no run finds another one's prompts in a cache."""
        return shots_of(arrivals, vocab_size=self.vocab_size, seed=seed, tokenize=self.tokenize)
