"""The quality half of ``headrace bench pqcache``: what reading a share of the tokens costs in attention, likelihood and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.bench.pqcache.analytic import analytic_model
from headrace.bench.pqcache.drift import drift_rows
from headrace.bench.pqcache.forced import forced_rows
from headrace.bench.pqcache.methods import BASELINES, PQ_LARGE, PQ_RESIDUAL, PQ_SMALL, Method, read
from headrace.bench.pqcache.recorded import recorded_rows
from headrace.bench.pqcache.taskrows import Exam, task_rows
from headrace.bench.pqcache.tasks import Language, Shape, of_tokenizer, synthetic
from headrace.bench.pqcache.texts import answered, held_out, shifted, two_texts

TRAINED = Path(__file__).parent / "retrieval"
"""Where ``recipes/retrieval`` writes its checkpoint for the benchmark to find."""

VOCABULARY = 1024
FIVE = ("needle", "multikey", "pairs", "variables", "moved")
RULES = (None, 0.25, 1.0)
UNFORCED = ("sparq 1", "infllm", "pyramidkv")
"""Methods that are left out where every token takes a step of the whole model."""

Progress = Callable[[str], None]
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        analytic, worded, long, trained: exams of the analytic model, of the same over the bundled tokenizer's words, of its long
            answers, and of the trained model.
        budgets: shares of the context.
        windows, context, prompt: held-out texts, their tokens, and how many of them are the prompt.
        drift: tokens of prompt and answer.
        selectors: methods that PQ is compared with.
    """

    analytic: tuple[Exam, ...]
    worded: tuple[Exam, ...]
    long: tuple[Exam, ...]
    trained: tuple[Exam, ...]
    budgets: tuple[float, ...]
    windows: int
    context: int
    prompt: int
    drift: tuple[int, int]
    selectors: tuple[Method, ...]


FULL = Plan(
    analytic=(
        Exam(FIVE, Shape(4096), 2),
        Exam(FIVE, Shape(8192), 1),
        Exam(FIVE, Shape(32768, questions=2), 1),
    ),
    worded=(Exam(("multikey", "moved"), Shape(4096, questions=2), 1),),
    long=(Exam(("passages",), Shape(8192, value=512, questions=1), 2),),
    trained=(Exam(FIVE, Shape(1024, value=6, hops=3, spacing=32), 2),),
    budgets=(0.2, 0.1, 0.05),
    windows=5,
    context=1536,
    prompt=1152,
    drift=(4096, 4096),
    selectors=BASELINES,
)
QUICK = Plan(
    analytic=(Exam(FIVE, Shape(4096, questions=2), 1),),
    worded=(),
    long=(),
    trained=(Exam(FIVE, Shape(1024, value=6, hops=3, spacing=32, questions=2), 1),),
    budgets=(0.2, 0.1),
    windows=2,
    context=1216,
    prompt=1152,
    drift=(2048, 2048),
    selectors=tuple(method for method in BASELINES if method.name in ("snapkv", "quest")),
)


def quality_rows(quick: bool, progress: Progress) -> Rows:
    """Every row of the quality half; see the modules that make them. All models run in float32."""
    plan = QUICK if quick else FULL
    with torch.inference_mode():
        return [
            *_tasks(plan, progress),
            *_bundled(plan, progress),
            *_retrieval(plan, progress),
            *_drift(plan, progress),
        ]


def _methods(plan: Plan) -> tuple[Method, ...]:
    return (PQ_RESIDUAL, PQ_LARGE, PQ_SMALL, *plan.selectors)


def _tasks(plan: Plan, progress: Progress) -> Rows:
    language = synthetic(VOCABULARY)
    model = analytic_model(language, VOCABULARY)
    rows = task_rows("analytic", model, language, plan.analytic, _methods(plan), plan.budgets, progress)
    if plan.worded:
        words, size = bundled_language()
        speaker = analytic_model(words, size)
        rows += task_rows("analytic, words", speaker, words, plan.worded, _methods(plan), plan.budgets, progress)
    return rows + task_rows("analytic", model, language, plan.long, _methods(plan), (0.1,), progress)


def _bundled(plan: Plan, progress: Progress) -> Rows:
    """Attention recorded of the bundled pair on held-out text, and the target's likelihood of it."""
    rows: Rows = []
    for name, known in (("target", "bundled"), ("draft", "bundled-draft")):
        model, tokenizer = _bundled_model(known)
        windows = held_out(tokenizer, plan.context, plan.windows)
        methods = _methods(plan)
        rows += recorded_rows(f"bundled {name}", read(model, windows), methods, plan.budgets, progress)
        if name == "target":
            forced = tuple(method for method in methods if method.name not in UNFORCED)
            rows += forced_rows("bundled target", model, windows, plan.prompt, forced, plan.budgets, progress)
    return rows


def _retrieval(plan: Plan, progress: Progress) -> Rows:
    """The model that ``recipes/retrieval`` trained: its answers, and its attention over contexts with answers."""
    if not (TRAINED / "model.safetensors").is_file():
        progress(f"no model of recipes/retrieval in {TRAINED.name}/: left out")
        return []
    language, model = trained_model()
    rows = task_rows("trained", model, language, plan.trained, _methods(plan), plan.budgets, progress)
    sizes = {"value": 6, "questions": 4, "spacing": 32}
    context = read(model, answered(language, "multikey", 1024, plan.windows, seed=7, **sizes))
    return rows + recorded_rows("trained", context, _methods(plan), plan.budgets, progress)


def _drift(plan: Plan, progress: Progress) -> Rows:
    """Long answers in other words than the prompt's: by the analytic model, and, as far as its context goes, the bundled target."""
    prompt, answer = plan.drift
    language = synthetic(VOCABULARY)
    context = read(analytic_model(language, VOCABULARY), shifted(language, prompt, answer, seed=11))
    rows = drift_rows("analytic", context, prompt, ("2x6", "4x8"), RULES, 0.1, progress)
    model, tokenizer = _bundled_model("bundled")
    context = read(model, two_texts(tokenizer, 512, 1536))
    return rows + drift_rows("bundled target", context, 512, ("2x6", "4x8"), RULES, 0.1, progress)


def bundled_language() -> tuple[Language, int]:
    """The language over the bundled tokenizer's words, and the number of its tokens."""
    from transformers import AutoTokenizer

    from headrace.models.checkpoints.hub import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("bundled"))
    return of_tokenizer(tokenizer), len(tokenizer)


def _bundled_model(known: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from headrace.models.checkpoints.hub import resolve

    path = resolve(known)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    return model, AutoTokenizer.from_pretrained(path)


def trained_model() -> tuple[Any, Any]:
    """The language and the checkpoint of ``recipes/retrieval``, in float32."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(TRAINED, dtype=torch.float32)
    model.eval()
    return synthetic(model.config.vocab_size), model


__all__ = ["FULL", "QUICK", "Plan", "quality_rows", "trained_model"]
