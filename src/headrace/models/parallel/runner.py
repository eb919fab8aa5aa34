"""Rank 0's runner: tells the other ranks what to run, then runs its own share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.core.batch import Batch
from headrace.core.errors import EngineUnavailable, HeadraceError
from headrace.core.protocols import StepResult
from headrace.models.parallel import wire

if TYPE_CHECKING:
    from headrace.models.parallel.ranks import Ranks
    from headrace.models.runner import ModelRunner


class ParallelRunner:
    """A :class:`headrace.core.protocols.Runner` over all ranks of a model.

    A step that fails on one rank leaves the others in the middle of it, so nothing can be run afterwards: the model must be loaded
    again, which the engine's process does by ending.

    Args:
        inner: the runner of this process's share.
        ranks: the others, which are making themselves ready.

    Raises:
        HeadraceError: another rank cannot.
    """

    def __init__(self, inner: ModelRunner, ranks: Ranks) -> None:
        self._inner, self._ranks = inner, ranks
        self._failure: str | None = None
        ranks.hear("ready")

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._inner.vocab_size

    @property
    def attention(self) -> str:
        """Name of the attention backend in use."""
        return self._inner.attention

    @property
    def tp(self) -> int:
        """Ranks in all."""
        return self._ranks.size

    def run(self, batch: Batch) -> StepResult:
        """Run one step on every rank; see :class:`headrace.models.runner.ModelRunner`.

        Raises:
            EngineUnavailable: a rank is gone, or a step before has failed.
        """
        if self._failure is not None:
            raise EngineUnavailable(
                f"the ranks are out of step since an earlier one ({self._failure}): load the model again"
            )
        try:
            self._ranks.tell(wire.pack(batch).data.cast("B"))
            return self._inner.run(batch)
        except BaseException as error:
            self._failure = str(error) or type(error).__name__
            if isinstance(error, EngineUnavailable):
                raise
            if isinstance(error, RuntimeError | HeadraceError):
                self._ranks.check()
                raise EngineUnavailable(
                    f"a step failed on rank 0 of {self.tp} ({self._failure}): load the model again"
                ) from error
            raise

    def close(self) -> None:
        """End the other ranks."""
        self._failure = "closed"
        self._ranks.close()
