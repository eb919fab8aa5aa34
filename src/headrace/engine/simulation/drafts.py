"""Drafts without a model: trees whose fates an acceptance model has drawn, made in profiled time on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.core.clock import VirtualClock
from headrace.core.speculation import ROOT, Calibration, DraftCosts, DraftJob, DraftTree
from headrace.engine.sequence import Sequence as EngineSequence
from headrace.engine.simulation.acceptance import AcceptanceModel, Node, draft_token
from headrace.engine.simulation.paths import Chains


@dataclass(frozen=True, slots=True)
class PassCosts:
    """Drafters whose passes (one layer for everybody) are straight lines.

    Attributes:
        pass_ms: source -> milliseconds of a pass; other sources are free.
        row_ms: source -> milliseconds for every row of a pass.
        spared: passes whose rows cost nothing.
    """

    pass_ms: Mapping[str, float] = field(default_factory=dict)
    row_ms: Mapping[str, float] = field(default_factory=dict)
    spared: float = 0.0

    def draft_ms(self, source: str, sequences: int, depth: int, width: int) -> float:
        """``depth`` passes; nothing for nobody."""
        if not sequences:
            return 0.0
        rows = sequences * width * max(0.0, depth - self.spared)
        return self.pass_ms.get(source, 0.0) * depth + self.row_ms.get(source, 0.0) * rows

    def observe(self, source: str, sequences: int, depth: int, width: int, ms: float) -> None:
        """What costs here is known, not measured."""


@dataclass(frozen=True, slots=True)
class SimulatedSpeculation:
    """Drafts of a simulated machine.

    Attributes:
        models: source -> what becomes of its drafts.
        costs: what they cost, in truth and in the policies' eyes.
        calibration: learns from them; a fresh one for each run.
    """

    models: Mapping[str, AcceptanceModel]
    costs: DraftCosts
    calibration: Calibration


class SimulatedDrafter:
    """Conforms to :class:`headrace.core.speculation.Drafter`; probabilities are what the acceptance model lets a policy believe.

    Args:
        name: of the source.
        model: draws the fates.
        costs: what drafting takes of ``clock``.
        clock: moved as the drafts are made.
        find: the engine's sequence of a number.
        truth: the token that the simulated model says, always, to a sequence.
        vocab_size: of the simulated model.
    """

    def __init__(
        self,
        name: str,
        model: AcceptanceModel,
        costs: DraftCosts,
        clock: VirtualClock,
        find: Callable[[int], EngineSequence],
        truth: Callable[[EngineSequence], int],
        vocab_size: int,
    ) -> None:
        self.name, self.free = name, False
        self._model, self._costs, self._clock = model, costs, clock
        self._chains = Chains(model)
        self._find, self._truth, self._vocab_size = find, truth, vocab_size

    def draft(self, jobs: Sequence[DraftJob]) -> list[DraftTree]:
        """One tree per job."""
        depth, width = max(job.depth for job in jobs), max(job.width for job in jobs)
        self._clock.advance(self._costs.draft_ms(self.name, len(jobs), depth, width) * 1e-3)
        return [self._tree(job) for job in jobs]

    def forget(self, sequence: int) -> None:
        """Nothing is kept."""

    def _tree(self, job: DraftJob) -> DraftTree:
        sequence = self._find(job.sequence)
        truth = self._truth(sequence)
        if job.width == 1:
            beliefs, won = self._chains.draft(sequence.draw_key, len(sequence.output), job.depth)
            tokens = [truth] * won + [(truth + 1) % self._vocab_size] * (job.depth - won)
            return DraftTree.chain(tokens, beliefs, self.name)
        root = self._model.root(sequence.draw_key, len(sequence.output))
        nodes: list[Node] = []
        parents: list[int] = []
        layer: list[tuple[float, int, Node]] = [(1.0, ROOT, root)]
        for _ in range(job.depth):
            grown = [
                (path * child.belief, above, child)
                for path, above, node in layer
                for child in self._model.children(node, job.width)
            ]
            grown.sort(key=lambda item: -item[0])
            layer = []
            for path, above, child in grown[: job.width]:
                layer.append((path, len(nodes), child))
                nodes.append(child)
                parents.append(above)
        tokens = [draft_token(node, truth, self._vocab_size) for node in nodes]
        return DraftTree.of(tokens, parents, [node.belief for node in nodes], self.name)
