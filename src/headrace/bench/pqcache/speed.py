"""What a decode step costs with and without the sketch: attention alone, whole layers, memory, and clustering beside a prefill.

The shape is the claims': 8 K/V heads, 4 query heads each, 128 dimensions, float32. Dense attention is torch's fused one over packed
query heads (a K/V head's queries as its rows), which reads K and V once. Systems take turns within every repeat, so that all
of them see the same machine. K and V are drawn in clusters, as keys are; what is drawn does not matter to dense attention,
and to the sketch only through how its cells fill.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from headrace.sparse.codebook import Codes
from headrace.sparse.layer import PQLayer, PQSettings
from headrace.sparse.native import NativeIndex
from headrace.sparse.regions import Regions

HEADS, GROUP, SIZE = 8, 4, 128
HIDDEN, INNER = 2048, 5632
BUDGET = 0.1
CODES = ("2x6", "4x8")
KIB = 1024
LENGTHS = (2 * KIB, 4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB)
STEP_LENGTHS = (8 * KIB, 32 * KIB, 64 * KIB)
PREFILL = 8 * KIB

Report = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SpeedBench:
    """How much to measure."""

    lengths: tuple[int, ...] = LENGTHS
    step_lengths: tuple[int, ...] = STEP_LENGTHS
    repeats: int = 15
    step_repeats: int = 7
    prefill: int = PREFILL
    seed: int = 0


QUICK = SpeedBench(
    (2 * KIB, 8 * KIB, 32 * KIB, 64 * KIB), (8 * KIB, 32 * KIB), repeats=9, step_repeats=5, prefill=4 * KIB
)


def speed_rows(quick: bool, progress: Report, setting: SpeedBench | None = None) -> list[Row]:
    """All measurements."""
    setting = setting or (QUICK if quick else SpeedBench())
    torch.manual_seed(setting.seed)
    rows: list[Row] = []
    with torch.inference_mode():
        for length in setting.lengths:
            progress(f"attention over {length} tokens")
            rows += attention_rows(length, setting.repeats)
        for length in setting.step_lengths:
            progress(f"steps over {length} tokens")
            rows += step_rows(length, setting.step_repeats)
        progress(f"clustering beside a prefill of {setting.prefill} tokens")
        rows += build_rows(setting.prefill)
    return rows


def attention_rows(length: int, repeats: int) -> list[Row]:
    """Appending a token's K and V, choosing and attending, in one layer."""
    keys, values = context(length + repeats + 1)
    systems = {f"pq {codes}": _layer(keys, values, length, codes) for codes in CODES}
    systems["dispatched"] = _layer(keys, values, length, CODES[0], crossover=None)
    systems["dense"] = _layer(keys, values, length, CODES[0])
    rows: list[Row] = []
    for repeat in range(repeats + 1):
        at = length + repeat
        query = torch.randn(1, HEADS * GROUP, 1, SIZE)
        for name, layer in systems.items():
            started = time.perf_counter()
            layer.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            _dense(query, layer) if name == "dense" else layer.attend(query, SIZE**-0.5)
            ms = (time.perf_counter() - started) * 1e3
            if repeat:  # the first builds the index
                rows.append(_row("attention", context=length, system=name, repeat=repeat, ms=ms))
    return rows + [_memory(systems[f"pq {codes}"], codes, length) for codes in CODES]


def step_rows(length: int, repeats: int) -> list[Row]:
    """A decoder layer as a whole, its weights included: hidden size 2048, an MLP of 5632."""
    keys, values = context(length + repeats + 1)
    block = Block()
    systems = {"pq": _layer(keys, values, length, CODES[0]), "dense": _layer(keys, values, length, CODES[0])}
    rows: list[Row] = []
    for repeat in range(repeats + 1):
        hidden = torch.randn(1, HIDDEN)
        for name, layer in systems.items():
            started = time.perf_counter()
            block(hidden, layer, dense=name == "dense")
            ms = (time.perf_counter() - started) * 1e3
            if repeat:
                rows.append(
                    _row("step", context=length, system=name, repeat=repeat, ms=ms, bytes=step_bytes(length, name))
                )
    return rows


def build_rows(length: int) -> list[Row]:
    """A layer's prefill, and what the first decode step takes with and without clustering."""
    keys, values = context(length + 1)
    block, rows = Block(), []
    hidden = torch.randn(length, HIDDEN)
    layer = _layer(keys, values, length, CODES[0])
    started = time.perf_counter()
    block.prefill(hidden, keys[:, :, :length], values[:, :, :length])
    rows.append(_row("prefill", context=length, system="dense", ms=(time.perf_counter() - started) * 1e3))
    for codes in CODES:
        layer = _layer(keys, values, length, codes)
        for system in ("first step", "next step"):
            query = torch.randn(1, HEADS * GROUP, 1, SIZE)
            layer.update(keys[:, :, -1:], values[:, :, -1:])
            started = time.perf_counter()
            layer.attend(query, SIZE**-0.5)
            rows.append(
                _row("build", context=length, codes=codes, system=system, ms=(time.perf_counter() - started) * 1e3)
            )
    return rows


