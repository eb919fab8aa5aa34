"""Options of the commands that build an engine or a server, in the words of their configurations.

Annotated types for typer: a command's signature then says name, kind and default, and the help stands here, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.core.errors import InvalidRequest

LOG_LEVELS = ("debug", "info", "warning", "error")


def _engine(text: str, *names: str, metavar: str | None = None, envvar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, envvar=envvar, rich_help_panel="Engine")


def _server(text: str, *names: str, envvar: str | None = None, panel: str = "Server", hidden: bool = False) -> Any:
    return typer.Option(*names, help=text, envvar=envvar, rich_help_panel=panel, hidden=hidden)


def _access(text: str, *names: str, envvar: str | None = None) -> Any:
    return _server(text, *names, envvar=envvar, panel="Who may call")


def _targets(text: str, *names: str, hidden: bool = False) -> Any:
    return _server(text, *names, panel="Latency targets", hidden=hidden)


def _sampling(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Sampling")


_CODE = "Run Python code that comes with the checkpoint."

DType = Annotated[str, _engine("auto, float32, bfloat16 or float16.", metavar="NAME")]
Device = Annotated[str, _engine("auto, cpu, cuda or cuda:N.", metavar="NAME")]
Attention = Annotated[str, _engine("auto, reference, numba or triton.", metavar="NAME")]
Linears = Annotated[str, _engine("auto, module (the checkpoint's own) or native (compiled kernels).", metavar="NAME")]
Quantize = Annotated[
    str | None,
    _engine("Round the weights to int8 or nf4 while loading.", "--quantize", "--quantization", metavar="NAME"),
]
PolicyName = Annotated[
    str,
    _engine(
        "Who runs in a step: chunked, prefill-first, priority, mlfq or vtc; with drafts adaserve, goodput, adaptive-chain, "
        "paper, equal, spec-4, spec-6 or spec-8.",
        "--policy",
        metavar="NAME",
    ),
]
Draft = Annotated[
    str,
    _engine(
        "Where drafts come from: auto (the bundled draft for the bundled model, and n-grams), ngram, off, or a checkpoint.",
        "--draft",
        metavar="NAME",
    ),
]
MaxSequences = Annotated[int, _engine("Sequences running at once.")]
MaxStepTokens = Annotated[int, _engine("Tokens in one step.")]
MaxQueue = Annotated[int, _engine("Waiting requests above which more are refused.")]
KvGib = Annotated[float | None, _engine("Memory for K and V in GiB; by default a share of what is free.")]
KvCacheDtype = Annotated[
    str, _engine("auto (the model's dtype) or int8, for nearly four times the tokens.", metavar="NAME")
]
Kv = Annotated[
    str,
    _engine(
        "How decode steps read the context: full, pq (the share that an index of the keys points at) or auto (pq from 8192 tokens on). "
        "Requests may say otherwise.",
        "--kv",
        metavar="MODE",
    ),
]
KvBudget = Annotated[float, _engine("Share of the context that --kv pq and auto read.")]
MaxContext = Annotated[int | None, _engine("Longest prompt plus output in tokens; by default the model's own.")]
ProfileOption = Annotated[
    str,
    _engine(
        "What steps cost: auto (as stored, else measured), measure, off, or the file to keep it in.",
        "--profile",
        metavar="HOW",
        envvar="HEADRACE_PROFILE",
    ),
]
PrefixCache = Annotated[bool, _engine("Share the K and V of equal prefixes.", "--prefix-cache/--no-prefix-cache")]
EnforceEager = Annotated[
    bool, _engine("On GPUs, launch every kernel rather than replay captured steps.", "--enforce-eager")
]
Tp = Annotated[
    int,
    _engine(
        "Ranks that share every layer: one GPU each, or CPU processes (tensor parallelism).",
        "--tp",
        "--tensor-parallel-size",
        metavar="N",
    ),
]
Threads = Annotated[int | None, _engine("CPU threads; by default OMP_NUM_THREADS, else all cores.")]
TrustRemoteCode = Annotated[bool, _engine(_CODE, "--trust-remote-code")]

Host = Annotated[str, _server("Address to listen on.")]
Port = Annotated[int, _server("0 takes a free one.")]
ServedName = Annotated[str | None, _server("What clients call the model.")]
ApiKey = Annotated[
    list[str] | None, _access("Let in only who sends this key; may be given again.", envvar="HEADRACE_API_KEY")
]
ApiKeyFile = Annotated[Path | None, _access("Keys, one a line, each after a label if you like.")]
AllowedHost = Annotated[
    list[str] | None,
    _access(
        "Name by which clients call the server, such as a proxy's; * takes any. May be given again. "
        "Always good: addresses, localhost and this machine's name."
    ),
]
CorsOrigin = Annotated[list[str] | None, _access("Origin whose pages may call from a browser; may be given again.")]

SLOClass = Annotated[
    list[str] | None,
    _targets("A service class and its targets, as in chat:tpot=50ms,ttft=1s or batch:none; may be given again."),
]
SLOClassFile = Annotated[Path | None, _targets("YAML file with classes, default and service_tiers.")]
DefaultSLOClass = Annotated[
    str | None, _targets("Class of requests that name none; else the one called default, else no targets.")
]
ServiceTier = Annotated[
    list[str] | None, _targets("What a service_tier of OpenAI's means, as in priority=chat; may be given again.")
]
Tier = Annotated[list[str] | None, _targets("Older name of --slo-class.", hidden=True)]
Dashboard = Annotated[bool, _server("Serve the page /dashboard.", "--dashboard/--no-dashboard")]
ChatTemplate = Annotated[Path | None, _server("Jinja file in place of the model's template.")]
SslCertfile = Annotated[Path | None, _server("Certificate, for HTTPS.")]
SslKeyfile = Annotated[Path | None, _server("Its private key.")]
DrainTimeout = Annotated[float, _server("Seconds that open requests get after a signal to stop.")]
LogLevel = Annotated[str, _server(", ".join(LOG_LEVELS) + ".")]

MaxTokens = Annotated[int, _sampling("Longest answer.")]
Temperature = Annotated[float, _sampling("0 is greedy.")]
TopP = Annotated[float, _sampling("Nucleus mass.")]
Answers = Annotated[int, _sampling("Answers per prompt.", "--n")]
Seed = Annotated[int | None, _sampling("Repeats exactly.")]
Stop = Annotated[list[str] | None, _sampling("Stop at this text; may be given again.")]
JsonSchema = Annotated[Path | None, _sampling("Answer in JSON that this schema allows.")]


def read_text(path: Path, option: str) -> str:
    """The text of a file named by ``option``; "-" is standard input.

    Raises:
        InvalidRequest: it cannot be read, or is not UTF-8.
    """
    import sys

    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidRequest(f"{option} {path}: {reason}", field=option.lstrip("-")) from error
