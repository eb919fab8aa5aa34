"""Whether answers are the same under every policy: greedy and sampled, over many prompts, on the bundled pair.

An answer counts as identical when its tokens are, or when it first differs where the model itself is undecided: the two best logits of
the run without drafts lie closer than rounding does (greedy answers alone; sampled ones get no excuse).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.bench.adaserve.load import read
from headrace.bench.adaserve.pair import Bench, Target, build
from headrace.core.request import Request, SamplingParams

TIE = 1e-3
"""Nats between the two best tokens within which float32 sums in another order may decide otherwise."""

CONTEXT, NEW = 192, 64
REFERENCE = "chunked"

Answers = dict[str, tuple[list[int], list[float]]]
"""Request -> its tokens and, where asked for, how far the best token was ahead of the second at each."""


def identity_rows(
    trace: Path, policies: Sequence[str], prompts: int, report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A row of kind "identity" for each policy: prompts, identical answers, ties among them, and how many drafts were accepted.

    Every prompt is answered with drafts forced on; every fourth one is sampled, with a seed of its own.
    """
    from headrace.models.text.tokenizer import Tokenizer

    bench = build(Target(shape="", quantize=None, context=CONTEXT), "bundled", report=lambda line: None)
    try:
        card = bench.engine.card
        texts = read(
            trace, Tokenizer(Path(card.path)).encode, context=CONTEXT, answer=NEW, vocab_size=card.vocab_size, most=prompts
        )  # fmt: skip
        asked = [_request(number, prompt) for number, prompt in enumerate(texts.prompts)]
        report("answers without drafts")
        plain = [replace(request, params=replace(request.params, logprobs=2)) for request in asked]
        reference = answers(bench, REFERENCE, plain)
        for policy in policies:
            if policy == REFERENCE:
                continue
            report(f"answers under {policy}")
            accepted = bench.engine.stats().accepted
            found = answers(bench, policy, asked)
            same = [_same(reference[request.id], found[request.id], request) for request in asked]
            yield {
                "kind": "identity", "policy": policy, "prompts": len(asked), "tokens": sum(len(t) for t, _ in found.values()),
                "identical": sum(kind != "different" for kind in same), "ties": same.count("tie"),
                "accepted": bench.engine.stats().accepted - accepted,
            }  # fmt: skip
    finally:
        bench.engine.close()


def _request(number: int, prompt: tuple[int, ...]) -> Request:
    temperature = 0.8 if number % 4 == 3 else 0.0
    params = SamplingParams(temperature=temperature, seed=number, max_tokens=NEW, ignore_eos=True)
    return Request(f"identity-{number}", prompt, params, speculate=True)


def answers(bench: Bench, policy: str, requests: Sequence[Request]) -> Answers:
    """Everybody's answer under ``policy``, as many at once as the engine takes."""
    engine = bench.use(policy)
    found: Answers = {request.id: ([], []) for request in requests}
    for request in requests:
        engine.add(replace(request, arrival=0.0))
    while engine.busy:
        for delta in engine.step():
            tokens, ahead = found[delta.request_id]
            tokens += delta.tokens
            ahead += [entry.top[0][1] - entry.top[1][1] for entry in delta.logprobs or ()]
    return found


def _same(reference: tuple[list[int], list[float]], other: tuple[list[int], list[float]], request: Request) -> str:
    """ "same", "tie" (they part where the model is undecided) or "different"."""
    (tokens, ahead), (others, _) = reference, other
    if tokens == others:
        return "same"
    place = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), None)
    undecided = place is not None and request.params.temperature == 0 and ahead[place] < TIE
    return "tie" if undecided else "different"
