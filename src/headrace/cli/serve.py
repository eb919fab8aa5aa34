"""``headrace serve``: OpenAI's API over one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli import options
from headrace.cli.groups import flat
from headrace.core.errors import EngineUnavailable, InvalidRequest

if TYPE_CHECKING:
    from headrace.server import ServerSettings
    from headrace.server.slo.classes import SLOClasses


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the server listens and how it behaves."""

    host: options.Host = "127.0.0.1"
    port: options.Port = 8000
    served_name: options.ServedName = None
    chat_template: options.ChatTemplate = None
    ssl_certfile: options.SslCertfile = None
    ssl_keyfile: options.SslKeyfile = None
    drain_timeout: options.DrainTimeout = 30.0
    log_level: options.LogLevel = "warning"
    dashboard: options.Dashboard = True


@dataclass(frozen=True, slots=True)
class Access:
    """Who may call."""

    api_key: options.ApiKey = None
    api_key_file: options.ApiKeyFile = None
    allowed_host: options.AllowedHost = None
    cors_origin: options.CorsOrigin = None


@dataclass(frozen=True, slots=True)
class Targets:
    """Service classes."""

    slo_class: options.SLOClass = None
    slo_classes: options.SLOClassFile = None
    default_slo_class: options.DefaultSLOClass = None
    service_tier: options.ServiceTier = None
    tier: options.Tier = None


@dataclass(frozen=True, slots=True)
class Engine:
    """Fields of :meth:`headrace.core.config.EngineConfig.from_options`."""

    dtype: options.DType = "auto"
    device: options.Device = "auto"
    attention: options.Attention = "auto"
    linears: options.Linears = "auto"
    quantize: options.Quantize = None
    policy: options.PolicyName = "adaserve"
    draft: options.Draft = "auto"
    max_sequences: options.MaxSequences = 64
    max_step_tokens: options.MaxStepTokens = 512
    max_queue: options.MaxQueue = 256
    kv_gib: options.KvGib = None
    kv_cache_dtype: options.KvCacheDtype = "auto"
    kv: options.Kv = "full"
    kv_budget: options.KvBudget = 0.1
    max_context: options.MaxContext = None
    prefix_cache: options.PrefixCache = True
    profile: options.ProfileOption = "auto"
    enforce_eager: options.EnforceEager = False
    tp: options.Tp = 1
    threads: options.Threads = None
    trust_remote_code: options.TrustRemoteCode = False


@flat
def serve(
    listening: Listening,
    access: Access,
    targets: Targets,
    engine: Engine,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub name, or bundled.")] = "bundled",
) -> None:
    """Serve MODEL to any OpenAI client. Health answers from the first second on, requests once the model is loaded.

    With latency targets to choose from: headrace serve --slo-class chat:tpot=50ms,ttft=1s --slo-class batch:none; a client then
    sends "slo": "chat", the header X-SLO-Class: chat, or service_tier="chat". http://127.0.0.1:8000/dashboard shows how it goes.
    """
    from headrace.cli.launch import Launch
    from headrace.core.config import EngineConfig

    config = EngineConfig.from_options(model=model, served_name=listening.served_name, **asdict(engine))
    settings = server_settings(listening, access, targets)
    _start_logging(listening.log_level)
    launch = Launch(config, settings, chat_template=_text(listening.chat_template))
    launch.check()
    launch.run(
        listening.host,
        listening.port,
        ssl_certfile=_text(listening.ssl_certfile),
        ssl_keyfile=_text(listening.ssl_keyfile),
    )
    if isinstance(launch.failure, EngineUnavailable):  # it ran and died, which no option can mend
        typer.echo(f"headrace: {launch.failure.message}", err=True)
        raise typer.Exit(1)
    if launch.failure is not None:
        raise launch.failure


def server_settings(listening: Listening, access: Access, targets: Targets) -> ServerSettings:
    """The server's settings; raises :class:`InvalidRequest` naming the option that is wrong."""
    from headrace.server import ServerSettings

    return ServerSettings(
        api_keys=api_keys(access.api_key or [], access.api_key_file),
        slo_classes=slo_classes(
            [*(targets.tier or ()), *(targets.slo_class or ())],
            targets.slo_classes,
            targets.default_slo_class,
            targets.service_tier or (),
        ),
        allowed_hosts=tuple(access.allowed_host or ()),
        cors_origins=tuple(access.cors_origin or ()),
        drain_timeout_s=listening.drain_timeout,
        dashboard=listening.dashboard,
    )


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


def slo_classes(given: Sequence[str], file: Path | None, default: str | None, tiers: Sequence[str]) -> SLOClasses:
    """The service classes of a file, and those of options, which win over it.

    Args:
        given: as in ``chat:tpot=50ms,ttft=1s``.
        file: YAML with ``classes`` and, if you like, ``default`` and ``service_tiers``.
        default: name of the class of requests that name none.
        tiers: as in ``priority=chat``.

    Raises:
        InvalidRequest: something cannot be read, or a name is unknown.
    """
    from headrace.server.slo.classes import SLOClasses, parse_class, parse_tier

    base = SLOClasses() if file is None else _read_classes(file)
    return base.with_(dict(map(parse_class, given)), default, dict(map(parse_tier, tiers)))


def _read_classes(file: Path) -> SLOClasses:
    import yaml

    from headrace.server.slo.classes import from_document

    try:
        document = yaml.safe_load(options.read_text(file, "--slo-classes"))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise InvalidRequest(
            f"--slo-classes {file}: not YAML{where}: {getattr(error, 'problem', None) or 'it cannot be read'}",
            field="slo_classes",
        ) from error
    return from_document(document, str(file))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _start_logging(level: str) -> None:
    import logging

    if level not in options.LOG_LEVELS:
        raise InvalidRequest(f"--log-level {level!r}: choose one of {', '.join(options.LOG_LEVELS)}", field="log_level")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level != "debug":
        logging.getLogger("uvicorn").setLevel("WARNING")  # its notes on processes and lifespans help nobody else
