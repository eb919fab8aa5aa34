"""The CPU kernel, compiled by numba: attention of tiles of query rows over slots read in place.

A *tile* is a few consecutive rows of a segment with one K/V head; the rows' query heads that share it are packed, so each key is
read once for all of them (``tiles.py`` cuts them). Keys come in blocks of ``BLOCK`` with an online softmax across blocks. A
tile with many keys may come in several parts, so that one decode row over a long context keeps several threads busy; whoever
finishes the last part merges them in order. No result depends on which thread does what.

Int8 codes become floats as they are read; the scales of K multiply scores and those of V weights, once per key instead of once
per element.

All float arithmetic is float32. Masked scores are ``MASKED``, not minus infinity, so that fast-math rules hold.
"""

# Intrinsics are called without the typing context that numba passes them, which type checkers cannot know, and numba marks few exports.
# mypy: disable-error-code="attr-defined, call-arg, var-annotated, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from headrace.models.attention.numerics import (
    ONE,
    TWO,
    ZERO,
    as_float,
    exp,
    fetch_add,
    floats_at,
    longs_at,
)
from headrace.models.attention.tiles import BLOCK, PACKED, scratch_size

FEW = 4  # up to this many packed queries keys are read as they lie; above, blocks are transposed first
MASKED = np.float32(-1e30)

_scratch_size: Any = njit(scratch_size)


@njit(fastmath=True)
def _scores_few(q: Any, packed: int, k: Any, head: int, at: Any, count: int, scores: Any) -> None:
    """Scores of a few queries, keys read where they lie, four at a time."""
    dim = q.shape[1]
    whole = count // 4 * 4
    for t in range(0, whole, 4):
        i0, i1, i2, i3 = at[t], at[t + 1], at[t + 2], at[t + 3]
        for m in range(packed):
            s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
            for d in range(dim):
                x = q[m, d]
                s0 += x * as_float(k[i0, head, d])
                s1 += x * as_float(k[i1, head, d])
                s2 += x * as_float(k[i2, head, d])
                s3 += x * as_float(k[i3, head, d])
            scores[m, t], scores[m, t + 1], scores[m, t + 2], scores[m, t + 3] = s0, s1, s2, s3
    for t in range(whole, count):
        i0 = at[t]
        for m in range(packed):
            s0 = ZERO
            for d in range(dim):
                s0 += q[m, d] * as_float(k[i0, head, d])
            scores[m, t] = s0


@njit(fastmath=True)
def _values_few(weights: Any, packed: int, v: Any, head: int, at: Any, count: int, sums: Any) -> None:
    """Add the weighted values of a block, read where they lie."""
    dim = sums.shape[1]
    whole = count // 4 * 4
    for t in range(0, whole, 4):
        i0, i1, i2, i3 = at[t], at[t + 1], at[t + 2], at[t + 3]
        for m in range(packed):
            w0, w1, w2, w3 = weights[m, t], weights[m, t + 1], weights[m, t + 2], weights[m, t + 3]
            for d in range(dim):
                sums[m, d] += (
                    w0 * as_float(v[i0, head, d])
                    + w1 * as_float(v[i1, head, d])
                    + w2 * as_float(v[i2, head, d])
                    + w3 * as_float(v[i3, head, d])
                )
    for t in range(whole, count):
        i0 = at[t]
        for m in range(packed):
            w0 = weights[m, t]
            for d in range(dim):
                sums[m, d] += w0 * as_float(v[i0, head, d])


@njit(fastmath=True)
def _scores_many(q: Any, packed: int, k: Any, head: int, at: Any, count: int, turned: Any, scores: Any) -> None:
    """Scores of many queries: the block of keys is transposed once, then the inner loop runs along keys."""
    dim = q.shape[1]
    for t in range(count):
        i0 = at[t]
        for d in range(dim):
            turned[d, t] = as_float(k[i0, head, d])
    whole = dim // 4 * 4
    for m in range(packed):
        for t in range(BLOCK):
            scores[m, t] = ZERO
        for d in range(0, whole, 4):
            q0, q1, q2, q3 = q[m, d], q[m, d + 1], q[m, d + 2], q[m, d + 3]
            for t in range(BLOCK):
                scores[m, t] += (
                    q0 * turned[d, t] + q1 * turned[d + 1, t] + q2 * turned[d + 2, t] + q3 * turned[d + 3, t]
                )
        for d in range(whole, dim):
            q0 = q[m, d]
            for t in range(BLOCK):
                scores[m, t] += q0 * turned[d, t]


