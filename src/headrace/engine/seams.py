"""What the step loop needs of its parts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from headrace.core.protocols import StepResult
from headrace.core.request import Structure
from headrace.engine.sampling.sampler import Draw, Sampled

if TYPE_CHECKING:
    from headrace.engine.structured.grammar import CompiledGrammar, GrammarState


class TokenSampler(Protocol):
    """Draws one token a row."""

    def sample(self, result: StepResult, rows: Seq[Draw]) -> list[Sampled]:
        """One outcome per draw, in order."""


class Grammars(Protocol):
    """Compiles structures in the background."""

    def compile(self, structure: Structure) -> Future[CompiledGrammar]:
        """A future of the compiled grammar; it fails with :class:`InvalidRequest`."""

    def start(self, compiled: CompiledGrammar) -> GrammarState:
        """A fresh state at the start of an answer."""
