"""Random packed batches and a brute-force float64 attention, against which every backend is held."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from headrace.core.batch import Batch, Packer, Segment
from headrace.models.cache.planes import encode


@dataclass(frozen=True)
class Case:
    """A batch over filled planes, and how to attend; ``scales`` are those of int8 planes."""

    segments: list[Segment]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    scales: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def batch(self) -> Batch:
        return Packer().pack(self.segments)

    def options(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "scales": self.scales,
        }

    def run(self, backend: Any, batch: Batch | None = None) -> torch.Tensor:
        """Attention of the case through ``backend``."""
        step = backend.prepare(batch or self.batch, self.q.device)
        return backend.attend(self.q, self.k, self.v, step, **self.options())

    def to(self, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
        """The case with its tensors moved and rounded."""
        sinks = None if self.sinks is None else self.sinks.to(device)
        scales = None if self.scales is None else (self.scales[0].to(device), self.scales[1].to(device))
        stored = dtype if self.scales is None else torch.int8
        return replace(
            self,
            q=self.q.to(device, dtype),
            k=self.k.to(device, stored),
            v=self.v.to(device, stored),
            sinks=sinks,
            scales=scales,
        )

    def coded(self) -> Case:
        """The case over int8 planes, whose scales differ widely between slots and heads."""
        spread = torch.logspace(-1, 1, self.k.shape[0]).unsqueeze(1) * torch.arange(1, self.k.shape[1] + 1)
        (k, k_scale), (v, v_scale) = encode(self.k), encode(self.v * spread.unsqueeze(2))
        return replace(self, k=k, v=v, scales=(k_scale, v_scale))


def chain(rng: np.random.Generator, slots: np.ndarray, context: int, rows: int) -> Segment:
    """A chain of ``rows`` rows after ``context`` slots."""
    return Segment(
        sequence=0,
        tokens=rng.integers(0, 9, rows).astype(np.int32),
        positions=np.arange(context, context + rows, dtype=np.int32),
        write_slots=slots[context : context + rows],
        context_slots=slots[:context],
        wanted=np.array([rows - 1], np.int32),
    )


def tree(rng: np.random.Generator, slots: np.ndarray, context: int, rows: int) -> Segment:
    """A random tree (one in four: a forest) of ``rows`` rows after ``context`` slots."""
    parents = np.array([-1] + [int(rng.integers(max(0, i - 6), i)) for i in range(1, rows)], np.int32)
    if rows > 1 and rng.random() < 0.25:
        parents[1] = -1
    depth = np.zeros(rows, np.int32)
    for i, parent in enumerate(parents):
        depth[i] = 0 if parent < 0 else depth[parent] + 1
    return replace(chain(rng, slots, context, rows), parents=parents, positions=(context + depth).astype(np.int32))


def build(
    rng: np.random.Generator,
    shapes: list[tuple[str, int, int]],
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    **options: Any,
) -> Case:
    """A case of segments ``(kind, context, rows)`` over shuffled slots, ``heads`` (Hq, Hkv) and ``dims`` (D, Dv)."""
    total = sum(context + rows for _, context, rows in shapes)
    size = total + 5
    order = rng.permutation(size).astype(np.int32)
    segments, at = [], 0
    for number, (kind, context, rows) in enumerate(shapes):
        made = (tree if kind == "tree" else chain)(rng, order[at : at + context + rows], context, rows)
        segments.append(replace(made, sequence=number))
        at += context + rows
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = sum(rows for _, _, rows in shapes)
    sinks = normal(heads[0]) if options.pop("sinks", False) else None
    scale = options.pop("scale", None) or 1.0 / math.sqrt(dims[0])
    return Case(
        segments,
        q=normal(rows, heads[0], dims[0]) * 1.5,
        k=normal(size, heads[1], dims[0]),
        v=normal(size, heads[1], dims[1]),
        scale=scale,
        sinks=sinks,
        **options,
    )


@st.composite
def cases(draw: st.DrawFn, *, longest: int = 90, dims: tuple[int, ...] = (8, 16, 24, 80, 96)) -> Case:
    """Random cases: chains, decode rows and trees of up to 70 nodes, all head layouts and options."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    shapes = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["chain", "decode", "tree"]))
        context = draw(st.sampled_from([0, 1, 3, 31, 64, longest]))
        rows = {
            "chain": draw(st.sampled_from([2, 7, 33, 70])),
            "decode": 1,
            "tree": draw(st.sampled_from([1, 5, 33, 70])),
        }
        shapes.append((kind, context, rows[kind]))
    kv = draw(st.sampled_from([1, 2, 3]))
    return build(
        rng,
        shapes,
        heads=(kv * draw(st.sampled_from([1, 2, 3, 7])), kv),
        dims=(draw(st.sampled_from(dims)), draw(st.sampled_from(dims))),
        window=draw(st.sampled_from([None, None, 1, 4, 40])),
        softcap=draw(st.sampled_from([None, None, 2.0])),
        sinks=draw(st.booleans()),
    )


def visible(segment: Segment, row: int, other: int) -> bool:
    """Whether ``row`` may see own row ``other``, from the definition."""
    if segment.parents is None:
        return other <= row
    at = row
    while at >= 0:
        if at == other:
            return True
        at = int(segment.parents[at])
    return False


def brute_force(case: Case) -> torch.Tensor:
    """float64 [N, Hq, Dv]: the semantics spelled out, one row and one head at a time."""
    q, k, v = (t.detach().cpu().double().numpy() for t in (case.q, case.k, case.v))
    if case.scales is not None:
        k_scale, v_scale = (t.detach().cpu().double().numpy()[..., None] for t in case.scales)
        k, v = k * k_scale, v * v_scale
    group = q.shape[1] // k.shape[1]
    out, at = np.zeros((q.shape[0], q.shape[1], v.shape[2])), 0
    for segment in case.segments:
        for i in range(len(segment.tokens)):
            here = int(segment.positions[i])
            keys = [(int(slot), j) for j, slot in enumerate(segment.context_slots)]
            keys += [
                (int(segment.write_slots[j]), int(segment.positions[j]))
                for j in range(len(segment.tokens))
                if visible(segment, i, j)
            ]
            seen = [slot for slot, position in keys if case.window is None or here - position < case.window]
            for head in range(q.shape[1]):
                scores = k[seen, head // group] @ q[at, head] * case.scale
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                extra = [] if case.sinks is None else [float(case.sinks[head])]
                top = max([*scores, *extra])
                weights = np.exp(scores - top)
                out[at, head] = weights @ v[seen, head // group] / (weights.sum() + sum(np.exp(e - top) for e in extra))
            at += 1
    return torch.from_numpy(out)


def worst(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, infinity for anything not finite."""
    difference = (result.detach().cpu().double() - expected).abs().max().item()
    return difference if math.isfinite(difference) else math.inf
