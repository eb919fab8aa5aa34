# Triton's language is compiled, not called: type checkers cannot follow it.
# mypy: disable-error-code="no-untyped-def, no-any-return, untyped-decorator"
"""The Triton kernels: one over parts of tiles, one that merges the parts of a tile.

A tile is some rows of a segment with one K/V head, the query heads that share it packed into a block of ``BLOCK_M``. A program
first runs along context keys, which every row sees unless a window hides them, then along the segment's own rows under
the causal or ancestor mask. Masked scores are a large negative number rather than minus infinity: a row that sees nothing
in a part gets weights that any real score elsewhere scales to zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from headrace.models.attention.gpu_step import kernel_dims

if TYPE_CHECKING:
    from headrace.models.attention.gpu_step import Launch, TritonStep

_TASK = tl.constexpr(11)
_MASKED = tl.constexpr(-1e30)


@triton.jit
def _dot(a, b, INTERPRETED: tl.constexpr):
    """Product summed in float32. Triton's interpreter multiplies the bits of bfloat16 numbers, so there they are widened first."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _block(
    queries, k, v, k_scales, v_scales, slot, valid, seen, head, scale, softcap, top, total, sums,
    k_slot, k_head, v_slot, v_head, HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr, CAPPED: tl.constexpr, CODED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One block of keys: scores, running maximum, weights, values."""
    d = tl.arange(0, BLOCK_D)
    w = tl.arange(0, BLOCK_W)
    keys = tl.load(
        k + slot[None, :] * k_slot + head * k_head + d[:, None], mask=valid[None, :] & (d < DIM)[:, None], other=0.0
    )
    scores = _dot(queries, keys.to(queries.dtype), INTERPRETED) * scale
    if CODED:
        scores *= tl.load(k_scales + slot * HEADS + head, mask=valid, other=0.0)[None, :]
    if CAPPED:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    scores = tl.where(seen, scores, _MASKED)
    high = tl.maximum(top, tl.max(scores, 1))
    factor = tl.exp(top - high)
    weights = tl.exp(scores - high[:, None])
    values = tl.load(
        v + slot[:, None] * v_slot + head * v_head + w[None, :], mask=valid[:, None] & (w < WIDE)[None, :], other=0.0
    )
    total = total * factor + tl.sum(weights, 1)
    if CODED:
        weights *= tl.load(v_scales + slot * HEADS + head, mask=valid, other=0.0)[None, :]
    sums = sums * factor[:, None] + _dot(weights.to(queries.dtype), values.to(queries.dtype), INTERPRETED)
    return high, total, sums


@triton.jit
def _parts(
    q, k, v, k_scales, v_scales, out, sinks, positions, writes, slots, words, tasks, sums_room, stats_room, scale, softcap, window,
    k_slot, k_head, v_slot, v_head, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, CODED: tl.constexpr, SINKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (tasks, K/V heads)."""
    task = tasks + tl.program_id(0) * _TASK
    head = tl.program_id(1)
    first, rows = tl.load(task), tl.load(task + 1)
    base, key0, key1 = tl.load(task + 2), tl.load(task + 3), tl.load(task + 4)
    own0, own1, start = tl.load(task + 5), tl.load(task + 6), tl.load(task + 7)
    mask_at, width, room = tl.load(task + 8), tl.load(task + 9), tl.load(task + 10)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    row = first + m // GROUP
    query_head = head * GROUP + m % GROUP
    live = m < rows * GROUP
    queries = tl.load(
        q + (row[:, None].to(tl.int64) * (HEADS * GROUP) + query_head[:, None]) * DIM + d[None, :],
        mask=live[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    here = tl.load(positions + row, mask=live, other=0)
    top = tl.full((BLOCK_M,), _MASKED, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for key in range(key0, key1, BLOCK_N):
        at = key + n
        valid = at < key1
        slot = tl.load(slots + base + at, mask=valid, other=0).to(tl.int64)
        seen = valid[None, :] & (here[:, None] - at[None, :] < window)
        top, total, sums = _block(
            queries, k, v, k_scales, v_scales, slot, valid, seen, head, scale, softcap, top, total, sums,
            k_slot, k_head, v_slot, v_head, HEADS, DIM, WIDE, BLOCK_D, BLOCK_W, CAPPED, CODED, INTERPRETED,
        )  # fmt: skip
    for own in range(own0, own1, BLOCK_N):
        at = own + n
        valid = at < own1
        slot = tl.load(writes + at, mask=valid, other=0).to(tl.int64)
        there = tl.load(positions + at, mask=valid, other=0)
        seen = valid[None, :] & (here[:, None] - there[None, :] < window)
        if mask_at < 0:
            seen = seen & (at[None, :] <= row[:, None])
        else:
            number = at - start
            word = tl.load(
                words + mask_at + (row[:, None] - start) * width + number[None, :] // 32,
                mask=live[:, None] & valid[None, :],
                other=0,
            )
            seen = seen & (((word >> (number[None, :] % 32)) & 1) == 1)
        top, total, sums = _block(
            queries, k, v, k_scales, v_scales, slot, valid, seen, head, scale, softcap, top, total, sums,
            k_slot, k_head, v_slot, v_head, HEADS, DIM, WIDE, BLOCK_D, BLOCK_W, CAPPED, CODED, INTERPRETED,
        )  # fmt: skip
    if room < 0:
        _store(out, sinks, row, query_head, live, top, total, sums, HEADS * GROUP, WIDE, BLOCK_W, SINKS)
    else:
        w = tl.arange(0, BLOCK_W)
        at = (room * HEADS + head).to(tl.int64)
        tl.store(sums_room + (at * BLOCK_M + m[:, None]) * BLOCK_W + w[None, :], sums)
        tl.store(stats_room + at * 2 * BLOCK_M + m, top)
        tl.store(stats_room + (at * 2 + 1) * BLOCK_M + m, total)


@triton.jit
def _store(
    out, sinks, row, query_head, live, top, total, sums, QUERY_HEADS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_W: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Divide by the weights, the sink's among them, and write the rows out."""
    if SINKS:
        sink = tl.load(sinks + query_head).to(tl.float32)
        high = tl.maximum(top, sink)
        factor = tl.exp(top - high)
        total = total * factor + tl.exp(sink - high)
        sums = sums * factor[:, None]
    w = tl.arange(0, BLOCK_W)
    where = (row[:, None].to(tl.int64) * QUERY_HEADS + query_head[:, None]) * WIDE + w[None, :]
    result = sums / total[:, None]
    tl.store(out + where, result.to(out.dtype.element_ty), mask=live[:, None] & (w < WIDE)[None, :])


@triton.jit
def _merge(
    out, sinks, merges, sums_room, stats_room, HEADS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles with several parts, K/V heads)."""
    merge = merges + tl.program_id(0) * 4
    head = tl.program_id(1)
    first, rows, room, count = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2), tl.load(merge + 3)
    m = tl.arange(0, BLOCK_M)
    w = tl.arange(0, BLOCK_W)
    top = tl.full((BLOCK_M,), _MASKED, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for part in range(room, room + count):
        at = (part * HEADS + head).to(tl.int64)
        there = tl.load(stats_room + at * 2 * BLOCK_M + m)
        high = tl.maximum(top, there)
        before, after = tl.exp(top - high), tl.exp(there - high)
        total = total * before + tl.load(stats_room + (at * 2 + 1) * BLOCK_M + m) * after
        values = tl.load(sums_room + (at * BLOCK_M + m[:, None]) * BLOCK_W + w[None, :])
        sums = sums * before[:, None] + values * after[:, None]
        top = high
    row = first + m // GROUP
    live = m < rows * GROUP
    _store(out, sinks, row, head * GROUP + m % GROUP, live, top, total, sums, HEADS * GROUP, WIDE, BLOCK_W, SINKS)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    step: TritonStep,
    launch: Launch,
    *,
    heads: int,
    block: int,
    scale: float,
    window: int,
    softcap: float | None,
) -> None:
    """Launch the kernels for the tiles of one size; ``out`` is filled for their rows."""
    dims = kernel_dims(q, v)
    group = q.shape[1] // heads
    shared = {"HEADS": heads, "GROUP": group, "WIDE": dims["WIDE"], "BLOCK_W": dims["BLOCK_W"], "BLOCK_M": block}
    shared["SINKS"] = sinks is not None
    sums_room = q.new_empty((launch.parts, heads, block, dims["BLOCK_W"]), dtype=torch.float32)
    stats_room = q.new_empty((launch.parts, heads, 2, block), dtype=torch.float32)
    extra = q if sinks is None else sinks.contiguous()
    k_scales, v_scales = scales or (q, q)  # unread without scales
    _parts[(len(launch.tasks), heads)](
        q, k, v, k_scales, v_scales, out, extra, step.positions, step.writes, step.slots, step.words, launch.tasks, sums_room,
        stats_room, scale, softcap or 0.0, window, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        DIM=dims["DIM"], BLOCK_D=dims["BLOCK_D"], BLOCK_N=64 if dims["BLOCK_D"] <= 128 else 32,
        CAPPED=softcap is not None, CODED=scales is not None, INTERPRETED=not q.is_cuda, **shared,
    )  # fmt: skip
    if len(launch.merges):
        _merge[(len(launch.merges), heads)](out, extra, launch.merges, sums_room, stats_room, **shared)
