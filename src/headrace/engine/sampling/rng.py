"""Counter-based random numbers: every draw is a pure function of (stream key, token index).

Nothing is carried from one draw to the next, so a token depends neither on the batch it was drawn in, nor on how many
tokens were drawn together, nor on what a neighbour did. The mixer is splitmix64's finaliser
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), applied twice with the key in between,
so that streams whose keys differ by a multiple of the increment do not overlap.
"""

from __future__ import annotations

import secrets

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BITS = 53


def mix64(value: int) -> int:
    """A bijection of 64-bit integers with full avalanche."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def stream_key(seed: int, index: int = 0) -> int:
    """The 64-bit key of the ``index``-th sequence of a request with ``seed`` (any integer, taken modulo 2**64)."""
    return mix64(mix64(seed + _GOLDEN) + (index + 1) * _GOLDEN)


def random_seed() -> int:
    """A fresh seed in [0, 2**63) for a request that brought none."""
    return secrets.randbits(63)


def uniform(key: int, index: int) -> float:
    """The ``index``-th uniform of a stream: a multiple of 2**-53 in [0, 1)."""
    return (mix64(mix64((index + 1) * _GOLDEN) ^ key) >> (64 - _BITS)) * 2.0**-_BITS