@njit(fastmath=True)
def _values_many(weights: Any, packed: int, v: Any, head: int, at: Any, count: int, copied: Any, sums: Any) -> None:
    """Add the weighted values of a block for many queries: the block is made contiguous once."""
    dim = sums.shape[1]
    for t in range(count):
        i0 = at[t]
        for d in range(dim):
            copied[t, d] = as_float(v[i0, head, d])
    whole = count // 4 * 4
    for m in range(packed):
        for t in range(0, whole, 4):
            w0, w1, w2, w3 = weights[m, t], weights[m, t + 1], weights[m, t + 2], weights[m, t + 3]
            for d in range(dim):
                sums[m, d] += w0 * copied[t, d] + w1 * copied[t + 1, d] + w2 * copied[t + 2, d] + w3 * copied[t + 3, d]
        for t in range(whole, count):
            w0 = weights[m, t]
            for d in range(dim):
                sums[m, d] += w0 * copied[t, d]


@njit(fastmath=True)
def _cap(scores: Any, packed: int, count: int, softcap: Any) -> None:
    """softcap * tanh(scores / softcap), in place."""
    for m in range(packed):
        for t in range(count):
            s = scores[m, t]
            e = exp(-TWO * abs(s) / softcap)
            s1 = softcap * (ONE - e) / (ONE + e)
            scores[m, t] = s1 if s > ZERO else -s1


@njit(fastmath=True)
def _soften(scores: Any, packed: int, count: int, top: Any, total: Any, sums: Any) -> None:
    """Scores to weights under the running maximum; what was summed before is rescaled to it."""
    for m in range(packed):
        high = top[m]
        for t in range(count):
            high = max(high, scores[m, t])
        total_now = ZERO
        for t in range(count):
            w = exp(scores[m, t] - high)
            scores[m, t] = w
            total_now += w
        if high > top[m]:
            factor = exp(top[m] - high)
            total[m] *= factor
            for d in range(sums.shape[1]):
                sums[m, d] *= factor
            top[m] = high
        total[m] += total_now


@njit(fastmath=True)
def _scale(scores: Any, packed: int, scales: Any, head: int, at: Any, count: int) -> None:
    """Multiply the columns of a block by their keys' scales, in place."""
    for t in range(count):
        factor = scales[at[t], head]
        for m in range(packed):
            scores[m, t] *= factor


