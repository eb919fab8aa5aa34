"""Workloads: when requests arrive, how long they are and what they want; made up or reshaped, always from a seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from headrace.core.errors import InvalidRequest
from headrace.core.request import SLO, Request, SamplingParams

BLOCK = 512
"""Tokens of a block of ``Arrival.blocks`` as recorded."""

Lengths = Callable[[np.random.Generator], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload, before it has tokens.

    Attributes:
        time_s: seconds since the workload began.
        prompt_tokens, output_tokens: lengths, each at least 1.
        text: the prompt's text where it is known.
        blocks: ids of the prompt's blocks of ``block_tokens`` tokens; equal ids are equal tokens.
        category: what kind of request it is, for reporting.
    """

    time_s: float
    prompt_tokens: int
    output_tokens: int
    text: str | None = None
    blocks: tuple[int, ...] | None = None
    block_tokens: int = BLOCK
    slo: SLO = field(default_factory=SLO)
    category: str = ""
    owner: str = ""
    priority: int = 0


def poisson(
    rate: float,
    count: int,
    *,
    seed: int,
    lengths: Lengths | Sequence[tuple[int, int]] = ((512, 128),),
    slo: SLO | None = None,
) -> list[Arrival]:
    """``count`` arrivals at ``rate`` a second, independent of each other.

    Args:
        lengths: (prompt, output) tokens to draw from evenly, or a function that draws them.
        slo: targets of every request.
    """
    if not rate > 0:
        raise InvalidRequest(f"rate is {rate!r}: give requests per second above 0", field="rate")
    generator = np.random.default_rng(seed)
    times = np.cumsum(generator.exponential(1 / rate, count))
    made = []
    for time in times.tolist():
        prompt, output = lengths(generator) if callable(lengths) else lengths[int(generator.integers(len(lengths)))]
        made.append(Arrival(time, prompt, output, slo=slo or SLO()))
    return made