def context(length: int) -> tuple[Tensor, Tensor]:
    """Keys in clusters, and values: float32[1, HEADS, length, SIZE]."""
    centres = torch.randn(1, HEADS, 200, SIZE)
    keys = centres[:, :, torch.randint(200, (length,))] + 0.7 * torch.randn(1, HEADS, length, SIZE)
    return keys, torch.randn(1, HEADS, length, SIZE)


class Block:
    """A decoder layer with random weights; attention is somebody else's."""

    def __init__(self) -> None:
        attended, held = HEADS * GROUP * SIZE, HEADS * SIZE
        self.qkv = torch.randn(attended + 2 * held, HIDDEN) / HIDDEN**0.5
        self.out = torch.randn(HIDDEN, attended) / attended**0.5
        self.gate_up = torch.randn(2 * INNER, HIDDEN) / HIDDEN**0.5
        self.down = torch.randn(HIDDEN, INNER) / INNER**0.5

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(part.nbytes for part in (self.qkv, self.out, self.gate_up, self.down))

    def __call__(self, hidden: Tensor, layer: PQLayer, *, dense: bool) -> Tensor:
        """A decode step: [1, HIDDEN]."""
        packed = linear(rms_norm(hidden, (HIDDEN,)), self.qkv).view(1, -1, 1, SIZE)
        query, key, value = torch.split(packed, [HEADS * GROUP, HEADS, HEADS], 1)
        layer.update(key, value)
        attended = _dense(query, layer) if dense else layer.attend(query, SIZE**-0.5)
        return self._rest(hidden, attended.reshape(1, -1))

    def prefill(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A prompt: [n, HIDDEN]; its K and V are computed, and the given ones attended to."""
        packed = linear(rms_norm(hidden, (HIDDEN,)), self.qkv).view(1, len(hidden), -1, SIZE).transpose(1, 2)
        query = packed[:, : HEADS * GROUP]
        every_key, every_value = (part.repeat_interleave(GROUP, 1) for part in (keys, values))
        attended = scaled_dot_product_attention(query, every_key, every_value, is_causal=True)
        return self._rest(hidden, attended.transpose(1, 2).reshape(len(hidden), -1))

    def _rest(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + linear(attended, self.out)
        gate, up = linear(rms_norm(hidden, (HIDDEN,)), self.gate_up).chunk(2, -1)
        return hidden + linear(silu(gate) * up, self.down)


def attention_bytes(length: int, system: str) -> int:
    """Bytes of K and V, and of the sketch, that a layer's attention has to read: the floor of its time."""
    row = 2 * SIZE * 4
    if system == "dense":
        return HEADS * length * row
    window = Regions(BUDGET).window(length, length)
    codes = Codes.parse(CODES[0])
    sketch = codes.cells * 4 + codes.centroids * SIZE * 4 + window.retrieved * 4
    return HEADS * (window.attended * row + sketch)


def step_bytes(length: int, system: str) -> int:
    """As :func:`attention_bytes`, with the layer's weights."""
    attended, held = HEADS * GROUP * SIZE, HEADS * SIZE
    weights = HIDDEN * (2 * attended + 2 * held + 3 * INNER) * 4
    return weights + attention_bytes(length, system)


def index_bytes(items: int, codes: Codes) -> int:
    """Bytes of a layer's sketch by formula: codes, for joint cells as a number and a place in their order; centroids; cells' lists."""
    joint = codes.bits * codes.subspaces <= 14
    books = codes.centroids * SIZE * 4 + codes.subspaces * codes.centroids * 4
    if joint:
        return HEADS * (items * (2 + 4) + books + 3 * 4 * codes.cells)
    return HEADS * (items * codes.subspaces + books)


def _memory(layer: PQLayer, codes: str, length: int) -> Row:
    """What the sketch takes in memory."""
    assert isinstance(layer.index, NativeIndex)
    held = sum(sketch.allocated + sketch.book.nbytes for sketch in layer.index.sketches)
    formula = index_bytes(layer.index.length, Codes.parse(codes))
    return _row(
        "memory", context=length, codes=codes, bytes=held, formula=formula, full=attention_bytes(length, "dense")
    )


def _layer(keys: Tensor, values: Tensor, length: int, codes: str, crossover: int | None = 0) -> PQLayer:
    settings = PQSettings(Regions(BUDGET), Codes.parse(codes), refresh=None)
    if crossover is not None:
        settings = PQSettings(Regions(BUDGET), Codes.parse(codes), refresh=None, crossover=crossover)
    layer = PQLayer(settings)
    layer.update(keys[:, :, :length], values[:, :, :length])
    return layer


def _dense(query: Tensor, layer: PQLayer) -> Tensor:
    """Packed grouped-query attention over all of a layer's rows."""
    keys, values = layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]
    return scaled_dot_product_attention(query.view(1, HEADS, GROUP, SIZE), keys, values).view(query.shape)


def _row(kind: str, **fields: Any) -> Row:
    return {"part": "speed", "kind": kind, "threads": torch.get_num_threads(), **fields}
