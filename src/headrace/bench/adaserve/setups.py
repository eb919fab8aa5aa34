"""What is simulated: targets with their drafts, and the systems that are compared on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.compose import get_policy
from headrace.core.policy import Policy
from headrace.core.speculation import Calibration, DraftTree, Floats
from headrace.engine.acceptance import EXACT, Miscalibration
from headrace.engine.simulated_drafts import PassCosts
from headrace.speculation.calibration import OnlineCalibration
from headrace.speculation.policies.adaserve import AdaServe, Settings
from headrace.speculation.policies.paper import Paper

FIXED = ("chunked", "prefill-first", "spec-4", "spec-6", "spec-8")
RIVALS = (*FIXED, "adaptive-chain")
"""What adaserve must never fall behind: fixed policies and the adaptive one without targets, all at the same costs."""

REPLICAS = {"chunked": "chunked", "prefill-first": "prefill-first"} | {f"vllm-spec-{k}": f"spec-{k}" for k in (4, 6, 8)}
"""Our name of a published system -> its policy. Those that speculate draft at vLLM's cost, which is fitted, not the artifact's."""

VLLM = tuple(name for name in REPLICAS if name.startswith("vllm-"))

VARIANTS: dict[str, Callable[[], Policy]] = {
    "adaserve-tree": lambda: AdaServe(Settings(width=3)),
    "adaserve-no-triage": lambda: AdaServe(Settings(triage=False)),
    "adaserve-uncalibrated": AdaServe,
    "adaserve-exact": AdaServe,
    "paper-least": lambda: Paper(first="least"),
}
"""Ablations: trees instead of chains; hopeless requests served like any other; beliefs taken as they are; beliefs that are the
truth; the published algorithm with those first who need least."""

ABLATIONS = ("equal", "goodput", "paper", *VARIANTS)
POLICIES = (*RIVALS, "equal", "goodput", "paper", "adaserve", *VLLM)
BLIND = frozenset((*RIVALS, "equal", "goodput", *VLLM))
"""Policies that look at nobody's TPOT target: one replay serves every target."""

CHAINS = frozenset(name for name in POLICIES if "spec-" in name)
"""Policies that ask nobody what a draft is worth."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A target with its draft, as simulated.

    Attributes:
        machine, pair: names of the step costs and of the acceptance fit.
        baseline_ms: TPOT of a lone request, which relative targets multiply.
        pass_ms: a layer of drafting, from the artifact's whole speculation.
        vllm: what drafting costs vLLM, fitted so that its chains of 4, 6 and 8 lose attainment with load as in figure 8.
        rates: requests a second, as in figure 8.
    """

    machine: str
    pair: str
    baseline_ms: float
    pass_ms: float
    vllm: PassCosts
    rates: tuple[float, ...]

    def drafting(self, policy: str) -> PassCosts:
        """What drafting costs under ``policy``."""
        return self.vllm if policy in VLLM else PassCosts({"draft": self.pass_ms})


_VLLM_LLAMA = PassCosts({"draft": 10.0}, {"draft": 0.2})
_VLLM_QWEN = PassCosts({"draft": 4.57}, {"draft": 0.36}, spared=1.0)

SETUPS: dict[str, Setup] = {
    "llama": Setup("llama-3.1-70b-8xa100-flat", "llama-3.1-70b+1b", 30.0, 70.0 / 8, _VLLM_LLAMA, (2.6, 3.4, 4.2, 4.8)),
    "qwen": Setup("qwen2.5-32b-4xa100-flat", "qwen2.5-32b+0.5b", 28.0, 35.0 / 5, _VLLM_QWEN, (2.4, 3.2, 3.6, 4.2)),
}


def policy_named(name: str) -> Policy:
    """A fresh policy: one of headrace's, a published system's stand-in, or an ablation.

    Raises:
        InvalidRequest: there is none; the message names the choices.
    """
    return VARIANTS[name]() if name in VARIANTS else get_policy(REPLICAS.get(name, name))


def calibration_for(name: str) -> Calibration:
    """What learns the worth of drafts under the policy ``name``."""
    return Unlearned() if name in CHAINS or name == "adaserve-uncalibrated" else OnlineCalibration()


def beliefs_for(name: str) -> Miscalibration:
    """What drafts believe of themselves under the policy ``name``."""
    return EXACT if name == "adaserve-exact" else Miscalibration()


class Unlearned:
    """A calibration that takes drafts at their word and learns nothing."""

    def __init__(self) -> None:
        self._prior = OnlineCalibration()

    def survival(self, sequences: Sequence[int], source: str, depth: int) -> Floats:
        """float64[depth, S]: what is expected of a source nobody has seen yet."""
        return self._prior.survival(sequences, source, depth)

    def calibrated(self, sequence: int, tree: DraftTree) -> DraftTree:
        """``tree`` as it is."""
        return tree

    def observe(self, sequence: int, tree: DraftTree, accepted: Sequence[int]) -> None:
        """Nothing is learnt."""

    def forget(self, sequence: int) -> None:
        """Nothing is kept."""
