"""Product quantisation of keys: centroids by Lloyd's iteration, codes by the nearest one.

Everything is batched over R rows, one for each sequence and KV head. A key of D dimensions is cut into ``m`` contiguous runs of
D / m, and each run is coded by one of ``2^b`` centroids of its own (paper section 3.2; sheet 3.2, pitfalls P5 and P6).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.core.errors import InvalidRequest
from headrace.native import build, sketch

BLOCK = 1 << 22
"""Distances held at once while codes are assigned."""

SAMPLE = 256
"""Keys a centroid that a fit looks at; more of them change little."""


@dataclass(frozen=True, slots=True)
class Codes:
    """The size of a code: ``subspaces`` runs of ``bits`` bits each."""

    subspaces: int = 2
    bits: int = 6

    def __post_init__(self) -> None:
        if self.subspaces < 1 or not 1 <= self.bits <= 12:
            raise InvalidRequest(
                f"codes are {self.subspaces}x{self.bits}: give at least 1 sub-space and 1 to 12 bits, such as 2x6",
                field="codes",
            )

    @classmethod
    def parse(cls, text: str) -> Codes:
        """``"2x6"`` and the like."""
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None:
            raise InvalidRequest(f"codes are {text!r}: give SUBSPACESxBITS, such as 2x6 or 4x8", field="codes")
        return cls(int(match[1]), int(match[2]))

    @property
    def centroids(self) -> int:
        """Centroids of one sub-space."""
        return 1 << self.bits

    @property
    def cells(self) -> int:
        """Different codes a key can have."""
        return 1 << (self.bits * self.subspaces)

    @property
    def dtype(self) -> torch.dtype:
        """Of one sub-space's code."""
        return torch.uint8 if self.bits <= 8 else torch.int16


@dataclass(frozen=True, slots=True)
class Codebook:
    """Centroids: float32[R, m, C, D / m]."""

    centroids: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of codes."""
        return torch.uint8 if self.centroids.shape[2] <= 256 else torch.int16

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.centroids.nbytes

    def assign(self, keys: Tensor) -> Tensor:
        """Codes of ``keys`` [R, n, D]: [R, m, n], the nearest centroid of each run, the first of equally near ones."""
        rows, subspaces, count, _ = self.centroids.shape
        codes = torch.empty(rows, subspaces, keys.shape[1], dtype=self.dtype, device=keys.device)
        half = self.centroids.square().sum(-1) / 2
        for part in _blocks(keys.shape[1], rows * subspaces * count):
            runs = split(keys[:, part], subspaces)
            codes[:, :, part] = nearest(runs, self.centroids, half).to(self.dtype)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """What ``codes`` [R, m, n] stand for: float32[R, n, D]."""
        index = codes.long()[..., None].expand(-1, -1, -1, self.centroids.shape[-1])
        return self.centroids.gather(2, index).transpose(1, 2).flatten(2)

    def table(self, queries: Tensor) -> Tensor:
        """Products of every query's runs with every centroid: [R, G, D] to float32[R, G, m, C]."""
        rows, group, _ = queries.shape
        runs = queries.float().view(rows, group, self.centroids.shape[1], -1)
        return torch.einsum("rgmd,rmcd->rgmc", runs, self.centroids)


def fit(keys: Tensor, codes: Codes, *, iterations: int = 8, skip: Tensor | None = None, seed: int = 0) -> Codebook:
    """Cluster ``keys`` [R, n, D].

    Args:
        codes: sub-spaces and bits.
        iterations: of Lloyd; 0 leaves the keys drawn at the start as centroids.
        skip: int64[R], keys at the start of a row that are padding and take no part; none by default.
        seed: of the draw.

    Raises:
        InvalidRequest: when the sub-spaces do not divide D.
        ValueError: when a row has no key.
    """
    rows, count, size = keys.shape
    if size % codes.subspaces:
        raise InvalidRequest(
            f"codes have {codes.subspaces} sub-spaces, which do not divide the head size {size}: choose a divisor",
            field="codes",
        )
    first = torch.zeros(rows, dtype=torch.long, device=keys.device) if skip is None else skip
    if count == 0 or bool((first >= count).any()):
        raise ValueError("a codebook needs at least one key in every row")
    runs, weights = _sample(keys, codes, first)
    centroids = _draw(runs, weights, codes.centroids, seed)
    for _ in range(iterations):
        centroids = _step(runs, weights, centroids)
    return Codebook(centroids)


