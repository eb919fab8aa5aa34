"""Machines whose step costs are known without measuring them here, for simulation."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.batch import StepShape
from headrace.core.errors import InvalidRequest
from headrace.profiling.fit import Curve


@dataclass(frozen=True, slots=True)
class LinearMachine:
    """A machine of straight lines: milliseconds per step, per row, and per 1000 context tokens."""

    step_ms: float
    row_ms: float = 0.0
    context_ms: float = 0.0

    def cost(self, shape: StepShape) -> float:
        """Milliseconds of a step."""
        rows = shape.prefill_tokens + shape.decode_tokens
        return self.step_ms + self.row_ms * rows + self.context_ms * shape.context * 1e-3


@dataclass(frozen=True, slots=True)
class TableMachine:
    """A machine known by a table of rows in a step -> milliseconds, linear in between; fewer rows than the first cost the same."""

    rows: tuple[float, ...]
    ms: tuple[float, ...]

    def cost(self, shape: StepShape) -> float:
        """Milliseconds of a step."""
        rises = Curve(self.rows, tuple(ms - self.ms[0] for ms in self.ms))
        return self.ms[0] + rises(shape.prefill_tokens + shape.decode_tokens)


_ROWS = (1.0, 128.0, 256.0, 384.0, 512.0, 640.0, 768.0, 896.0, 1024.0)


def _flat(rows: float, ms: float, table: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A table with one more point below its second row count."""
    return (_ROWS[0], rows, *_ROWS[1:]), (table[0], ms, *table[1:])


# The artifact has no points between 1 and 128 tokens, where a GPU's step is nearly flat: the "-flat" machines assume one.
# Verification latency by tokens and near-zero-load TPOT (as 1 row) in the artifact of AdaServe (EuroSys 2026).
MACHINES: dict[str, LinearMachine | TableMachine] = {
    "llama-3.1-70b-8xa100": TableMachine(_ROWS, (30.0, 55.0, 85.0, 105.0, 125.0, 145.0, 165.0, 185.0, 205.0)),
    "qwen2.5-32b-4xa100": TableMachine(_ROWS, (28.0, 48.0, 66.0, 84.0, 104.0, 124.0, 144.0, 164.0, 188.0)),
    "llama-3.1-70b-8xa100-flat": TableMachine(
        *_flat(64.0, 35.0, (30.0, 55.0, 85.0, 105.0, 125.0, 145.0, 165.0, 185.0, 205.0))
    ),
    "qwen2.5-32b-4xa100-flat": TableMachine(
        *_flat(96.0, 32.0, (28.0, 48.0, 66.0, 84.0, 104.0, 124.0, 144.0, 164.0, 188.0))
    ),
    "linear": LinearMachine(step_ms=15.0, row_ms=0.03, context_ms=0.05),
}


def get_machine(name: str) -> LinearMachine | TableMachine:
    """The machine called ``name``; raises :class:`InvalidRequest` naming the choices."""
    if name not in MACHINES:
        raise InvalidRequest(f"machine is {name!r}: choose one of {', '.join(MACHINES)}", field="machine")
    return MACHINES[name]
