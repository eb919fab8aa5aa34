"""What an attention backend must do, and the registry that finds one by name.

The semantics, for row i of a segment with c context slots and query position p_i:

* keys are the context slots (slot j holds position j) and the segment's own rows, whose K and V were written before at
  ``batch.write_slots``;
* of its own segment a row sees itself and its ancestors; in a chain those are the rows up to itself;
* with a window w a key at position p is seen when ``p_i - p < w``: at most w keys, the row itself included, as in
  ``transformers`` (``kv_idx > q_idx - sliding_window``). Positions count, not rows, so tree nodes are treated alike;
* scores are ``scale * q . k``, then ``softcap * tanh(score / softcap)``, then the mask;
* a sink adds ``exp(sink)`` of its head to the softmax's denominator and nothing to the numerator;
* query head h reads K and V head ``h // (Hq // Hkv)``;
* K and V of int8 planes are the codes times the scale of their slot and K/V head;
* sums are kept in float32 whatever the planes hold.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from headrace.core.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

    from headrace.core.batch import Batch


@dataclass(slots=True)
class AttentionStep:
    """What a backend prepared once for all layers of a step; backends extend it with their own indices."""

    batch: Batch


class AttentionBackend(ABC):
    """Computes attention of a packed batch over slots."""

    name: ClassVar[str]

    @staticmethod
    def problem(kind: str) -> str | None:
        """Why the backend cannot run on devices of type ``kind`` ("cpu", "cuda", ...), or None when it can."""
        return None

    @abstractmethod
    def prepare(self, batch: Batch, device: torch.device) -> AttentionStep:
        """Index work shared by all layers of a step; the result is valid as long as ``batch`` is."""

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        k_plane: torch.Tensor,
        v_plane: torch.Tensor,
        step: Any,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            q: [N, Hq, D] queries, positions already rotated in, of the planes' dtype or float32 (any, over int8 planes).
            k_plane: [slots, Hkv, D]; the own rows' keys are in place.
            v_plane: [slots, Hkv, Dv].
            step: what :meth:`prepare` gave for this batch.
            scale: factor on the scores.
            window: keys a row sees at most, itself included; None for all.
            softcap: bound of the scores; None for none.
            sinks: [Hq] logits added to the softmax's denominator; None for none.
            scales: float32[slots, Hkv] of K and of V when the planes are int8; None when they are not.

        Returns:
            [N, Hq, Dv] of q's dtype.
        """


def check_window(window: int | None) -> None:
    """Raise ValueError unless ``window`` is None or at least 1: a row always sees itself."""
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: give at least 1 key, or None for all")


# name -> (module, class); modules are imported when asked for, so that numba and triton load only where they are used.
BACKENDS: dict[str, tuple[str, str]] = {
    "reference": ("headrace.models.attention.reference", "ReferenceAttention"),
    "numba": ("headrace.models.attention.cpu", "NumbaAttention"),
    "triton": ("headrace.models.attention.gpu", "TritonAttention"),
}


def get_backend(name: str, device: Any) -> AttentionBackend:
    """The attention backend ``name`` for tensors on ``device`` (a ``torch.device`` or its text).

    "auto" takes triton on CUDA and numba on the CPU where they can be imported, and the reference otherwise.

    Raises:
        InvalidRequest: for an unknown name, or a backend that cannot run here; the message says what to choose instead.
    """
    kind = str(device).partition(":")[0]
    if name == "auto":
        name = _automatic(kind)
    if name not in BACKENDS:
        choices = ", ".join(["auto", *BACKENDS])
        raise InvalidRequest(f"attention is {name!r}: choose one of {choices}", field="attention")
    module, attribute = BACKENDS[name]
    backend: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    problem = backend.problem(kind)
    if problem is not None:
        raise InvalidRequest(
            f"attention {name!r} cannot run on {device}: {problem}; choose auto or reference", field="attention"
        )
    return backend()


def _automatic(kind: str) -> str:
    wanted = {"cuda": "triton", "cpu": "numba"}.get(kind)
    return wanted if wanted in BACKENDS and importlib.util.find_spec(wanted) is not None else "reference"