def split(keys: Tensor, subspaces: int) -> Tensor:
    """[R, n, D] to float32[R, m, n, D / m]."""
    rows, count, _ = keys.shape
    return keys.float().view(rows, count, subspaces, -1).transpose(1, 2)


def nearest(runs: Tensor, centroids: Tensor, half: Tensor) -> Tensor:
    """Index of the nearest centroid: argmax of x z - |z|^2 / 2, so that |x|^2 need not be known. int64[R, m, n]."""
    return (runs @ centroids.transpose(2, 3) - half[:, :, None]).argmax(-1)


def _blocks(count: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK // width)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _sample(keys: Tensor, codes: Codes, first: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spaced keys of every row, as runs [R, m, s, D / m], and 1 for each, or 0 for padding: float32[R, s]."""
    count = keys.shape[1]
    stride = max(1, count // (SAMPLE * codes.centroids))
    chosen = torch.arange(count % stride if stride > 1 else 0, count, stride, device=keys.device)
    weights = (chosen[None] >= first[:, None]).float()
    return split(keys[:, chosen], codes.subspaces), weights


def _draw(runs: Tensor, weights: Tensor, centroids: int, seed: int) -> Tensor:
    """Random distinct keys to start from; where there are fewer keys than centroids, some come again."""
    rows, subspaces, count, size = runs.shape
    generator = torch.Generator(device="cpu").manual_seed(seed)
    ranks = torch.rand(count, generator=generator).to(runs.device) + 2.0 * weights  # padding goes last
    order = ranks.argsort(dim=1, descending=True)
    real = weights.sum(1).long()
    places = torch.arange(centroids, device=runs.device)[None] % real[:, None].clamp(min=1)
    index = order.gather(1, places)[:, None, :, None].expand(rows, subspaces, -1, size)
    return runs.gather(2, index)


def _step(runs: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
    """One iteration of Lloyd: every centroid becomes the mean of its keys; one without keys goes where a key is worst off."""
    weight = weights[:, None].expand(runs.shape[:3])
    native = runs.device.type == "cpu" and runs.stride(3) == 1 and build.available()
    _, best, sums, counts = (sketch.iterate if native else iterate)(runs, weights, centroids)
    means = sums / counts.clamp(min=1.0)[..., None]
    empty = counts == 0
    if not bool(empty.any()):
        return means
    distance = runs.square().sum(-1) - 2 * best
    distance = torch.where(weight > 0, distance, -torch.inf)
    farthest = distance.topk(min(centroids.shape[2], runs.shape[2]), -1).indices
    # The i-th empty centroid of a sub-space takes the i-th farthest key.
    place = (empty.long().cumsum(-1) - 1).clamp(0, farthest.shape[-1] - 1)
    index = farthest.gather(2, place)
    usable = empty & (distance.gather(2, index) > 0)
    moved = runs.gather(2, index[..., None].expand_as(centroids))
    return torch.where(usable[..., None], moved, torch.where(empty[..., None], centroids, means))


def iterate(runs: Tensor, weights: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`headrace.native.sketch.iterate`, on any device."""
    half = centroids.square().sum(-1) / 2
    scores = [
        (runs[:, :, p] @ centroids.transpose(2, 3) - half[:, :, None]).max(-1) for p in _blocks(*_size(runs, centroids))
    ]
    codes, best = (torch.cat([getattr(found, name) for found in scores], 2) for name in ("indices", "values"))
    sums, counts = torch.zeros_like(centroids), torch.zeros(centroids.shape[:3], device=runs.device)
    weight = weights[:, None].expand(codes.shape)
    counts.scatter_add_(2, codes, weight)
    sums.scatter_add_(2, codes[..., None].expand_as(runs), runs * weight[..., None])
    return codes, best, sums, counts


def _size(runs: Tensor, centroids: Tensor) -> tuple[int, int]:
    return runs.shape[2], runs.shape[0] * runs.shape[1] * centroids.shape[2]
