"""Text written by an exported model, for distillation and for the model card."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from .data import Reader


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """(model, tokenizer) of an exported folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.eval()
    if torch.cuda.is_available():
        model.to("cuda")
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def continue_rows(model: Any, rows: torch.Tensor, tokens: int, temperature: float) -> torch.Tensor:
    """`rows` [B, P] of equal length with `tokens` more tokens each; end tokens do not stop a row. 0 means greedy."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    made: torch.Tensor = model.generate(
        rows.to(model.device),
        attention_mask=torch.ones_like(rows, device=model.device),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=1,
        **sampling,
    )
    return made.cpu()


def write_generated(folder: Path, work: Path, plan: dict[str, Any], seed: int) -> NDArray[np.uint16]:
    """One stream of the model's own continuations of training prompts, `generate_minutes` long.

    `plan` holds `mix` (shares of the prompt sources), `prompt_tokens`, `new_tokens`, `rows`, `temperatures`.
    """
    torch.manual_seed(seed)
    model, _ = load(folder)
    reader = Reader(work, seed + 1)
    end = time.time() + 60.0 * float(plan["generate_minutes"])
    parts: list[NDArray[np.uint16]] = []
    while not parts or time.time() < end:
        temperature = plan["temperatures"][len(parts) % len(plan["temperatures"])]
        rows = reader.batch(plan["mix"], plan["rows"], plan["prompt_tokens"])[:, :-1]
        made = continue_rows(model, rows, plan["new_tokens"], temperature)
        parts.append(made.numpy().astype(np.uint16).ravel())
        print(f"generated {sum(map(len, parts)):,} tokens, {end - time.time():.0f} s left", flush=True)
    return np.concatenate(parts)


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """The text the model adds to `prompt` (already rendered); stops at its end tokens."""
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer(prompt).input_ids], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **sampling)
    text: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text
