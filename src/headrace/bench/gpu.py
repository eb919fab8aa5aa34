"""``headrace bench gpu``: what the GPU path reaches, against transformers and against what the memory could give.

Three parts in one run. *Attention*: the Triton kernel over scattered slots, torch's SDPA over contiguous K and V of the same
sizes, and the time that reading them once takes at the measured bandwidth. *Decoding*: transformers' generate, its continuous
batching, and the engine with every kernel launched and with captured steps, in turns. *Identity*: the same greedy tokens
with and without capture. Needs torch, transformers, triton and numpy; ``python -m headrace.bench.gpu`` does without the command
line's packages too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from headrace.bench.checkpoints.shapes import SHAPES, Shape
from headrace.bench.results import Result, Rows, new_result
from headrace.core.batch import Packer, Segment
from headrace.core.errors import InvalidRequest
from headrace.core.policy import Limits
from headrace.core.protocols import ModelCard
from headrace.core.request import Request, SamplingParams

Report = Callable[[str], None]
Generate = Callable[[list[list[int]], int], tuple[float, list[list[int]]]]
CONTEXT = 16_384
PAGE = 256  # tokens of a block in transformers' continuous batching


@dataclass(frozen=True, slots=True)
class GpuBench:
    """What to measure.

    Attributes:
        shape: a name of :data:`headrace.bench.checkpoints.shapes.SHAPES`; weights are random.
        device: "cuda"; "cpu" runs the same code without Triton and graphs, to see that it runs.
        prompt, new: tokens per prompt and answer.
        batches: sequences decoded together.
        contexts: tokens of K and V per sequence in the attention part.
        repeats: measured turns of everything.
    """

    shape: str = "1b"
    device: str = "cuda"
    prompt: int = 512
    new: int = 128
    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (1024, 8192)
    repeats: int = 5
    seed: int = 0


def run(bench: GpuBench, *, report: Report = lambda line: None) -> Result:
    """Measure all parts.

    Raises:
        InvalidRequest: an unknown shape, or no such device.
    """
    if bench.shape not in SHAPES:
        raise InvalidRequest(f"shape is {bench.shape!r}: choose one of {', '.join(SHAPES)}", field="shape")
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(f"torch {torch.__version__} sees no CUDA device here", field="device")
    load_before = os.getloadavg()
    bandwidth = measured_bandwidth(bench.device)
    report(f"memory: {bandwidth / 1e9:.0f} GB/s read")
    rows: list[dict[str, Any]] = [{"part": "memory", "bytes_per_s": bandwidth, "device": _name(bench.device)}]
    with torch.inference_mode():
        rows += attention_rows(bench, bandwidth, report)
    rows += decode_rows(bench, bandwidth, report)
    return new_result("gpu", rows, claims, load_before)


def claims(rows: Rows) -> dict[str, float]:
    """Ratios of medians; above 1 is in our favour, shares are of what the memory allows."""
    found: dict[str, float] = {}
    kernels = [row for row in rows if row["part"] == "attention"]
    for case in dict.fromkeys(row["case"] for row in kernels):
        ours, sdpa, floor = (
            statistics.median(row[name] for row in kernels if row["case"] == case)
            for name in ("triton_ms", "sdpa_ms", "floor_ms")
        )
        found[f"attention_{case}_vs_sdpa"] = sdpa / ours
        found[f"attention_{case}_share_of_memory"] = floor / ours
    turns = [row for row in rows if row["part"] == "decode"]
    for batch in sorted({row["batch"] for row in turns}):
        rate = {
            system: statistics.median(r["tok_s"] for r in turns if (r["batch"], r["system"]) == (batch, system))
            for system in dict.fromkeys(row["system"] for row in turns)
        }
        best = max(rate[name] for name in ("graphs", "launched") if name in rate)
        for other in ("generate", "continuous batching"):
            if other in rate:
                found[f"decode_b{batch}_vs_{other.replace(' ', '_')}"] = best / rate[other]
        if {"graphs", "launched"} <= rate.keys():
            found[f"decode_b{batch}_graphs_vs_launched"] = rate["graphs"] / rate["launched"]
        first = {
            system: statistics.median(r["prefill_tok_s"] for r in turns if (r["batch"], r["system"]) == (batch, system))
            for system in rate
        }
        for other in ("generate", "continuous batching"):
            if other in first:
                found[f"prefill_b{batch}_vs_{other.replace(' ', '_')}"] = first["launched"] / first[other]
        floor = next(row["floor_tok_s"] for row in turns if row["batch"] == batch)
        found[f"decode_b{batch}_share_of_memory"] = best / floor
    same = [row["identical"] for row in turns if "identical" in row]
    if same:
        found["identical_tokens_rate"] = sum(same) / len(same)
    return {name: round(value, 4) for name, value in found.items()}


def measured_bandwidth(device: str, *, nbytes: int = 1 << 30) -> float:
    """Bytes a second at which ``device`` reads memory: a sum over ``nbytes``, the best of several."""
    size = nbytes if device == "cuda" else nbytes >> 4
    data = torch.ones(size // 4, device=device)
    return size / min(timed(data.sum, device) for _ in range(7)) * 1e3


def timed(work: Callable[[], object], device: str) -> float:
    """Milliseconds of ``work`` on ``device``, launches waited for."""
    if device != "cuda":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    cuda: Any = torch.cuda
    first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    first.record()
    work()
    last.record()
    last.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed


# ---- attention ---------------------------------------------------------------------------------------------------


def attention_rows(bench: GpuBench, bandwidth: float, report: Report) -> list[dict[str, Any]]:
    """Decode rows and trees of eight over every batch and context, and one long prompt chunk."""
    from headrace.models.attention import get_backend

    shape = SHAPES[bench.shape]
    dtype = _dtype(bench.device)
    backend = get_backend("auto", bench.device)
    cases = [
        (f"{'tree' if rows > 1 else 'decode'}_b{batch}_c{context}", batch, rows, context)
        for batch in bench.batches for context in bench.contexts for rows in (1, 8)
    ]  # fmt: skip
    cases.append((f"prefill_c{max(bench.contexts)}", 1, min(1024, max(bench.contexts)), max(bench.contexts)))
    out = []
    for name, batch, rows, context in cases:
        total = batch * (context + rows)
        heads, wide, queries = shape.num_key_value_heads, shape.head_dim, shape.num_attention_heads
        k, v = (torch.randn(total, heads, wide, device=bench.device, dtype=dtype) for _ in "kv")
        q = torch.randn(batch * rows, queries, wide, device=bench.device, dtype=dtype)
        packed = Packer().pack(_segments(batch, rows, context, bench.seed, tree=name.startswith("tree")))
        step = backend.prepare(packed, torch.device(bench.device))

        def ours(q: Any = q, k: Any = k, v: Any = v, step: Any = step, scale: float = wide**-0.5) -> object:
            return backend.attend(q, k, v, step, scale=scale)

        sdpa = _sdpa(q, k, v, batch, rows, context)
        floor = 2 * total * heads * wide * dtype.itemsize / bandwidth * 1e3
        for work in (ours, sdpa):  # compiles and takes memory
            work()
            work()
        for repeat in range(bench.repeats):
            ms = {"triton_ms": timed(ours, bench.device), "sdpa_ms": timed(sdpa, bench.device), "floor_ms": floor}
            out.append({"part": "attention", "case": name, "repeat": repeat, "backend": backend.name, **ms})
        report(f"attention {name}: {out[-1]['triton_ms']:.3f} ms, SDPA {out[-1]['sdpa_ms']:.3f}, memory {floor:.3f}")
    return out


def _segments(batch: int, rows: int, context: int, seed: int, *, tree: bool) -> list[Segment]:
    """Sequences over scattered slots; a tree is a root with ``rows - 1`` children."""
    order = np.random.default_rng(seed).permutation(batch * (context + rows)).astype(np.int32)
    parents = np.array([-1] + [0] * (rows - 1), np.int32) if tree else None
    depth = np.minimum(np.arange(rows), 1) if tree else np.arange(rows)
    made = []
    for number in range(batch):
        slots = order[number * (context + rows) : (number + 1) * (context + rows)]
        positions = (context + depth).astype(np.int32)
        wanted, tokens = np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32)
        made.append(Segment(number, tokens, positions, slots[context:], slots[:context], wanted, parents=parents))
    return made


def _sdpa(q: Any, k: Any, v: Any, batch: int, rows: int, context: int) -> Callable[[], object]:
    """torch's attention over the same K and V as if every sequence's lay in a row: its best case; a tree is a chain to it."""
    keys, values = (t.view(batch, context + rows, *t.shape[1:]).transpose(1, 2).contiguous() for t in (k, v))
    queries = q.view(batch, rows, *q.shape[1:]).transpose(1, 2).contiguous()
    mask = None
    if rows > 1:
        mask = torch.ones(rows, context + rows, dtype=torch.bool, device=q.device).tril(context)
    return lambda: scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)


# ---- decoding ----------------------------------------------------------------------------------------------------


def decode_rows(bench: GpuBench, bandwidth: float, report: Report) -> list[dict[str, Any]]:
    """All systems in turns; a rate is ``batch * (new - 1)`` over the time that ``new`` tokens take beyond the first."""
    shape = SHAPES[bench.shape]
    generator = torch.Generator().manual_seed(bench.seed)
    out: list[dict[str, Any]] = []
    systems: dict[str, Callable[[GpuBench], contextlib.AbstractContextManager[Generate]]] = {
        "generate": _generate,
        "continuous batching": _continuous_batching,
        "launched": lambda b: _headrace(b, graphs=False),
    }
    if bench.device == "cuda":
        systems["graphs"] = lambda b: _headrace(b, graphs=True)
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(make(bench)) for name, make in systems.items()}
        for batch in bench.batches:
            floor = batch * bandwidth / (shape.parameters * _dtype(bench.device).itemsize)
            for repeat in range(-1, bench.repeats):  # the first turn compiles and captures
                prompts = torch.randint(5, shape.vocab_size, (batch, bench.prompt), generator=generator).tolist()
                answers = {}
                for name, generate in running.items():
                    first, _ = generate(prompts, 1)
                    whole, answers[name] = generate(prompts, bench.new)
                    if repeat < 0:
                        continue
                    row = {
                        "part": "decode", "system": name, "batch": batch, "repeat": repeat, "floor_tok_s": floor,
                        "tok_s": batch * (bench.new - 1) / (whole - first), "prefill_tok_s": batch * bench.prompt / first,
                    }  # fmt: skip
                    if name == "graphs":
                        same = sum(a == b for a, b in zip(answers[name], answers["launched"], strict=True))
                        row["identical"] = same / batch
                    out.append(row)
                    report(f"batch {batch} · {repeat + 1}/{bench.repeats} · {name}: {row['tok_s']:.0f} tok/s")
    return out


def _module(bench: GpuBench) -> Any:
    """A Llama of the shape with random weights, the same ones on every call, on the device."""
    import transformers

    hub: Any = transformers
    torch.manual_seed(bench.seed)
    shape: Shape = SHAPES[bench.shape]
    config = hub.LlamaConfig(**shape.config(), max_position_embeddings=CONTEXT)
    with torch.device(bench.device):
        module = hub.AutoModelForCausalLM.from_config(config, dtype=_dtype(bench.device))
    module.eval().requires_grad_(False)
    module.generation_config.eos_token_id = None
    return module


@contextlib.contextmanager
def _generate(bench: GpuBench) -> Iterator[Generate]:
    module = _module(bench)
    module.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        ids = torch.tensor(prompts, device=bench.device)
        started = time.perf_counter()
        out = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=3,
        )  # fmt: skip
        answers = out[:, ids.shape[1] :].tolist()  # waits for the device
        return time.perf_counter() - started, answers

    yield generate


@contextlib.contextmanager
def _continuous_batching(bench: GpuBench) -> Iterator[Generate]:
    import transformers

    hub: Any = transformers
    module = _module(bench)
    module.set_attn_implementation("sdpa")
    generation = hub.GenerationConfig(max_new_tokens=bench.new, do_sample=False, eos_token_id=-1, pad_token_id=3)
    blocks = -(-max(bench.batches) * (bench.prompt + bench.new + PAGE) // PAGE)
    config = hub.ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=blocks, max_batch_tokens=4096, allow_block_sharing=False,
        max_requests_per_batch=max(bench.batches),
    )  # fmt: skip
    with module.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, block=True, timeout=30
    ) as manager:

        def generate(prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
            started = time.perf_counter()
            for prompt in prompts:
                manager.add_request(prompt, max_new_tokens=new)
            answers: list[list[int]] = []
            while len(answers) < len(prompts):
                output = manager.get_result(timeout=300)
                if output is None:
                    raise RuntimeError("transformers' continuous batching gave no result for 300 s")
                if output.is_finished():
                    answers.append(list(output.generated_tokens))
            return time.perf_counter() - started, answers

        yield generate


@contextlib.contextmanager
def _headrace(bench: GpuBench, *, graphs: bool) -> Iterator[Generate]:
    from headrace.engine.engine import Engine
    from headrace.engine.kv import KVSpace
    from headrace.engine.policies import get_policy
    from headrace.engine.sampling.sampler import TorchSampler
    from headrace.models.cache.slots import SlotPool
    from headrace.models.loaded import LoadedModel
    from headrace.models.runner import ModelRunner

    module = _module(bench)
    card = ModelCard(f"random-{bench.shape}", "", CONTEXT, module.config.vocab_size, stop_ids=())
    model = LoadedModel(module, module.config, Path(), card, _dtype(bench.device), torch.device(bench.device))
    most = max(bench.batches)
    pool = SlotPool(most * (bench.prompt + bench.new + 1) + 1)
    runner = ModelRunner(model, pool, graphs=graphs)
    limits = replace(Limits(), max_sequences=most, max_step_tokens=max(4096, most), max_prefill_tokens=4096)
    engine = Engine(
        runner, KVSpace(pool, prefix_cache=False), get_policy("prefill-first"), TorchSampler(), card, limits=limits
    )
    count = 0

    def generate(prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        nonlocal count
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        answers: dict[str, list[int]] = {}
        started = time.perf_counter()
        for prompt in prompts:
            count += 1
            answers[str(count)] = []
            engine.add(Request(str(count), tuple(prompt), params))
        while engine.busy:
            for delta in engine.step():
                answers[delta.request_id] += delta.tokens
        return time.perf_counter() - started, list(answers.values())

    yield generate
    if runner.graphs is not None and runner.graphs.obstacle is not None:
        raise RuntimeError(f"nothing was captured: {runner.graphs.obstacle}")
    engine.close()


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def main() -> None:
    """The benchmark without the command line's packages."""
    parser = argparse.ArgumentParser(prog="python -m headrace.bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="1b", help="model shape, with random weights")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns")
    parser.add_argument("--json", type=Path, default=Path("results/gpu.json"), help="where to write the result")
    options = parser.parse_args()
    result = run(GpuBench(shape=options.shape, repeats=options.repeats), report=lambda line: print(line, flush=True))
    result.write(options.json)
    print(json.dumps(result.claims))


if __name__ == "__main__":
    main()
