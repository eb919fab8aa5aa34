"""What drafting costs on this machine, learnt from every draft that is made."""

from __future__ import annotations

import math


class DraftTimes:
    """Milliseconds of a layer by source and octave of rows; conforms to :class:`headrace.core.speculation.DraftCosts`.

    Args:
        rate: share of the error corrected at each observation.
        unknown_ms: a layer's cost before anything was observed.
    """

    def __init__(self, rate: float = 0.1, unknown_ms: float = 1.0) -> None:
        self._rate, self._unknown = rate, unknown_ms
        self._layers: dict[str, dict[int, float]] = {}

    def draft_ms(self, source: str, sequences: int, depth: int, width: int) -> float:
        """``depth`` layers at the cost of the nearest octave observed."""
        if not sequences or not depth:
            return 0.0
        known = self._layers.get(source)
        if not known:
            return self._unknown * depth
        octave = _octave(sequences, width)
        return known[_nearest(known, octave)] * depth

    def observe(self, source: str, sequences: int, depth: int, width: int, ms: float) -> None:
        """Learn that such a draft took ``ms``; a single hiccup counts for at most three times what was expected.

        Where nothing of the size was seen before, as many times the nearest size's cost are believed as there are times as many rows.
        """
        if not (sequences and depth and ms > 0 and math.isfinite(ms)):
            return
        layers = self._layers.setdefault(source, {})
        octave, layer = _octave(sequences, width), ms / depth
        if not layers:
            layers[octave] = layer
            return
        nearest = _nearest(layers, octave)
        if octave not in layers:
            layers[octave] = min(layer, 3.0 * layers[nearest] * 2.0 ** abs(octave - nearest))
        else:
            layers[octave] += self._rate * (min(layer, 3.0 * layers[octave]) - layers[octave])


def _nearest(layers: dict[int, float], octave: int) -> int:
    return min(layers, key=lambda o: (abs(o - octave), o))


def _octave(sequences: int, width: int) -> int:
    return round(math.log2(sequences * width))
