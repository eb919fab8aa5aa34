"""Policies that speculate, and their registry. They see costs and drafts in the view alone, so an instance is nothing but settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from headrace.core.policy import DraftingPolicy
from headrace.speculation.policies.adaptive_chain import AdaptiveChain
from headrace.speculation.policies.adaserve import AdaServe, Settings
from headrace.speculation.policies.equal import Equal
from headrace.speculation.policies.fixed import FixedChain
from headrace.speculation.policies.paper import Paper

POLICIES: dict[str, Callable[[], DraftingPolicy]] = {
    "adaserve": AdaServe,
    "goodput": partial(AdaServe, Settings(slo_phase=False)),
    "paper": Paper,
    "equal": Equal,
    "adaptive-chain": AdaptiveChain,
    "spec-4": partial(FixedChain, 4),
    "spec-6": partial(FixedChain, 6),
    "spec-8": partial(FixedChain, 8),
}