@njit
def _hide(
    scores: Any,
    group: int,
    first: int,
    last: int,
    key: int,
    count: int,
    held: int,
    start: int,
    positions: Any,
    words: Any,
    window: int,
) -> None:
    """Mask a block that begins at ``key``; rows and ``start`` count in the batch, ``held`` is the context's length."""
    width = (len(positions) + 31) // 32
    for row in range(first - start, last - start):
        here = positions[row]
        for t in range(count):
            own = key + t - held
            position = key + t if own < 0 else positions[own]
            seen = here - position < window
            if own >= 0 and seen:
                if len(words):
                    seen = (words[row * width + own // 32] >> (own % 32)) & 1 == 1
                else:
                    seen = own <= row
            if not seen:
                for g in range(group):
                    scores[(row - first + start) * group + g, t] = MASKED


@njit
def _load(q: Any, head: int, group: int, first: int, last: int, scale: Any, packed: Any) -> None:
    """Pack the scaled queries of a tile: row-major, the group's heads inside."""
    for row in range(first, last):
        for g in range(group):
            for d in range(q.shape[2]):
                packed[(row - first) * group + g, d] = q[row, head * group + g, d] * scale


@njit
def _part(
    tile: Any, head: int, group: int, k: Any, v: Any, k_scales: Any, v_scales: Any, at_of: Any, held: int, start: int, positions: Any,
    words: Any, window: int, softcap: Any, q: Any, scores: Any, turned: Any, copied: Any, top: Any, total: Any, sums: Any,
) -> None:  # fmt: skip
    """Maximum, weight and weighted values of one part of a tile, left in ``top``, ``total`` and ``sums``."""
    first, last, key0, key1 = tile[1], tile[2], tile[3], tile[4]
    packed = (last - first) * group
    here = positions[first - start]
    for row in range(first - start, last - start):
        here = max(here, positions[row])
    for m in range(packed):
        top[m], total[m] = MASKED, ZERO
        for d in range(sums.shape[1]):
            sums[m, d] = ZERO
    for key in range(key0, key1, BLOCK):
        count = min(BLOCK, key1 - key)
        at = at_of[key : key + count]
        if packed <= FEW:
            _scores_few(q, packed, k, head, at, count, scores)
        else:
            _scores_many(q, packed, k, head, at, count, turned, scores)
        if len(k_scales):
            _scale(scores, packed, k_scales, head, at, count)
        if softcap > ZERO:
            _cap(scores, packed, count, softcap)
        newest = key + count - held  # own rows before this one are in the block or older
        hidden = newest > 0 and (len(words) > 0 or newest - 1 > first - start or here - window >= positions[0])
        if hidden or here - key >= window:
            _hide(scores, group, first, last, key, count, held, start, positions, words, window)
        _soften(scores, packed, count, top, total, sums)
        if len(v_scales):
            _scale(scores, packed, v_scales, head, at, count)
        if packed <= FEW:
            _values_few(scores, packed, v, head, at, count, sums)
        else:
            _values_many(scores, packed, v, head, at, count, copied, sums)


@njit(fastmath=True)
def _keep(partial: Any, head: int, at: int, packed: int, top: Any, total: Any, sums: Any) -> None:
    """Put a part's results into its room: values, then maximum and weight."""
    dim = sums.shape[1]
    for m in range(packed):
        for d in range(dim):
            partial[head, at, m, d] = sums[m, d]
        partial[head, at, m, dim] = top[m]
        partial[head, at, m, dim + 1] = total[m]


@njit(fastmath=True)
def _merge(partial: Any, head: int, room: int, parts: int, packed: int, top: Any, total: Any, sums: Any) -> None:
    """Merge the parts from ``room`` on into ``top``, ``total`` and ``sums``, in order."""
    dim = sums.shape[1]
    for m in range(packed):
        high = MASKED
        for p in range(room, room + parts):
            high = max(high, partial[head, p, m, dim])
        top[m], total[m] = high, ZERO
        for d in range(dim):
            sums[m, d] = ZERO
        for p in range(room, room + parts):
            factor = exp(partial[head, p, m, dim] - high)
            total[m] += factor * partial[head, p, m, dim + 1]
            for d in range(dim):
                sums[m, d] += factor * partial[head, p, m, d]


@njit(fastmath=True)
def _store(out: Any, head: int, group: int, first: int, last: int, sinks: Any, top: Any, total: Any, sums: Any) -> None:
    """Divide by the weights, the sink's among them, and write the rows out."""
    for row in range(first, last):
        for g in range(group):
            m = (row - first) * group + g
            factor = ONE / total[m]
            if len(sinks):
                high = max(top[m], sinks[head * group + g])
                scaled = exp(top[m] - high)
                factor = scaled / (total[m] * scaled + exp(sinks[head * group + g] - high))
            for d in range(sums.shape[1]):
                out[row, head * group + g, d] = sums[m, d] * factor


@njit
def work(
    counter: Any, members: int, scratch: int, q: Any, k: Any, v: Any, k_scales: Any, v_scales: Any, out: Any, sinks: Any,
    positions: Any, queries: Any, contexts: Any, keys: Any, masks: Any, words: Any, tiles: Any, partial: Any, done: Any,
    window: int, scale: Any, softcap: Any,
) -> None:  # fmt: skip
    """Do tasks (tile part, K/V head) until ``counter`` has run through them all."""
    heads = k.shape[1]
    group = q.shape[1] // heads
    size, dim, wide = max(PACKED, group), q.shape[2], v.shape[2]
    at = scratch + 4 * _scratch_size(group, dim, wide) * fetch_add(longs_at(members), 1)
    packed_q, at = carray(floats_at(at), (size, dim)), at + 4 * size * dim
    scores, at = carray(floats_at(at), (size, BLOCK)), at + 4 * size * BLOCK
    turned, at = carray(floats_at(at), (dim, BLOCK)), at + 4 * dim * BLOCK
    copied, at = carray(floats_at(at), (BLOCK, wide)), at + 4 * BLOCK * wide
    sums, at = carray(floats_at(at), (size, wide)), at + 4 * size * wide
    top, total = carray(floats_at(at), size), carray(floats_at(at + 4 * size), size)
    while True:
        task = fetch_add(counter, 1)
        if task >= len(tiles) * heads:
            return
        tile, head = tiles[task // heads], task % heads
        s, first, last, part, parts, room = tile[0], tile[1], tile[2], tile[5], tile[6], tile[7]
        start, stop, held = queries[s], queries[s + 1], contexts[s + 1] - contexts[s]
        packed = (last - first) * group
        _load(q, head, group, first, last, scale, packed_q)
        _part(
            tile, head, group, k, v, k_scales, v_scales, keys[contexts[s] + start : contexts[s + 1] + stop], held, start,
            positions[start:stop], words[masks[s] : masks[s + 1]], window, softcap, packed_q, scores, turned, copied, top, total, sums,
        )  # fmt: skip
        if parts > 1:
            _keep(partial, head, room + part, packed, top, total, sums)
            if fetch_add(longs_at(done.ctypes.data + 8 * (head * done.shape[1] + room)), 1) < parts - 1:
                continue
            done[head, room] = 0
            _merge(partial, head, room, parts, packed, top, total, sums)
        _store(out, head, group, first, last, sinks, top, total, sums)
