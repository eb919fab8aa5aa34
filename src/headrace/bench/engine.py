"""``headrace bench engine``: the step loop against transformers' own generation on one shape with random weights.

Three systems take turns in one process, so that drifts of the machine hit all alike: ``transformers.generate`` (dynamic
cache, SDPA), transformers' continuous batching (SDPA, one warm manager) and headrace's engine. Decode rate is
``batch * (new - 1) / (time of new tokens - time of 1 token)``; every call brings fresh random prompts.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.bench.checkpoints.shapes import shape_named
from headrace.bench.closedloop.testmodel import random_llama
from headrace.bench.results import Result, Rows, new_result
from headrace.core.config import EngineConfig
from headrace.core.policy import Limits
from headrace.core.request import Request, SamplingParams

if TYPE_CHECKING:
    from headrace.models.loaded import LoadedModel


@dataclass(frozen=True, slots=True)
class EngineBench:
    """What to measure: a shape's name, tokens per prompt and answer, batch sizes, repeats and CPU threads."""

    shape: str = "125m"
    prompt: int = 128
    new: int = 64
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 5
    threads: int | None = None
    seed: int = 0


Generate = Callable[[list[list[int]], int], dict[str, float]]


def run(bench: EngineBench, *, report: Callable[[str], None] = lambda line: None) -> Result:
    """Measure all systems in turn.

    Raises:
        InvalidRequest: for an unknown shape.
    """
    import torch

    from headrace.compose import default_threads

    vocab = shape_named(bench.shape).vocab_size
    load_before = os.getloadavg()
    torch.set_num_threads(bench.threads or default_threads())
    generator = torch.Generator().manual_seed(bench.seed)

    def prompts(batch: int) -> list[list[int]]:
        return torch.randint(5, vocab, (batch, bench.prompt), generator=generator).tolist()

    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        systems = {name: stack.enter_context(make(bench)) for name, make in SYSTEMS.items()}
        for batch in bench.batches:
            for generate in systems.values():
                generate(prompts(batch), 4)
            for repeat in range(bench.repeats):
                for name, generate in systems.items():
                    one = generate(prompts(batch), 1)
                    many = generate(prompts(batch), bench.new)
                    rate = batch * (bench.new - 1) / (many["seconds"] - one["seconds"])
                    extra = {k: v for k, v in many.items() if k != "seconds"}
                    rows.append(
                        dict(system=name, batch=batch, repeat=repeat, decode_tok_s=rate,
                             first_token_ms=one["seconds"] * 1e3, **extra)
                    )  # fmt: skip
                    report(f"batch {batch} · {repeat + 1}/{bench.repeats} · {name}: {rate:.1f} tok/s")
    return new_result("engine", rows, claims, load_before)


def claims(rows: Rows) -> dict[str, float]:
    """Ratios of medians between systems, and the engine's own share of a step."""

    def median(system: str, batch: int, field: str) -> float:
        values: list[float] = [r[field] for r in rows if r["system"] == system and r["batch"] == batch and field in r]
        return statistics.median(values)

    found: dict[str, float] = {}
    for batch in sorted({r["batch"] for r in rows}):
        ours = median("headrace", batch, "decode_tok_s")
        found[f"decode_b{batch}_vs_generate"] = ours / median("generate", batch, "decode_tok_s")
        found[f"decode_b{batch}_vs_continuous_batching"] = ours / median("continuous batching", batch, "decode_tok_s")
        found[f"outside_forward_share_b{batch}"] = median("headrace", batch, "outside_forward_share")
    return {name: round(value, 4) for name, value in found.items()}


def _module(bench: EngineBench) -> Any:
    """A Llama of the shape with random weights; the same ones on every call."""
    module = random_llama(bench.shape, bench.seed)
    module.generation_config.eos_token_id = None
    return module


def _loaded(bench: EngineBench) -> LoadedModel:
    """The module as if it had been read from a checkpoint."""
    import torch

    from headrace.core.protocols import ModelCard
    from headrace.models.loaded import LoadedModel

    module = _module(bench)
    config = module.config
    name = f"random-{bench.shape}"
    card = ModelCard(name, "", context=config.max_position_embeddings, vocab_size=config.vocab_size, stop_ids=())
    return LoadedModel(module, config, Path(), card, torch.float32, torch.device("cpu"))


@contextlib.contextmanager
def _generate(bench: EngineBench) -> Iterator[Generate]:
    import torch

    module = _module(bench)
    module.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> dict[str, float]:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=3,
        )  # fmt: skip
        return {"seconds": time.perf_counter() - started}

    yield generate


@contextlib.contextmanager
def _continuous_batching(bench: EngineBench) -> Iterator[Generate]:
    import transformers

    hub: Any = transformers
    module = _module(bench)
    module.set_attn_implementation("sdpa")
    config = hub.ContinuousBatchingConfig(
        page_size=256, num_blocks=32, max_batch_tokens=1024, allow_block_sharing=False, max_requests_per_batch=8
    )
    generation = hub.GenerationConfig(max_new_tokens=bench.new, do_sample=False, eos_token_id=-1, pad_token_id=3)
    with module.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, block=True, timeout=5
    ) as manager:

        def generate(prompts: list[list[int]], new: int) -> dict[str, float]:
            started = time.perf_counter()
            for prompt in prompts:
                manager.add_request(prompt, max_new_tokens=new)
            done = 0
            while done < len(prompts):
                output = manager.get_result(timeout=60)
                done += output is not None and output.is_finished()
            return {"seconds": time.perf_counter() - started}

        yield generate


@contextlib.contextmanager
def _headrace(bench: EngineBench) -> Iterator[Generate]:
    from headrace.compose import engine_around

    config = EngineConfig(prefix_cache=False, kv_gib=0.5, limits=Limits(max_step_tokens=1024), threads=bench.threads)
    engine = engine_around(_loaded(bench), config)
    count = 0

    def generate(prompts: list[list[int]], new: int) -> dict[str, float]:
        nonlocal count
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        started = time.perf_counter()
        for prompt in prompts:
            count += 1
            engine.add(Request(str(count), tuple(prompt), params))
        outside, whole = [], []
        while engine.busy:
            engine.step()
            stats = engine.stats()
            outside.append(stats.step_ms - stats.forward_ms)
            whole.append(stats.step_ms)
        seconds = time.perf_counter() - started
        decode = slice(1, None)  # the first step holds the prompts
        share = sum(outside[decode]) / sum(whole[decode]) if new > 1 else 0.0
        return {"seconds": seconds, "outside_forward_share": share, "step_ms": statistics.median(whole)}

    yield generate
    engine.close()


SYSTEMS: dict[str, Callable[[EngineBench], contextlib.AbstractContextManager[Generate]]] = {
    "generate": _generate,
    "continuous batching": _continuous_batching,
    "headrace": _headrace,
}
