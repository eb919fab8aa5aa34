"""Attention in plain torch: gather, mask, softmax, segment by segment. The yardstick of the other backends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from headrace.core.batch import WORD_BITS, Batch
from headrace.models.attention.interface import AttentionBackend, AttentionStep, check_window

# Rows whose scores are materialised together where SDPA cannot be used (soft cap, sinks).
ROWS = 256


@dataclass(slots=True)
class Piece:
    """One segment: its rows, the slots of all keys it may see, and the mask before any window."""

    rows: slice
    slots: torch.Tensor  # int64[c + n], context then own rows
    queries_at: torch.Tensor  # int64[n] positions of the rows
    keys_at: torch.Tensor  # int64[c + n] positions of the keys
    visible: torch.Tensor  # bool[n, c + n]

    def mask(self, window: int | None) -> torch.Tensor:
        if window is None:
            return self.visible
        return self.visible & (self.queries_at[:, None] - self.keys_at[None, :] < window)


@dataclass(slots=True)
class ReferenceStep(AttentionStep):
    """Segments of a step with their masks, kept per window."""

    pieces: list[Piece]
    masks: dict[int | None, list[torch.Tensor]] = field(default_factory=dict)

    def masks_for(self, window: int | None) -> list[torch.Tensor]:
        if window not in self.masks:
            check_window(window)
            self.masks[window] = [piece.mask(window) for piece in self.pieces]
        return self.masks[window]


class ReferenceAttention(AttentionBackend):
    """The plain backend: any device, any dtype."""

    name: ClassVar[str] = "reference"

    def prepare(self, batch: Batch, device: torch.device) -> ReferenceStep:
        return ReferenceStep(batch, [piece_of(batch, s, device) for s in range(batch.segments)])

    def attend(
        self,
        q: torch.Tensor,
        k_plane: torch.Tensor,
        v_plane: torch.Tensor,
        step: ReferenceStep,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], v_plane.shape[2])
        group = q.shape[1] // k_plane.shape[1]
        k_scale, v_scale = scales or (None, None)
        for piece, mask in zip(step.pieces, step.masks_for(window), strict=True):
            rows = q[piece.rows].transpose(0, 1).float()
            keys = gathered(k_plane, piece.slots, group, k_scale)
            values = gathered(v_plane, piece.slots, group, v_scale)
            if softcap is None and sinks is None:
                result = scaled_dot_product_attention(rows[None], keys[None], values[None], mask, scale=scale)[0]
            else:
                result = _explicit(rows, keys, values, mask, scale, softcap, sinks)
            out[piece.rows] = result.transpose(0, 1).to(out.dtype)
        return out


def piece_of(batch: Batch, s: int, device: torch.device) -> Piece:
    """Segment ``s`` of ``batch`` with everything it may see."""
    start, stop = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
    first, last = int(batch.context_starts[s]), int(batch.context_starts[s + 1])
    n, c = stop - start, last - first

    def put(array: object) -> torch.Tensor:
        return torch.as_tensor(array).to(device, torch.int64)

    words = put(batch.mask_words[batch.mask_starts[s] : batch.mask_starts[s + 1]])
    if len(words):
        bit = torch.arange(n, device=device)
        own = (words.view(n, -1)[:, bit // WORD_BITS] >> (bit % WORD_BITS)) & 1 == 1
    else:
        own = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    queries_at = put(batch.positions[start:stop])
    return Piece(
        rows=slice(start, stop),
        slots=torch.cat([put(batch.context_slots[first:last]), put(batch.write_slots[start:stop])]),
        queries_at=queries_at,
        keys_at=torch.cat([torch.arange(c, device=device), queries_at]),
        visible=torch.cat([torch.ones(n, c, dtype=torch.bool, device=device), own], 1),
    )


def gathered(plane: torch.Tensor, slots: torch.Tensor, group: int, scales: torch.Tensor | None = None) -> torch.Tensor:
    """[Hq, keys, D] float32 of the given slots, each K/V head repeated for its group of query heads."""
    rows = plane.index_select(0, slots).float()
    if scales is not None:
        rows *= scales.index_select(0, slots).unsqueeze(-1)
    return rows.transpose(0, 1).repeat_interleave(group, 0)


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with soft cap and sinks; q [Hq, n, D], k and v [Hq, keys, .], mask bool[n, keys]."""
    parts = []
    for at in range(0, q.shape[1], ROWS):
        scores = (q[:, at : at + ROWS] @ k.transpose(1, 2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~mask[at : at + ROWS], float("-inf"))
        if sinks is not None:
            extra = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            weights = torch.cat([scores, extra], 2).softmax(2)[..., :-1]
        else:
            weights = scores.softmax(2)
        parts.append(weights @ v)
    return torch.cat(parts, 1)
