"""Train the model: python -m recipes.retrieval.train --out FOLDER [--minutes 25] [--threads 1]."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from recipes.bundled.optim import OptimConfig, build_optimizers, rate_factor, set_rates
from recipes.retrieval.data import IGNORED, batches
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.bench.pqcache.tasks import Language, synthetic

VOCABULARY = 512
THETA = 1e6
OPTIM = OptimConfig(
    muon_rate=0.02,
    adam_rate=0.003,
    warmup_steps=50,
    decay_begin=0.6,
    final_rate=0.05,
    weight_decay=0.0,
    clip=1.0,
    z_loss=0.0,
)

STAGES = (
    (0.0, 128, 2048, 0.6),
    (0.3, 256, 2048, 0.3),
    (0.55, 512, 4096, 0.2),
    (0.75, 1024, 4096, 0.1),
)
"""From this share of the time on: tokens of a row and of a step, and the share of rows that repeat themselves."""

BACK = (1, 2, 1, 2)
BACK_PAIRS, BACK_WEIGHT = 8, 12.0
"""How many tokens back each head of the first layer looks at the start, over how many rotary pairs, and how sharply."""


def config() -> LlamaConfig:
    """Three layers of 4 query heads on 2 KV heads, with rotary frequencies slow enough for contents to be compared far apart."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=None,
        pad_token_id=None, tie_word_embeddings=True, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )  # fmt: skip


def look_back(attention: Any, theta: float) -> None:
    """Set the biases of a layer's queries and keys so that head h attends BACK[h] tokens back.

    Heads that look one token back are what induction waits for; found by gradient alone they take most of the training.
    A key's bias, turned by its place, meets a query's, turned by its own and back by as many tokens.
    """
    size = attention.head_dim
    pairs = torch.arange(BACK_PAIRS)
    angles = theta ** (-2.0 * pairs / size)
    length = (BACK_WEIGHT / BACK_PAIRS * size**0.5) ** 0.5
    with torch.no_grad():
        for head in range(attention.config.num_key_value_heads):
            attention.k_proj.bias[head * size + pairs] = length
        for head, back in enumerate(BACK):
            attention.q_proj.bias[head * size + pairs] = length * torch.cos(back * angles)
            attention.q_proj.bias[head * size + size // 2 + pairs] = -length * torch.sin(back * angles)


def main() -> None:
    """Train for a time of this process's own, whatever else the machine does meanwhile, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    model = LlamaForCausalLM(config()).train()
    look_back(model.model.layers[0].self_attn, THETA)
    state = train(model, synthetic(VOCABULARY), minutes=given.minutes, seed=given.seed, out=given.out)
    save(model, given.out, state | {"threads": given.threads})


def train(model: Any, language: Language, *, minutes: float, seed: int, out: Path) -> dict[str, float]:
    """Train in place; says every fifty steps how far it is, and keeps a checkpoint."""
    optimizers = build_optimizers(model, OPTIM)
    start, step, stage, source = time.process_time(), 0, -1, None
    right = total = 0
    while True:
        spent = time.process_time() - start
        progress = spent / 60.0 / minutes
        if progress >= 1.0:
            break
        due = max(i for i, (begin, _, _, _) in enumerate(STAGES) if progress >= begin)
        if due != stage or source is None:
            stage, (_, length, tokens, copying) = due, STAGES[due]
            source = batches(language, length, tokens // length, copying, seed)
        ids, labels = next(source)
        known = labels != IGNORED
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(ids).last_hidden_state[known]
            logits = model.lm_head(hidden)
        wanted = labels[known]
        loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        set_rates(optimizers, OPTIM, rate_factor(OPTIM, step, progress))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        right, total, step = right + int((logits.argmax(-1) == wanted).sum()), total + len(wanted), step + 1
        if step % 50 == 0:
            print(
                f"{spent / 60:.1f} min, step {step}, length {length}, loss {loss.item():.3f}, right {right / total:.3f}",
                flush=True,
            )
            right = total = 0
            if step % 250 == 0:
                save(model, out, {"minutes": spent / 60, "steps": step})
    return {"minutes": spent / 60, "steps": step}


def save(model: Any, out: Path, state: dict[str, float]) -> None:
    """``config.json`` and ``model.safetensors`` in bfloat16, which transformers loads, and ``training.json``."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(state, indent=1) + "\n")


if __name__ == "__main__":
    main()
