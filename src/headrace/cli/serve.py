"""``headrace serve``: OpenAI's API over one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.cli import options
from headrace.core.errors import EngineUnavailable, InvalidRequest
from headrace.core.request import SLO


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub name, or bundled.")] = "bundled",
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    served_name: options.ServedName = None,
    api_key: options.ApiKey = None,
    api_key_file: options.ApiKeyFile = None,
    tier: options.Tier = None,
    cors_origin: options.CorsOrigin = None,
    chat_template: options.ChatTemplate = None,
    ssl_certfile: options.SslCertfile = None,
    ssl_keyfile: options.SslKeyfile = None,
    drain_timeout: options.DrainTimeout = 30.0,
    log_level: options.LogLevel = "warning",
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    linears: options.Linears = "auto",
    quantize: options.Quantize = None,
    policy: options.PolicyName = "chunked",
    draft: options.Draft = "auto",
    max_sequences: options.MaxSequences = 64,
    max_step_tokens: options.MaxStepTokens = 512,
    max_queue: options.MaxQueue = 256,
    kv_gib: options.KvGib = None,
    kv_cache_dtype: options.KvCacheDtype = "auto",
    kv: options.Kv = "full",
    kv_budget: options.KvBudget = 0.1,
    max_context: options.MaxContext = None,
    prefix_cache: options.PrefixCache = True,
    profile: options.ProfileOption = "auto",
    enforce_eager: options.EnforceEager = False,
    tp: options.Tp = 1,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve MODEL to any OpenAI client. Health answers from the first second on, requests once the model is loaded."""
    from headrace.cli.launch import Launch
    from headrace.core.config import EngineConfig
    from headrace.server import ServerSettings

    config = EngineConfig.from_options(
        model=model,
        served_name=served_name,
        dtype=dtype,
        device=device,
        attention=attention,
        linears=linears,
        quantize=quantize,
        policy=policy,
        draft=draft,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        max_queue=max_queue,
        kv_gib=kv_gib,
        kv_cache_dtype=kv_cache_dtype,
        kv=kv,
        kv_budget=kv_budget,
        max_context=max_context,
        prefix_cache=prefix_cache,
        profile=profile,
        enforce_eager=enforce_eager,
        tp=tp,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )
    settings = ServerSettings(
        api_keys=api_keys(api_key or [], api_key_file),
        tiers=dict(parse_tier(text) for text in tier or ()),
        cors_origins=tuple(cors_origin or ()),
        drain_timeout_s=drain_timeout,
    )
    _start_logging(log_level)
    launch = Launch(config, settings, chat_template=None if chat_template is None else str(chat_template))
    launch.check()
    launch.run(host, port, ssl_certfile=_text(ssl_certfile), ssl_keyfile=_text(ssl_keyfile))
    if isinstance(launch.failure, EngineUnavailable):  # it ran and died, which no option can mend
        typer.echo(f"headrace: {launch.failure.message}", err=True)
        raise typer.Exit(1)
    if launch.failure is not None:
        raise launch.failure


def api_keys(given: list[str], file: Path | None) -> tuple[tuple[str, str], ...]:
    """(label, key) pairs from options and a file; keys without a label are called key-1, key-2, ...

    Raises:
        InvalidRequest: the file cannot be read, or a line holds more than a label and a key.
    """
    lines = [[key] for key in given]
    if file is not None:
        text = options.read_text(file, "--api-key-file")
        lines += [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    pairs: list[tuple[str, str]] = []
    for number, words in enumerate(lines, 1):
        if len(words) > 2:
            raise InvalidRequest(
                f"--api-key-file {file}: key {number} has {len(words)} words: write LABEL KEY, or KEY",
                field="api_key_file",
            )
        pairs.append((words[0] if len(words) == 2 else f"key-{number}", words[-1]))
    return tuple(pairs)


def parse_tier(text: str) -> tuple[str, SLO]:
    """``name:ttft_ms=300,tpot_ms=40`` (either may be left out) as the tier's name and targets.

    Raises:
        InvalidRequest: it is written otherwise, or a target is not above 0.
    """
    name, _, rest = text.partition(":")
    targets: dict[str, float] = {}
    try:
        for part in rest.split(","):
            key, _, value = part.partition("=")
            targets[key.strip()] = float(value)
    except ValueError:
        targets = {}
    if not name or not targets or targets.keys() - {"ttft_ms", "tpot_ms"}:
        raise InvalidRequest(f"--tier {text!r}: write it like fast:ttft_ms=300,tpot_ms=40", field="tier")
    return name, SLO(**targets)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _start_logging(level: str) -> None:
    import logging

    if level not in options.LOG_LEVELS:
        raise InvalidRequest(f"--log-level {level!r}: choose one of {', '.join(options.LOG_LEVELS)}", field="log_level")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level != "debug":
        logging.getLogger("uvicorn").setLevel("WARNING")  # its notes on processes and lifespans help nobody else
