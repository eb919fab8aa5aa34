"""Candidate trees by beam search, for many sequences at once: each layer keeps the likeliest paths of its length.

A layer of width w is grown from the w nodes of the layer above, each with its likeliest next tokens. Width 1 is greedy decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from headrace.core.batch import Ints
from headrace.core.speculation import ROOT, DraftTree, Floats


@dataclass(slots=True)
class Beam:
    """Candidate trees of S sequences under construction, equally deep and equally wide.

    Attributes:
        width: nodes in a layer, at most.
        source: name of the drafter.
        tokens, above: per layer int32[S, w]; ``above`` is the place of a node's parent in the layer before.
        logs: per layer float64[S, w], log-probabilities of the paths.
    """

    width: int
    source: str = ""
    tokens: list[Ints] = field(default_factory=list)
    above: list[Ints] = field(default_factory=list)
    logs: list[Floats] = field(default_factory=list)

    def grow(self, tokens: Ints, logs: Floats) -> None:
        """Add a layer.

        Args:
            tokens: int32[S, p, k], the likeliest next tokens of each of the p nodes of the last layer (p = 1, the root, at first).
            logs: float64[S, p, k], their log-probabilities given that node.
        """
        sequences, parents, choices = tokens.shape
        paths = logs if not self.logs else logs + self.logs[-1][:, :, None]
        flat = paths.reshape(sequences, parents * choices)
        # Stable, so that equal paths stay in the order of their parents and choices.
        best = np.argsort(-flat, axis=1, kind="stable")[:, : self.width]
        self.tokens.append(np.take_along_axis(tokens.reshape(sequences, -1), best, 1).astype(np.int32))
        self.above.append((best // choices).astype(np.int32))
        self.logs.append(np.take_along_axis(flat, best, 1))

    def trees(self, depths: list[int] | None = None) -> list[DraftTree]:
        """The tree of each sequence, layer by layer, cut to ``depths[s]`` layers."""
        if not self.tokens:
            return []
        sizes = np.array([layer.shape[1] for layer in self.tokens])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        parents = [np.full_like(self.above[0], ROOT)]
        parents += [layer + starts[j] for j, layer in enumerate(self.above[1:])]
        tokens, above = np.concatenate(self.tokens, 1), np.concatenate(parents, 1).astype(np.int32)
        # Rounding of a sum of logarithms must not lift a child above its parent.
        paths = [np.exp(np.minimum(self.logs[0], 0.0))]
        for layer, places in zip(self.logs[1:], self.above[1:], strict=True):
            paths.append(np.minimum(np.exp(layer), np.take_along_axis(paths[-1], places, 1)))
        probabilities = np.concatenate(paths, 1)
        levels = np.repeat(np.arange(1, len(sizes) + 1), sizes).astype(np.int32)
        made = []
        for s in range(len(tokens)):
            end = starts[-1] if depths is None else starts[min(depths[s], len(sizes))]
            made.append(DraftTree(tokens[s, :end], above[s, :end], levels[:end], probabilities[s, :end], self.source))
        return made
