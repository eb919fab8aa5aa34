"""What is simulated: targets with their drafts, and the systems that are compared on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.bench.simulation.machines import get_machine
from headrace.compose import get_policy
from headrace.core.batch import StepShape
from headrace.core.policy import Policy
from headrace.core.protocols import Profile
from headrace.core.speculation import Calibration, DraftTree, Floats
from headrace.engine.simulation.acceptance import EXACT, Miscalibration
from headrace.engine.simulation.drafts import PassCosts
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
POLICIES = ("adaserve", *RIVALS, *VLLM, "equal", "goodput", "paper")
BLIND = frozenset((*RIVALS, "equal", "goodput", *VLLM))
"""Policies that look at nobody's TPOT target: one replay serves every target."""

CHAINS = frozenset(name for name in POLICIES if "spec-" in name)
"""Policies that ask nobody what a draft is worth."""


CAPTURED_ROWS = 512
"""vLLM replays captured graphs up to so many rows; a verification of more launches its kernels one by one."""


@dataclass(slots=True)
class Machine:
    """Step costs that depend on rows alone, remembered by them; conforms to :class:`headrace.core.protocols.Profile`.

    Attributes:
        profile: what a step costs.
        eager_ms: what verifying more than :data:`CAPTURED_ROWS` rows costs beside that.
    """

    profile: Profile
    eager_ms: float = 0.0
    _known: dict[int, float] = field(default_factory=dict)

    def cost(self, shape: StepShape) -> float:
        """Milliseconds of a step."""
        rows = shape.prefill_tokens + shape.decode_tokens
        ms = self._known.get(rows)
        if ms is None:
            ms = self._known[rows] = self.profile.cost(shape)
        return ms + self.eager_ms if shape.decode_tokens > CAPTURED_ROWS else ms


@dataclass(frozen=True, slots=True)
class Setup:
    """A target with its draft, as simulated.

    Attributes:
        machine, pair: names of the step costs and of the acceptance fit.
        baseline_ms: TPOT of a lone request, which relative targets multiply.
        pass_ms: a layer of drafting, from the artifact's whole speculation.
        vllm, vllm_eager_ms: what drafting costs vLLM, and verifying beyond its captured graphs; fitted so that its chains of 4, 6
            and 8 lose attainment with load as in figure 8.
        rates: requests a second, as in figure 8.
    """

    machine: str
    pair: str
    baseline_ms: float
    pass_ms: float
    vllm: PassCosts
    vllm_eager_ms: float
    rates: tuple[float, ...]

    def steps(self, policy: str) -> Machine:
        """What steps cost under ``policy``."""
        return Machine(get_machine(self.machine), self.vllm_eager_ms if policy in VLLM else 0.0)

    def drafting(self, policy: str) -> PassCosts:
        """What drafting costs under ``policy``."""
        return self.vllm if policy in VLLM else PassCosts({"draft": self.pass_ms})


SETUPS: dict[str, Setup] = {
    "llama": Setup(
        machine="llama-3.1-70b-8xa100-flat",
        pair="llama-3.1-70b+1b",
        baseline_ms=30.0,
        pass_ms=70.0 / 8,
        vllm=PassCosts({"draft": 8.7}, {"draft": 0.084}, spared=1.42),
        vllm_eager_ms=66.8,
        rates=(2.6, 3.4, 4.2, 4.8),
    ),
    "qwen": Setup(
        machine="qwen2.5-32b-4xa100-flat",
        pair="qwen2.5-32b+0.5b",
        baseline_ms=28.0,
        pass_ms=35.0 / 5,
        vllm=PassCosts({"draft": 5.2}, {"draft": 0.38}, spared=1.52),
        vllm_eager_ms=0.0,
        rates=(2.4, 3.2, 3.6, 4.2),
    ),
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
