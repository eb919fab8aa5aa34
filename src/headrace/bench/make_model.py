"""``headrace bench make-model``: writes a cost-padded checkpoint and shows that it does what it claims."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.bench.checkpoints.padding import TOKENIZER_FILES, pad
from headrace.bench.checkpoints.shapes import Shape, shape_named, write_checkpoint
from headrace.bench.results import Result, Rows, new_result
from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidRequest
from headrace.core.policy import Limits
from headrace.core.request import Request, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.engine.engine import Engine

Report = Callable[[str], None]


def make(like: str, out: Path, *, model: str = "bundled", seed: int = 0) -> Shape:
    """Write ``model`` padded to the shape named ``like`` into ``out``; raises as :func:`headrace.bench.checkpoints.padding.pad`."""
    from headrace.models.checkpoints.hub import resolve

    shape = shape_named(like)
    source = resolve(model)
    if out.resolve() == source.resolve():
        raise InvalidRequest(f"--out {out} is the model itself: give another folder", field="out")
    pad(source, out, shape, seed=seed)
    (out / "README.md").write_text(
        f"# Cost-padded {model}\n\nGreedy text of `{model}`, step cost of a {like} Llama "
        f"({shape.parameters / 1e6:,.0f} million weights). Results obtained on it must say so.\n",
        encoding="utf-8",
    )
    return shape


def verify(
    out: Path, like: str, *, model: str = "bundled", prompts: int = 200, new: int = 32, turns: int = 5, report: Report
) -> Result:
    """Compare the padded checkpoint's greedy tokens with the source's, and its step times with a random model's of the shape.

    Prompts are texts the source model wrote, 24 tokens each, so they are in the language it knows.
    """
    load_before = os.getloadavg()
    rows: list[dict[str, Any]] = []
    with _engine(model) as source, _engine(str(out)) as padded:
        texts = _answers(source, [(0,)] * prompts, 24, temperature=1.0)
        asked = [(0, *text) for text in texts]
        for first in range(0, prompts, 8):
            part = asked[first : first + 8]
            pairs = zip(_answers(source, part, new), _answers(padded, part, new), strict=True)
            rows += [
                {"case": "tokens", "prompt": first + i, "equal": _common(a, b), "of": new}
                for i, (a, b) in enumerate(pairs)
            ]
            report(f"greedy answers compared: {len(rows)}/{prompts}")
        rows += _step_rows(padded, out, like, turns, report)
    return new_result("make-model", rows, claims, load_before)


def _step_rows(padded: Engine, out: Path, like: str, turns: int, report: Report) -> list[dict[str, Any]]:
    """Step times of both models in turn."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), like, out)
        with _engine(folder) as random:
            systems = {"padded": padded, "random": random}
            for turn in range(-1, turns):  # the first turn warms up
                for batch in (1, 8):
                    times = {name: _step_ms(engine, batch) for name, engine in systems.items()}
                    fresh = [
                        {"case": "step", "system": n, "batch": batch, "turn": turn, "ms": ms} for n, ms in times.items()
                    ]
                    rows += fresh if turn >= 0 else []
                report(f"step times: {turn + 1}/{turns}")
    return rows


def claims(rows: Rows) -> dict[str, float]:
    """Share of identical answers, and the step cost over the random model's."""
    answers = [row for row in rows if row["case"] == "tokens"]
    found = {"identical_answers_rate": sum(row["equal"] == row["of"] for row in answers) / len(answers)}
    for batch in sorted({row["batch"] for row in rows if row["case"] == "step"}):
        ms = {
            name: statistics.median(
                r["ms"] for r in rows if r["case"] == "step" and (r["system"], r["batch"]) == (name, batch)
            )
            for name in ("padded", "random")
        }
        found[f"step_cost_vs_random_b{batch}"] = ms["padded"] / ms["random"]
    return {name: round(value, 4) for name, value in found.items()}


@contextlib.contextmanager
def _engine(model: str) -> Iterator[Engine]:
    from headrace.compose import build_engine

    limits = Limits(max_sequences=64)
    engine = build_engine(
        EngineConfig(model=model, prefix_cache=False, kv_gib=0.5, max_context=512, limits=limits), progress=False
    )
    try:
        yield engine
    finally:
        engine.close()


def _answers(engine: Engine, prompts: Sequence[Sequence[int]], new: int, temperature: float = 0.0) -> list[list[int]]:
    """Tokens of every prompt's answer, all in flight at once."""
    answers: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, seed=number, max_tokens=new, ignore_eos=True)
        engine.add(Request(str(number), tuple(prompt), params))
        answers[str(number)] = []
    while engine.busy:
        for delta in engine.step():
            answers[delta.request_id] += delta.tokens
    return list(answers.values())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = zip(one, other, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one))


def _step_ms(engine: Engine, batch: int, steps: int = 8) -> float:
    """Median time of the forward pass in decode steps of ``batch`` sequences."""
    for number in range(batch):
        prompt = tuple(5 + (number * 7 + i) % 1000 for i in range(32))
        engine.add(
            Request(f"step-{number}", prompt, SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True))
        )
    times = []
    while engine.busy:
        engine.step()
        times.append(engine.stats().forward_ms)
    return statistics.median(times[1:])


def write_random(folder: Path, like: str, tokenizer: Path, *, dtype: str = "bfloat16", seed: int = 0) -> None:
    """Write a Llama of the shape named ``like`` with random weights and the tokenizer of the folder ``tokenizer``."""
    shape = shape_named(like)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tokenizer / name, folder / name)
    settings = json.loads((tokenizer / "config.json").read_text(encoding="utf-8")) | shape.config()
    write_checkpoint(folder, {**settings, "rms_norm_eps": 1e-5, "dtype": dtype}, _random_tensors(shape, dtype, seed))


def _random_tensors(shape: Shape, dtype: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    width, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    linears = {
        "self_attn.q": (queries, width), "self_attn.k": (keys, width), "self_attn.v": (keys, width), "self_attn.o": (width, queries),
        "mlp.gate": (inner, width), "mlp.up": (inner, width), "mlp.down": (width, inner),
    }  # fmt: skip

    def random(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(getattr(torch, dtype))

    yield "model.embed_tokens.weight", random(shape.vocab_size, width)
    if not shape.tie_word_embeddings:
        yield "lm_head.weight", random(shape.vocab_size, width)
    yield "model.norm.weight", torch.ones(width)
    for index in range(shape.num_hidden_layers):
        name = f"model.layers.{index}."
        for part, size in linears.items():
            yield f"{name}{part}_proj.weight", random(*size)
        yield f"{name}input_layernorm.weight", torch.ones(width)
        yield f"{name}post_attention_layernorm.weight", torch.ones(width)
