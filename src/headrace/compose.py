"""The one place that knows every part: builds an engine, or the service around one, from a configuration."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidRequest
from headrace.core.request import Request, SamplingParams
from headrace.engine.service import ProcessService

if TYPE_CHECKING:
    from headrace.core.protocols import ModelCard
    from headrace.engine.engine import Engine
    from headrace.models.loaded import LoadedModel


def build_engine(config: EngineConfig, *, progress: bool = True) -> Engine:
    """Load the model and build an engine in this process, warmed up.

    Raises:
        HeadraceError: an option is wrong, the checkpoint is missing, broken or unsupported, or memory is too small.
    """
    import torch

    from headrace.engine.policies import get_policy
    from headrace.models.load import load

    get_policy(config.policy)  # a wrong name shall not cost a load
    torch.set_num_threads(config.threads or default_threads())
    model = load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
        max_context=config.max_context,
    )
    return engine_around(model, config)


def engine_around(model: LoadedModel, config: EngineConfig) -> Engine:
    """An engine over a model that is in memory already, warmed up; raises as :func:`build_engine`."""
    from headrace.engine.engine import Engine
    from headrace.engine.grammar import GrammarCompiler
    from headrace.engine.kv import KVSpace
    from headrace.engine.policies import get_policy
    from headrace.engine.sampling import TorchSampler
    from headrace.models.budget import kv_slots
    from headrace.models.linear import choose_linears
    from headrace.models.runner import ModelRunner
    from headrace.models.slots import SlotPool

    choose_linears(model, config.linears)
    context = longest_context(config, model.card)
    pool = SlotPool(kv_slots(model, config.kv_gib, context, config.kv_cache_dtype))
    runner = ModelRunner(model, pool, attention=config.attention, kv_cache_dtype=config.kv_cache_dtype)
    card = replace(model.card, name=config.served_name or model.card.name, context=min(context, pool.size))
    warm_up(Engine(runner, KVSpace(pool, prefix_cache=False), get_policy("chunked"), TorchSampler(), card))
    return Engine(
        runner,
        KVSpace(pool, prefix_cache=config.prefix_cache),
        get_policy(config.policy),
        TorchSampler(),
        card,
        limits=config.limits,
        grammars=GrammarCompiler(model.path, runner.vocab_size, card.stop_ids),
    )


def build_service(config: EngineConfig) -> ProcessService:
    """An engine in its own process; ``await service.start()`` loads it."""
    return ProcessService(run_engine_process, (config,), max_queue=config.max_queue)


def run_engine_process(connection: Connection, config: EngineConfig) -> None:
    """Entry point of the engine's process."""
    from headrace.engine.worker import run_worker

    run_worker(connection, partial(build_engine, config))


def default_threads() -> int:
    """``OMP_NUM_THREADS`` where it is set, as torch itself would have it; else the CPU cores this process may use."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdecimal() and int(stated) > 0:
        return int(stated)
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def longest_context(config: EngineConfig, card: ModelCard) -> int:
    """Longest prompt plus output in tokens: the model's own, or less where the configuration says so."""
    if config.max_context is None:
        return card.context
    if config.max_context > card.context:
        raise InvalidRequest(
            f"max_context is {config.max_context}, but {card.name} was made for {card.context} tokens: lower it",
            field="max_context",
        )
    return config.max_context


def warm_up(engine: Engine) -> None:
    """Run a prompt and a few tokens, so that kernels compile and buffers exist before the first request."""
    length = max(1, min(24, engine.card.context - 3))
    new = max(1, min(3, engine.card.context - length))
    sampled = SamplingParams(max_tokens=new, temperature=1.0, top_p=0.9, seed=0, ignore_eos=True)
    for number, params in enumerate((sampled.with_(temperature=0.0), sampled)):
        engine.add(Request(f"warm-up-{number}", tuple([number % engine.card.vocab_size] * length), params))
    while engine.busy:
        engine.step()
