"""Acceptance parameters from published figures: mean accepted tokens of a verification, by length of the chain.

Such means fix one number, the ease: spreads change them little and must be stated as assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.core.errors import InvalidRequest
from headrace.engine.simulation.acceptance import EXACT, Acceptance, AcceptanceModel

ANSWER = 256
"""Tokens of an answer, as in AdaServe's evaluation."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A target and its draft.

    Attributes:
        published: chain length -> mean accepted draft tokens of a verification.
        source: where the figures stand.
    """

    published: Mapping[int, float]
    source: str


# Read off figure 12 of AdaServe (EuroSys 2026), +-0.2. Read as accepted draft tokens, without the token that every verification
# adds: with it, chains of 6 would gain 1.6 tokens over chains of 4, more than two further tokens can after 2.4 of 4.
PAIRS: dict[str, Pair] = {
    "llama-3.1-70b+1b": Pair({4: 3.4, 6: 5.0, 8: 6.6}, "AdaServe (EuroSys 2026), figure 12"),
    "qwen2.5-32b+0.5b": Pair({4: 3.0, 6: 4.4, 8: 5.7}, "AdaServe (EuroSys 2026), figure 12"),
}

FITTED: dict[str, Acceptance] = {
    "llama-3.1-70b+1b": Acceptance(ease=4.76, request_spread=1.5),
    "qwen2.5-32b+0.5b": Acceptance(ease=3.24),
}
"""What :func:`fit` makes of :data:`PAIRS` with these spreads. Llama's requests differ more than by default: figure 8 says so, where its
chains lose requests by and by as load grows."""


def get_acceptance(name: str) -> Acceptance:
    """The fitted parameters of a pair; raises :class:`InvalidRequest` naming the choices."""
    if name not in FITTED:
        raise InvalidRequest(f"acceptance is {name!r}: choose one of {', '.join(FITTED)}", field="acceptance")
    return FITTED[name]


def accepted_per_verification(
    acceptance: Acceptance, depth: int, *, answers: int = 200, length: int = ANSWER, seed: int = 0
) -> float:
    """Mean draft tokens accepted of a chain of ``depth``, over whole answers of ``length`` tokens."""
    model = AcceptanceModel(acceptance, EXACT, seed=seed)
    accepted = verifications = 0
    for request in range(answers):
        decoded = 1  # the first token is the prompt's
        while decoded < length:
            root = model.root(request, decoded)
            won = 0
            while won < depth and (root := model.children(root)[0]).accepted:
                won += 1
            accepted += won
            verifications += 1
            decoded += won + 1
    return accepted / verifications


def fit(
    published: Mapping[int, float], start: Acceptance | None = None, *, answers: int = 60, seed: int = 0
) -> Acceptance:
    """The ease whose mean accepted tokens come closest to ``published`` (least squares of relative errors).

    Args:
        published: chain length -> mean accepted draft tokens.
        start: everything but the ease.
        answers: answers to simulate for each evaluation.

    Raises:
        InvalidRequest: nothing is published, or more is accepted than drafted.
    """
    if not published or any(not 0 < mean < depth for depth, mean in published.items()):
        raise InvalidRequest("published: give chain lengths with a mean between 0 and the length", field="published")
    base = start or Acceptance(ease=0.0)

    def loss(ease: float) -> float:
        tried = replace(base, ease=ease)
        return sum(
            (accepted_per_verification(tried, depth, answers=answers, seed=seed) / mean - 1) ** 2
            for depth, mean in published.items()
        )

    # Draws are common to all tries and means rise with the ease, so that the loss has one valley.
    low, high = -6.0, 10.0
    for _ in range(12):
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return replace(base, ease=round((low + high) / 2, 2))
