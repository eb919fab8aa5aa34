"""Measure an exported pair: held-out bits per byte, how often the draft is right, and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data import stream_report
from .generate import answer, continue_rows, load
from .tokenizer import render

WINDOW = 512  # tokens of context when bits per byte are measured
PROMPT, MADE = 64, 128  # tokens of a held-out prompt and of the target's continuation of it

PROMPTS: tuple[tuple[str, str], ...] = (
    ("text", "It was late in the evening when she opened the letter, and"),
    ("text", "The law of demand states that"),
    ("text", "def read_lines(path):\n    "),
    ("chat", "Explain: Opportunity cost"),
    ("chat", "Write a Python function named count_words. Return a dictionary of the words in a text and their counts."),
    ("chat", "Tom has 3 boxes with 12 apples in each box. He eats 5 apples. How many apples are left?"),
)


@torch.no_grad()
def stream_nats(model: Any, stream: Tensor, window: int = WINDOW, rows: int = 16) -> float:
    """Sum of the losses in nats of a token stream [N], in windows that each predict all but their first token.

    Windows overlap by one token, so that every token but the stream's first is predicted once.
    """
    total = 0.0
    starts = list(range(0, len(stream) - 1, window))
    whole = [start for start in starts if start + window + 1 <= len(stream)]
    groups = [whole[i : i + rows] for i in range(0, len(whole), rows)]
    pieces = [torch.stack([stream[s : s + window + 1] for s in group]) for group in groups]
    pieces += [stream[s:][None] for s in starts if s + window + 1 > len(stream)]
    for piece in pieces:
        batch = piece.to(model.device)
        logits = model(batch[:, :-1]).logits.float()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return total


def bits_per_byte(model: Any, work: Path) -> dict[str, float]:
    """Held-out bits per byte by source."""
    result = {}
    for name, sizes in stream_report(work).items():
        stream = torch.from_numpy(np.load(work / "streams" / f"{name}.held.npy").astype(np.int64))
        result[name] = stream_nats(model, stream) / math.log(2.0) / sizes["held_bytes"]
    return result


@torch.no_grad()
def acceptance_of(target: Any, draft: Any, prompts: Tensor, tokens: int) -> dict[str, float]:
    """How the draft does on the target's own continuations of `prompts` [B, P].

    `greedy`: share of greedily generated tokens that are also the draft's first choice.
    `sampled`: expected share accepted by rejection sampling at temperature 1, sum over the vocabulary of min(p, q).
    `chain4`: mean number of greedy tokens accepted of a chain of four drafted ones (the run of equal choices from
    a position, cut at four), over all positions: what a chain drafter of depth four would gain a step.
    """
    made = continue_rows(target, prompts, tokens, 0.0)
    span = slice(prompts.shape[1] - 1, -1)
    wanted = made[:, prompts.shape[1] :]
    equal = draft(made.to(draft.device)).logits[:, span].argmax(-1).cpu() == wanted
    runs = torch.zeros(equal.shape[0])
    count, summed = 0, 0.0
    for start in range(equal.shape[1] - 4):
        runs = equal[:, start : start + 4].int().cumprod(1).sum(1).float()
        summed, count = summed + float(runs.sum()), count + len(runs)
    drawn = continue_rows(target, prompts, tokens, 1.0)
    theirs = torch.softmax(target(drawn.to(target.device)).logits[:, span].float(), -1)
    ours = torch.softmax(draft(drawn.to(draft.device)).logits[:, span].float(), -1)
    sampled = float(torch.minimum(theirs, ours).sum(-1).mean())
    return {"greedy": float(equal.float().mean()), "sampled": sampled, "chain4": summed / max(1, count)}


def acceptance(target: Any, draft: Any, work: Path, rows: int = 24) -> dict[str, dict[str, float]]:
    """`acceptance_of` by source of the prompts (held-out windows) and their mean under "all"."""
    result: dict[str, dict[str, float]] = {}
    for name in stream_report(work):
        stream = torch.from_numpy(np.load(work / "streams" / f"{name}.held.npy").astype(np.int64))
        if len(stream) <= PROMPT:
            continue
        starts = torch.linspace(0, len(stream) - PROMPT - 1, rows).long()
        prompts = torch.stack([stream[s : s + PROMPT] for s in starts.tolist()])
        result[name] = acceptance_of(target, draft, prompts, MADE)
    parts = list(result.values())
    result["all"] = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
    return result


def samples(target: Any, tokenizer: Any, prompts: Sequence[tuple[str, str]] = PROMPTS) -> list[dict[str, str]]:
    """Completions at temperature 0.6 with a fixed seed, one try each."""
    made = []
    for kind, prompt in prompts:
        text = prompt if kind == "text" else render([("user", prompt)]) + "<|assistant|>\n"
        made.append({"kind": kind, "prompt": prompt, "answer": answer(target, tokenizer, text, 140, 0.6)})
    return made


def evaluate(folder: Path, work: Path) -> dict[str, Any]:
    """Every number of the model card for the pair in `folder`."""
    torch.manual_seed(0)
    target, tokenizer = load(folder / "target")
    draft, _ = load(folder / "draft")
    runs = {}
    for name in ("target", "draft"):
        saved = torch.load(work / f"{name}.pt", map_location="cpu", weights_only=False)
        runs[name] = {"steps": saved["step"], "tokens": saved["seen"], "minutes": saved["spent"] / 60.0}
    return {
        "runs": runs,
        "bits_per_byte": {"target": bits_per_byte(target, work), "draft": bits_per_byte(draft, work)},
        "acceptance": acceptance(target, draft, work),
        "samples": samples(target, tokenizer),
    }
