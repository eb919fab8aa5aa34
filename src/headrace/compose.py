"""The one place that knows every part: builds an engine, or the service around one, from a configuration."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidRequest
from headrace.core.policy import DraftingPolicy, Policy
from headrace.core.request import Request, SamplingParams
from headrace.engine.process.service import ProcessService

if TYPE_CHECKING:
    from headrace.core.protocols import ModelCard, Quality, Runner
    from headrace.engine.drafting import Drafting
    from headrace.engine.engine import Engine
    from headrace.models.cache.slots import SlotPool
    from headrace.models.loaded import LoadedModel
    from headrace.models.parallel.ranks import Lost, Ranks
    from headrace.models.quality import Reading
    from headrace.sparse.serving import SlotRetriever

log = logging.getLogger(__name__)


def build_engine(config: EngineConfig, *, progress: bool = True, on_rank_lost: Lost | None = None) -> Engine:
    """Load the model and build an engine in this process, warmed up; with ``tp`` above 1 the rest of it in processes of its own.

    Args:
        on_rank_lost: called in a thread of its own when one of those processes ends unasked; else the next step raises.

    Raises:
        HeadraceError: an option is wrong, the checkpoint is missing, broken or unsupported, or memory is too small.
    """
    import torch

    from headrace.models.cache.planes import is_int8
    from headrace.models.fused.quantise import check_method
    from headrace.models.load import load

    _check_draft(config)  # wrong names shall not cost a load
    check_method(config.quantize)
    is_int8(config.kv_cache_dtype)
    threads = config.threads or default_threads()
    options: dict[str, Any] = {
        "name": config.model,
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "max_context": config.max_context,
    }
    if config.tp > 1:
        from headrace.models.parallel.start import load_share, start_ranks

        ranks = start_ranks(config, options, _runner_options(config), threads, on_rank_lost)
        with ranks.starting():
            return engine_around(load_share(ranks, config, options, progress=progress), config, ranks)
    torch.set_num_threads(threads)
    return engine_around(load(**options, device=config.device, progress=progress), config)


def engine_around(model: LoadedModel, config: EngineConfig, ranks: Ranks | None = None) -> Engine:
    """An engine over a model that is in memory already (rank 0's share where there are others), warmed up.

    Raises as :func:`build_engine`.
    """
    from headrace.engine.engine import Engine
    from headrace.engine.kv import KVSpace
    from headrace.engine.profiled import attach_profile
    from headrace.engine.sampling.sampler import TorchSampler
    from headrace.engine.structured.grammar import GrammarCompiler
    from headrace.models.budget import kv_slots
    from headrace.models.cache.slots import SlotPool
    from headrace.models.fused.linear import choose_linears
    from headrace.models.runner import ModelRunner

    before = None if ranks else _before_quantising(model, config)
    retriever = None
    if ranks and config.kv == "pq":
        raise InvalidRequest("kv is read whole by several ranks: leave --kv out, or --tp", field="kv")
    choose_linears(model, config.linears, config.quantize)
    context = longest_context(config, model.card)
    if ranks is None:
        pool = SlotPool(kv_slots(model, config.kv_gib, context, config.kv_cache_dtype))
        retriever = _retriever(model, pool, config)
        runner: Runner = ModelRunner(model, pool, **_runner_options(config), retriever=retriever)
    else:
        from headrace.models.parallel.room import shared_slots
        from headrace.models.parallel.runner import ParallelRunner

        pool = SlotPool(shared_slots(model, ranks.group, config.kv_gib, config.max_context, config.kv_cache_dtype))
        runner = ParallelRunner(ModelRunner(model, pool, **_runner_options(config)), ranks)
    card = replace(
        model.card,
        name=config.served_name or model.card.name,
        context=min(context, pool.size),
        quantization=config.quantize or model.card.quantization,
        kv_cache_dtype=model.card.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        quality=None if before is None else _cost_of_quantising(before, runner, pool),
    )
    warm_up(Engine(runner, KVSpace(pool, prefix_cache=False), get_policy("chunked"), TorchSampler(), card))
    policy = get_policy(config.policy)
    engine = Engine(
        runner,
        KVSpace(pool, prefix_cache=config.prefix_cache),
        policy,
        TorchSampler(),
        card,
        limits=config.limits,
        grammars=GrammarCompiler(model.path, runner.vocab_size, card.stop_ids),
        drafting=_drafting(model, config, pool.size) if isinstance(policy, DraftingPolicy) else None,
        kv=None if retriever is None else config.retrieval,
    )
    attach_profile(engine, config)
    return engine


def get_policy(name: str) -> Policy:
    """A new instance of the policy called ``name``, of those that speculate or of the others.

    Raises:
        InvalidRequest: there is none; the message names the choices.
    """
    from headrace.engine.policies import POLICIES
    from headrace.speculation.policies import POLICIES as SPECULATING

    made = POLICIES.get(name) or SPECULATING.get(name)
    if made is None:
        known = ", ".join(sorted({*POLICIES, *SPECULATING}))
        raise InvalidRequest(f"policy is {name!r}: choose one of {known}", field="policy")
    return made()


def _check_draft(config: EngineConfig) -> None:
    """Refuses an unknown policy, and drafts for one that has no use for them."""
    if isinstance(get_policy(config.policy), DraftingPolicy) or config.draft in ("auto", "off"):
        return
    raise InvalidRequest(
        f"draft is {config.draft!r}, but the policy {config.policy} drafts nothing: leave it away, or choose a policy that "
        "speculates, such as adaserve",
        field="draft",
    )


def _drafting(model: LoadedModel, config: EngineConfig, slots: int) -> Drafting | None:
    """What the engine drafts with, measured a little; None without drafters."""
    from headrace.engine.drafting import Drafting
    from headrace.speculation.build import build_drafters, measure
    from headrace.speculation.calibration import OnlineCalibration
    from headrace.speculation.costs import DraftTimes

    drafters = build_drafters(
        config.draft, config.model, model, slots=slots, attention=config.attention, linears=config.linears
    )
    if not drafters:
        return None
    costs = DraftTimes()
    measure(drafters, costs, model.card.vocab_size)
    return Drafting(drafters, OnlineCalibration(), costs)


def _retriever(model: LoadedModel, pool: SlotPool, config: EngineConfig) -> SlotRetriever | None:
    """What reads a share of long contexts; None where it cannot run.

    Raises:
        InvalidRequest: it cannot run, and the configuration insists on it.
    """
    import torch

    from headrace.models import families
    from headrace.models.cache.planes import is_int8
    from headrace.sparse import sketch
    from headrace.sparse.serving import ServingSettings, SlotRetriever

    settings = ServingSettings()
    depth, heads, size = families.kv_shape(model.config)
    stored = torch.int8 if is_int8(config.kv_cache_dtype) else model.dtype
    problem = ""
    if size % settings.codes.subspaces:
        problem = f"the head size {size} is odd"
    elif getattr(model.config, "attn_logit_softcapping", None) or model.config.model_type == "gpt_oss":
        problem = "its attention caps scores or has sinks"
    elif torch.device(model.device).type != "cpu":
        problem = "K and V are on a GPU; headrace.sparse.PQCache takes them with transformers' generate"
    elif not sketch.usable(settings.codes, stored, torch.device("cpu")):
        problem = "it needs a C++ compiler, and K and V in float32, bfloat16 or int8"
    if not problem:
        return SlotRetriever(pool, depth, heads, size, settings)
    if config.kv == "pq":
        raise InvalidRequest(f"kv is 'pq', which cannot run here ({problem}): leave it out, or give auto", field="kv")
    log.info("contexts are always read whole: %s", problem)
    return None


def _runner_options(config: EngineConfig) -> dict[str, Any]:
    """What every rank's runner is built with."""
    return {
        "attention": config.attention,
        "kv_cache_dtype": config.kv_cache_dtype,
        "graphs": not config.enforce_eager,
    }


def _before_quantising(model: LoadedModel, config: EngineConfig) -> Reading | None:
    """How the model reads the built-in text now, if it is to be quantised: what it is compared with afterwards."""
    from headrace.models import quality

    if config.quantize is None and config.kv_cache_dtype == "auto":
        return None
    limit = longest_context(config, model.card)
    ids = quality.sample(model.path, limit=limit, trust_remote_code=config.trust_remote_code)
    return quality.read_model(model, ids, attention=config.attention) if len(ids) > 1 else None


def _cost_of_quantising(before: Reading, runner: Runner, pool: SlotPool) -> Quality:
    from headrace.models import quality

    found = quality.compare(before, quality.read(runner, pool, before.ids))
    log.info("quantised: %s", found)
    return found


def build_service(config: EngineConfig) -> ProcessService:
    """An engine in its own process; ``await service.start()`` loads it."""
    return ProcessService(run_engine_process, (config,), max_queue=config.max_queue)


def run_engine_process(connection: Connection, config: EngineConfig) -> None:
    """Entry point of the engine's process."""
    from headrace.engine.process.worker import run_worker

    run_worker(connection, partial(build_engine, config, on_rank_lost=_end_process))


def _end_process(loss: str) -> None:
    """End the engine's process, whatever its main thread is waiting for: the service starts another."""
    print(f"headrace: {loss}", file=sys.stderr, flush=True)
    os._exit(1)


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
