"""``LLM(model).generate(prompts, SamplingParams(...))``: the engine without a server."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from headrace.core.config import EngineConfig
from headrace.core.errors import EngineUnavailable
from headrace.core.request import SLO, Request, SamplingParams
from headrace.llm.job import Job
from headrace.llm.outputs import RequestOutput
from headrace.llm.prompts import Prompt, as_list, naming, per_prompt, text_and_ids

if TYPE_CHECKING:
    from tqdm import tqdm

    from headrace.engine.engine import Engine
    from headrace.models.text.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]


class LLM:
    """A model and its engine in this process. A context manager; not thread-safe.

    Args:
        model: a local folder, a hub name, or "bundled" for the model that ships with headrace.
        engine_options: fields of :class:`headrace.core.config.EngineConfig` (``dtype=``, ``kv_gib=``, ``policy=``, ...) and of
            its :class:`headrace.core.policy.Limits` (``max_sequences=``, ``max_step_tokens=``).

    Raises:
        HeadraceError: an option is unknown or out of range, or the model cannot be loaded; the message names the remedy.
    """

    def __init__(self, model: str = "bundled", **engine_options: Any) -> None:
        from headrace.compose import build_engine
        from headrace.models.text.tokenizer import Tokenizer

        config = EngineConfig.from_options(model=model, **engine_options)
        engine = build_engine(config)
        self._engine: Engine | None = engine
        self.tokenizer: Tokenizer = Tokenizer(engine.card.path, trust_remote_code=config.trust_remote_code)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        slo: SLO | Sequence[SLO] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt, batched as the engine sees fit.

        Args:
            prompts: one or many of: text, a list of token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``.
            sampling_params: for all prompts, or one per prompt; the defaults when left out.
            slo: latency targets, for all or one per prompt; measured and reported in ``metrics``.
            use_tqdm: show progress and speed on stderr.

        Returns:
            One :class:`RequestOutput` per prompt, in their order.

        Raises:
            InvalidRequest: a prompt cannot be served; its place in the list is named, and nothing has been run.
            EngineUnavailable: the object has been closed.
        """
        if self._engine is None:
            raise EngineUnavailable("this LLM has been closed: make another")
        listed = as_list(prompts)
        params = per_prompt(sampling_params, SamplingParams(), len(listed), "sampling_params")
        targets = per_prompt(slo, SLO(), len(listed), "slo")
        jobs: list[Job] = []
        for place, (prompt, wanted, target) in enumerate(zip(listed, params, targets, strict=True)):
            with naming(place, len(listed)):
                text, ids = text_and_ids(prompt)
                tokens = tuple(self.tokenizer.encode(text or "") if ids is None else ids)
                request = Request(f"llm-{next(self._numbers)}", tokens, wanted, slo=target)
                jobs.append(Job(request, text, self.tokenizer))
        return _run(self._engine, jobs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        slo: SLO | Sequence[SLO] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """As :meth:`generate`, for one conversation or a list of them, through the model's chat template.

        Raises:
            InvalidRequest: the model has no chat template, or a message does not fit it.
        """
        many = bool(messages) and not isinstance(messages[0], Mapping)
        talks: list[Any] = list(messages) if many else [messages]
        prompts: list[Prompt] = []
        for place, talk in enumerate(talks):
            with naming(place, len(talks)):
                prompts.append({"prompt_token_ids": self.tokenizer.chat(talk)})
        return self.generate(prompts, sampling_params, slo=slo, use_tqdm=use_tqdm)

    def close(self) -> None:
        """Abort what is open and let go of the model; the object cannot generate afterwards."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(engine: Engine, jobs: list[Job], use_tqdm: bool) -> list[RequestOutput]:
    """Queue all jobs and step until none is open; whatever interrupts leaves the engine empty."""
    from tqdm import tqdm

    open_jobs = {job.request.id: (place, job) for place, job in enumerate(jobs)}
    try:
        for place, job in enumerate(jobs):
            with naming(place, len(jobs)):
                engine.add(job.request)
        with tqdm(total=len(jobs), unit="prompt", disable=not use_tqdm) as bar:
            generated = 0
            while open_jobs:
                for delta in engine.step():
                    if delta.request_id not in open_jobs:
                        continue  # the abort that answers a cancel
                    generated += len(delta.tokens)
                    place, job = open_jobs[delta.request_id]
                    with naming(place, len(jobs)):
                        if job.take(delta):
                            engine.cancel(delta.request_id, delta.index)
                    if job.done:
                        del open_jobs[delta.request_id]
                        bar.update()
                _show_speed(bar, generated)
    finally:
        for request_id in open_jobs:
            engine.cancel(request_id)
        if open_jobs:
            engine.step()  # hands out the aborts, so that the next call starts clean
    return [job.output() for job in jobs]


def _show_speed(bar: tqdm[None], generated: int) -> None:
    elapsed = bar.format_dict["elapsed"]
    if elapsed:
        bar.set_postfix_str(f"{generated / elapsed:.0f} tok/s", refresh=False)
