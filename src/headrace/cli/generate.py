"""``headrace generate``: answers from a model in this process, without a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import options
from headrace.core.errors import InvalidRequest
from headrace.core.request import SamplingParams, Structure

if TYPE_CHECKING:
    from headrace.llm import LLM, RequestOutput


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="Folder, hub name, or bundled.")] = "bundled",
    file: Annotated[Path | None, typer.Option(help="Read more prompts from FILE, one a line (- is the input).")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Use the chat template; by default when the model has one.", show_default=False
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, with the chat template.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object per prompt, for machines.")] = False,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 1.0,
    n: options.Answers = 1,
    seed: options.Seed = None,
    stop: options.Stop = None,
    json_schema: options.JsonSchema = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    linears: options.Linears = "auto",
    quantize: options.Quantize = None,
    kv_gib: options.KvGib = None,
    kv_cache_dtype: options.KvCacheDtype = "auto",
    max_context: options.MaxContext = None,
    tp: options.Tp = 1,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Generate text without a server: answers go to the output, progress to the error stream."""
    if system is not None and chat is False:
        raise InvalidRequest("--system needs the chat template: leave out --no-chat", field="system")
    texts = _read_prompts(prompts or [], file)
    params = SamplingParams(
        n=n,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        stop=tuple(stop or ()),
        structure=None if json_schema is None else _structure(json_schema),
    )
    from headrace.llm import LLM

    with LLM(
        model,
        dtype=dtype,
        device=device,
        attention=attention,
        linears=linears,
        quantize=quantize,
        kv_gib=kv_gib,
        kv_cache_dtype=kv_cache_dtype,
        max_context=max_context,
        tp=tp,
        threads=threads,
        trust_remote_code=trust_remote_code,
    ) as llm:
        results = _answer(llm, texts, params, chat, system)
    for text, result in zip(texts, results, strict=True):
        if json_lines:
            print(json.dumps(_as_json(text, result), ensure_ascii=False))
        else:
            _print(text, result, alone=len(texts) == 1)


def _read_prompts(given: list[str], file: Path | None) -> list[str]:
    if file is not None:
        given = given + [line for line in options.read_text(file, "--file").splitlines() if line.strip()]
    if not given:
        raise InvalidRequest("no prompt: give one in quotes, or --file FILE with one a line", field="prompts")
    return given


def _structure(path: Path) -> Structure:
    schema = options.read_text(path, "--json-schema")
    try:
        json.loads(schema)
    except ValueError as error:
        raise InvalidRequest(f"--json-schema {path} is no JSON: {error}", field="json_schema") from error
    return Structure("json_schema", schema)


def _answer(
    llm: LLM, texts: list[str], params: SamplingParams, chat: bool | None, system: str | None
) -> list[RequestOutput]:
    shown = sys.stderr.isatty()
    if chat is False or (chat is None and system is None and not llm.tokenizer.hf.chat_template):
        return llm.generate(texts, params, use_tqdm=shown)
    opening = [{"role": "system", "content": system}] if system else []
    return llm.chat([[*opening, {"role": "user", "content": text}] for text in texts], params, use_tqdm=shown)


def _print(text: str, result: RequestOutput, *, alone: bool) -> None:
    """An answer for people: under its prompt when there are several, with a number when a prompt has several."""
    if not alone:
        print(f"── {text}")
    for answer in result.outputs:
        number = f"[{answer.index + 1}] " if len(result.outputs) > 1 else ""
        print(f"{number}{answer.text.strip()}")
        if answer.finish_reason == "length" and sys.stderr.isatty():
            print("(cut at --max-tokens)", file=sys.stderr)
    if not alone:
        print()


def _as_json(text: str, result: RequestOutput) -> dict[str, Any]:
    return {
        "prompt": text,
        "prompt_tokens": len(result.prompt_token_ids),
        "outputs": [
            {
                "index": answer.index,
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for answer in result.outputs
        ],
        "ttft_ms": result.metrics.ttft_ms,
        "tpot_ms": result.metrics.tpot_ms,
    }
