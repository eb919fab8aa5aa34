"""The GPU benchmark's own code, run on the CPU at a size that says nothing; its claims from made-up rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from headrace.bench import gpu
from headrace.bench.checkpoints.shapes import SHAPES, Shape
from headrace.core.errors import InvalidRequest

SMALL = gpu.GpuBench(shape="tiny", device="cpu", prompt=9, new=4, batches=(1, 2), contexts=(16,), repeats=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape(64, 96, 2, 4, 2, 16, 512, True))
    monkeypatch.setattr(gpu, "CONTEXT", 128)


def test_every_part_runs() -> None:
    lines: list[str] = []
    result = gpu.run(SMALL, report=lines.append)
    assert {row["part"] for row in result.rows} == {"memory", "attention", "decode"}
    assert {row["system"] for row in result.rows if row["part"] == "decode"} == {
        "generate",
        "continuous batching",
        "launched",
    }
    assert len([row for row in result.rows if row["part"] == "attention"]) == 5
    assert result.claims == gpu.claims(result.rows)
    assert {
        "decode_b2_vs_generate",
        "decode_b1_share_of_memory",
        "attention_tree_b2_c16_vs_sdpa",
    } <= result.claims.keys()
    assert any("launched" in line for line in lines)


def test_systems_answer_alike() -> None:
    """All decode the same random model greedily, so what is compared is the same work."""
    prompts = torch.randint(5, 512, (2, 9), generator=torch.Generator().manual_seed(1)).tolist()
    with gpu._generate(SMALL) as other, gpu._headrace(SMALL, graphs=False) as ours:
        assert ours(prompts, 4)[1] == other(prompts, 4)[1]


def test_claims_are_ratios_of_medians() -> None:
    def turn(system: str, rate: float, **more: float) -> dict[str, object]:
        return {
            "part": "decode",
            "system": system,
            "batch": 8,
            "tok_s": rate,
            "prefill_tok_s": 10 * rate,
            "floor_tok_s": 1000.0,
            **more,
        }

    rows = [
        {"part": "attention", "case": "decode_b8", "triton_ms": 2.0, "sdpa_ms": 3.0, "floor_ms": 1.0},
        turn("generate", 100.0), turn("continuous batching", 200.0), turn("launched", 300.0),
        turn("graphs", 500.0, identical=1.0), turn("graphs", 700.0, identical=0.5), turn("graphs", 600.0, identical=1.0),
    ]  # fmt: skip
    assert gpu.claims(rows) == {
        "attention_decode_b8_vs_sdpa": 1.5,
        "attention_decode_b8_share_of_memory": 0.5,
        "decode_b8_vs_generate": 6.0,
        "decode_b8_vs_continuous_batching": 3.0,
        "decode_b8_graphs_vs_launched": 2.0,
        "decode_b8_share_of_memory": 0.6,
        "prefill_b8_vs_generate": 3.0,
        "prefill_b8_vs_continuous_batching": 1.5,
        "identical_tokens_rate": 0.8333,
    }


def test_what_cannot_run_is_said() -> None:
    with pytest.raises(InvalidRequest, match="shape is 'huge'"):
        gpu.run(gpu.GpuBench(shape="huge"))
    if not torch.cuda.is_available():
        with pytest.raises(InvalidRequest, match="sees no CUDA device"):
            gpu.run(gpu.GpuBench(shape="tiny"))


def test_it_imports_without_the_web_and_compiler_packages() -> None:
    absent = (
        "pydantic",
        "fastapi",
        "xgrammar",
        "bitsandbytes",
        "zmq",
        "numba",
        "typer",
        "rich",
        "psutil",
        "prometheus_client",
    )
    script = (
        f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
        "import headrace.bench.gpu, headrace.models.runner, headrace.models.graphs, headrace.engine.engine, "
        "headrace.engine.sampling.sampler, headrace.models.attention.gpu\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
