"""The speed half: its rows and the claims that follow from them."""

from __future__ import annotations

import pytest

from headrace.bench.pqcache import speed
from headrace.bench.pqcache.claims import claims
from headrace.bench.pqcache.run import panels
from headrace.native.build import available
from headrace.sparse.codebook import Codes

SMALL = speed.SpeedBench(lengths=(2048, 3072), step_lengths=(2048,), repeats=2, step_repeats=1, prefill=1024)


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
def test_a_small_run_makes_every_claim() -> None:
    rows = speed.speed_rows(True, lambda text: None, SMALL)
    found = claims(rows)
    named = {
        "attn_decode_speedup_2k",
        "overhead_2k",
        "step_speedup_2k",
        "step_speedup_bound_2k",
        "fast_tier_bytes_error",
    }
    assert named | {"build_share_of_prefill", "tt2t_ratio"} <= set(found)
    assert all(value > 0 for name, value in found.items() if name != "fast_tier_bytes_error")
    assert found["fast_tier_bytes_error"] < 0.05
    assert set(panels(rows)) == {"attention of a layer, ms", "decoder layer, ms"}


def test_claims_are_ratios_of_medians() -> None:
    times = {
        "dense": (8.0, 10.0, 90.0),
        "pq 2x6": (2.0, 2.0, 1.0),
        "pq 4x8": (5.0, 5.0, 5.0),
        "dispatched": (11.0, 11.0, 2.0),
    }
    rows = [
        {"part": "speed", "kind": "attention", "context": 2048, "system": system, "ms": ms}
        for system, several in times.items()
        for ms in several
    ]
    rows += [
        {"part": "speed", "kind": "step", "context": 8192, "system": system, "ms": ms, "bytes": size}
        for system, ms, size in (("dense", 6.0, 300), ("pq", 4.0, 100))
    ]
    assert claims(rows) == {
        "attn_decode_speedup_2k": 5.0,
        "attn_decode_speedup_4x8_2k": 2.0,
        "overhead_2k": 1.1,
        "step_speedup_8k": 1.5,
        "step_speedup_bound_8k": 3.0,
    }


def test_bytes_by_hand() -> None:
    """32768 tokens: 8 heads of 256 floats of K and V a token; 3304 of them, and the sketch, at a tenth."""
    assert speed.attention_bytes(32768, "dense") == 8 * 32768 * 1024
    retrieved = local = (32768 - 32) // 20
    sketch = 4096 * 4 + 64 * 128 * 4 + retrieved * 4
    assert speed.attention_bytes(32768, "pq") == 8 * ((32 + local + retrieved) * 1024 + sketch)
    assert speed.index_bytes(100, Codes(4, 8)) == 8 * (100 * 4 + 256 * 128 * 4 + 4 * 256 * 4)