def rescaled(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same arrivals, faster or slower, so that ``rate`` come per second on average; the first comes at 0."""
    if not rate > 0:
        raise InvalidRequest(f"rate is {rate!r}: give requests per second above 0", field="rate")
    start = arrivals[0].time_s if arrivals else 0.0
    span = (arrivals[-1].time_s - start) if arrivals else 0.0
    if span <= 0:
        return [replace(a, time_s=0.0) for a in arrivals]
    whole = (len(arrivals) - 1) / rate
    return [replace(a, time_s=(a.time_s - start) / span * whole) for a in arrivals]


def repeated(arrivals: Sequence[Arrival], seconds: float) -> list[Arrival]:
    """The arrivals over and over, each round one mean gap after the one before, until ``seconds`` have passed.

    Raises:
        InvalidRequest: the arrivals take no time, so that no number of rounds would.
    """
    span = arrivals[-1].time_s - arrivals[0].time_s if arrivals else 0.0
    if not span > 0:
        raise InvalidRequest(
            "a trace whose requests all come at once cannot be repeated: give --requests", field="hours"
        )
    period = span * len(arrivals) / (len(arrivals) - 1)
    rounds = math.ceil(seconds / period)
    start = arrivals[0].time_s
    long = (replace(a, time_s=a.time_s - start + turn * period) for turn in range(rounds) for a in arrivals)
    return truncated(long, seconds=seconds)


def truncated(arrivals: Iterable[Arrival], *, count: int | None = None, seconds: float | None = None) -> list[Arrival]:
    """The first ``count`` arrivals, or those of the first ``seconds``."""
    kept: list[Arrival] = []
    for arrival in arrivals:
        if (count is not None and len(kept) >= count) or (seconds is not None and arrival.time_s > seconds):
            break
        kept.append(arrival)
    return kept


def within_context(arrivals: Iterable[Arrival], context: int) -> list[Arrival]:
    """Arrivals cut to a model's context: output to half of it at most, then the prompt to what is left."""
    if context < 2:
        raise InvalidRequest(f"context is {context}: a prompt and an answer need at least 2 tokens", field="context")
    kept = []
    for arrival in arrivals:
        if arrival.prompt_tokens + arrival.output_tokens > context:
            output = min(arrival.output_tokens, max(context // 2, context - arrival.prompt_tokens))
            arrival = replace(arrival, output_tokens=output, prompt_tokens=min(arrival.prompt_tokens, context - output))
        kept.append(arrival)
    return kept


def scaled(arrivals: Sequence[Arrival], context: int, *, most: float = 0.95) -> tuple[list[Arrival], float, float]:
    """Arrivals whose lengths shrink in proportion until they fit a context; shared blocks shrink alike and stay shared.

    Prompts and outputs shrink by a factor each, so that of each the share ``most`` fits three quarters and one quarter of
    ``context``; the few that are still too long are cut as :func:`within_context` does. Nothing ever grows.

    Returns:
        The arrivals, the prompts' factor and the outputs' factor.
    """
    if not arrivals:
        return [], 1.0, 1.0
    prompts = float(np.quantile([a.prompt_tokens for a in arrivals], most))
    outputs = float(np.quantile([a.output_tokens for a in arrivals], most))
    by_prompt, by_output = min(1.0, 0.75 * context / prompts), min(1.0, 0.25 * context / outputs)
    shrunk = [
        replace(
            a,
            prompt_tokens=max(1, round(a.prompt_tokens * by_prompt)),
            output_tokens=max(1, round(a.output_tokens * by_output)),
            block_tokens=max(1, round(a.block_tokens * by_prompt)),
        )
        for a in arrivals
    ]
    return within_context(shrunk, context), by_prompt, by_output


def excerpt(arrivals: Sequence[Arrival], count: int, *, seed: int) -> list[Arrival]:
    """``count`` consecutive arrivals from a place drawn by ``seed`` (all of them where there are no more); the first comes at 0."""
    if len(arrivals) > count:
        start = int(np.random.default_rng((seed, 5)).integers(0, len(arrivals) - count + 1))
        arrivals = arrivals[start : start + count]
    return [replace(a, time_s=a.time_s - arrivals[0].time_s) for a in arrivals]


def requests(
    arrivals: Iterable[Arrival],
    *,
    vocab_size: int,
    seed: int = 0,
    start: float = 0.0,
    tokenize: Callable[[str], Sequence[int]] | None = None,
) -> Iterator[Request]:
    """The requests of a workload, made one at a time, in order.

    Every answer is as long as the workload says: greedy, end-of-text ignored.

    Args:
        vocab_size: tokens are drawn below it.
        seed: of the drawn tokens; equal texts and equal blocks get equal tokens under one seed.
        start: added to the arrival times, seconds.
        tokenize: turns a prompt's text into ids; without it, as many ids as ``prompt_tokens`` are drawn.
    """
    for number, arrival in enumerate(arrivals):
        yield Request(
            id=str(number),
            prompt=prompt_of(arrival, number, vocab_size=vocab_size, seed=seed, tokenize=tokenize),
            params=SamplingParams(temperature=0.0, max_tokens=arrival.output_tokens, ignore_eos=True, seed=number),
            priority=arrival.priority,
            slo=arrival.slo,
            tier=arrival.category or None,
            arrival=start + arrival.time_s,
            owner=arrival.owner,
        )


def prompt_of(
    arrival: Arrival,
    number: int,
    *,
    vocab_size: int,
    seed: int = 0,
    tokenize: Callable[[str], Sequence[int]] | None = None,
) -> tuple[int, ...]:
    """Token ids of the ``number``-th arrival's prompt; arguments as for :func:`requests`."""
    if arrival.text is not None and tokenize is not None:
        return tuple(tokenize(arrival.text))
    count = arrival.prompt_tokens
    if arrival.blocks is not None:
        ids: list[int] = []
        for place, block in enumerate(arrival.blocks):
            size = min(arrival.block_tokens, count - place * arrival.block_tokens)
            if size > 0:
                # Drawn whole and then cut, so that a part of a block is a prefix of it.
                ids += _drawn((seed, 1, block), BLOCK, vocab_size)[:size]
        ids += _drawn((seed, 2, number), count - len(ids), vocab_size)
        return tuple(ids)
    if arrival.text is not None:
        digest = hashlib.sha256(arrival.text.encode()).digest()
        return tuple(_drawn((seed, 3, int.from_bytes(digest[:8], "little")), count, vocab_size))
    return tuple(_drawn((seed, 4, number), count, vocab_size))


def _drawn(key: tuple[int, int, int], count: int, vocab_size: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(key).integers(0, vocab_size, count).tolist()
    return drawn
