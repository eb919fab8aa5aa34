"""Chains of simulated drafts without a node at a time: what was drawn along the accepted text of a request, as arrays.

The draws are those of :class:`headrace.engine.simulation.acceptance.AcceptanceModel`, which says what they mean; only the
arithmetic is done for a whole answer at once. Places are indices of tokens in the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.engine.sampling.rng import mix64
from headrace.engine.simulation import acceptance
from headrace.engine.simulation.acceptance import AcceptanceModel, expit, logistic, path_key

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]

_BLOCK = 320
_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Path:
    """The accepted text of one request.

    Attributes:
        around: float64[P], log odds of each place before the token's own difficulty.
        beliefs: float64[P], what a draft believes of its first choice at each place, all before being accepted.
        accepted: bool[P], whether that choice is the target's token.
    """

    around: Floats
    beliefs: Floats
    accepted: NDArray[np.bool_]


def path(model: AcceptanceModel, request: int, places: int) -> Path:
    """The first ``places`` places of the answer to ``request`` (the key that :meth:`AcceptanceModel.root` takes)."""
    setting, wrong = model.acceptance, model.miscalibration
    place = np.arange(places)
    above = _path_keys(request, place - 1)
    stretches = _logistics(
        model.world, _path_keys(request, np.arange(places // setting.stretch + 1)), acceptance.STRETCH
    )
    around = (
        setting.ease
        + setting.request_spread * logistic(model.world, request, acceptance.REQUEST)
        + setting.stretch_spread * stretches[place // setting.stretch]
    )
    odds = around + setting.token_spread * _logistics(model.source, above, acceptance.TOKEN)
    error = wrong.noise * _logistics(model.source, above, acceptance.BELIEF) if wrong.noise else 0.0
    return Path(
        around,
        _expit(odds / wrong.temperature + wrong.bias + error),
        _uniforms(model.source, above, acceptance.FATE) < _expit(odds),
    )


class Chains:
    """Chains of ``model``, with the paths of requests asked for lately.

    Args:
        model: what is drawn from.
    """

    def __init__(self, model: AcceptanceModel) -> None:
        self._model = model
        self._paths: dict[int, Path] = {}

    def draft(self, request: int, decoded: int, depth: int) -> tuple[list[float], int]:
        """What a chain of ``depth`` after ``decoded`` tokens believes of its nodes, and how many of them are accepted."""
        known = self._path(request, decoded + depth)
        fates = known.accepted[decoded : decoded + depth]
        won = depth if fates.all() else int(fates.argmin())
        beliefs: list[float] = known.beliefs[decoded : decoded + min(depth, won + 1)].tolist()
        key = path_key(request, decoded + won - 1)
        for place in range(decoded + won + 1, decoded + depth):  # below the first rejected node nothing is accepted
            key = self._model.rejected_key(key)
            odds = float(known.around[place])
            odds += self._model.acceptance.token_spread * logistic(self._model.source, key, acceptance.TOKEN)
            beliefs.append(self._model.belief(odds, key))
        return beliefs, won

    def _path(self, request: int, places: int) -> Path:
        known = self._paths.get(request)
        if known is None or len(known.accepted) < places:
            if len(self._paths) > _KEPT:
                self._paths.clear()
            known = self._paths[request] = path(self._model, request, -(-places // _BLOCK) * _BLOCK)
        return known


def _path_keys(request: int, positions: NDArray[np.int64]) -> Keys:
    """:func:`headrace.engine.simulation.acceptance.path_key` of every position."""
    return _mix(np.uint64(mix64(request)) + (positions + 2).astype(np.uint64))


def _mix(values: Keys) -> Keys:
    """:func:`headrace.engine.sampling.rng.mix64` of every value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _uniforms(world: int, keys: Keys, purpose: int) -> Floats:
    drawn = _mix(np.uint64(mix64(world + purpose)) ^ keys) >> np.uint64(11)
    return (drawn.astype(np.float64) + 0.5) * 2.0**-53


def _logistics(world: int, keys: Keys, purpose: int) -> Floats:
    u = _uniforms(world, keys, purpose)
    return np.asarray(np.log(u / (1.0 - u)) * acceptance.UNIT_LOGISTIC)


def _expit(odds: Floats) -> Floats:
    return np.minimum(1.0 / (1.0 + np.exp(-np.maximum(odds, -700.0))), expit(np.inf))
