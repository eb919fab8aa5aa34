"""Runs a server and its engine side by side: checks first, listens, loads, tells, and ends when the engine is lost."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidRequest

if TYPE_CHECKING:
    from headrace.core.protocols import ModelCard
    from headrace.models.text.tokenizer import Tokenizer
    from headrace.server import ServerSettings
    from headrace.server.run import GracefulServer
    from headrace.server.serving import Serving
    from headrace.server.slo.classes import SLOClasses

WATCH_S = 0.5


class Launch:
    """One run of ``headrace serve``.

    Args:
        config: the engine's configuration.
        settings: the server's.
        chat_template: a Jinja template or file in place of the model's own.

    Attributes:
        failure: why the engine was lost or never came up; None when the server ended because it was told to.
    """

    def __init__(self, config: EngineConfig, settings: ServerSettings, *, chat_template: str | None = None) -> None:
        from headrace.compose import build_service

        self.config, self.settings, self._chat_template = config, settings, chat_template
        self.failure: Exception | None = None
        self._service = build_service(config)
        self._url = ""
        self._serving: Serving
        self._server: GracefulServer

    def check(self) -> None:
        """Look at what can be known to be wrong at once; the engine's process checks everything else while it loads.

        Raises:
            HeadraceError: no such policy, or a model on this machine that is missing or incomplete.
        """
        from headrace.compose import get_policy
        from headrace.models.checkpoints import checks as checkpoint
        from headrace.models.checkpoints import hub

        get_policy(self.config.policy)
        if is_local(self.config.model):
            folder = hub.resolve(self.config.model)
            checkpoint.weight_files(folder)
            checkpoint.check_tokenizer(folder)

    def run(self, host: str, port: int, *, ssl_certfile: str | None = None, ssl_keyfile: str | None = None) -> None:
        """Serve until a signal to stop or until the engine is lost, which ``failure`` then explains.

        Raises:
            InvalidRequest: the address cannot be had.
        """
        from headrace.server.app import create_app
        from headrace.server.run import build_server

        check_address(host, port)
        if not self.settings.api_keys and not is_loopback(host):
            _say(
                f"warning: {host} can be reached from other machines and no --api-key is set: anyone may use the model"
            )
        app = create_app(self._service, self._tokenizer, self.settings, background=self._background)
        self._serving = app.state.serving
        self._server = build_server(
            app,
            host=host,
            port=port,
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
            on_listen=self._on_listen,
        )
        try:
            self._server.run()
        except SystemExit as error:  # uvicorn's way to say that it could not start
            raise InvalidRequest(f"cannot serve at {host} port {port}: see the log above", field="port") from error

    def _tokenizer(self) -> Tokenizer:
        from headrace.models.text.tokenizer import Tokenizer

        return Tokenizer(
            self._service.card.path,
            chat_template=self._chat_template,
            trust_remote_code=self.config.trust_remote_code,
        )

    def _on_listen(self, url: str) -> None:
        self._url = url
        _say(
            f"headrace listens at {url} and loads {self.config.model}; the first start compiles kernels, which takes longer"
        )

    @contextlib.asynccontextmanager
    async def _background(self) -> AsyncIterator[None]:
        """The engine, for as long as the server runs."""
        await self._service.start()
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await self._service.close()

    async def _watch(self) -> None:
        """Tell when the model is ready, and stop the server once the engine is lost for good."""
        warm = asyncio.create_task(asyncio.to_thread(_import_tokenizers))
        try:
            await self._service.ready()
            await warm
            await self._serving.tokenizer()  # the first request need not wait for it, and a broken one is noticed
            await self._tell()
            while self._service.state != "failed":
                await asyncio.sleep(WATCH_S)
            await self._service.ready()  # raises why
        except Exception as error:
            self.failure = error
            self._server.should_exit = True

    async def _tell(self) -> None:
        """Say what is served, on what, and how to try it."""
        from headrace.compose import default_threads

        card, limits = self._service.card, self.config.limits
        slots = (await self._service.stats()).slots_total
        name = card.name
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]})
        key = ' -H "authorization: Bearer $KEY"' if self.settings.api_keys else ""
        threads = self.config.threads or default_threads()
        _say(
            f"ready: {name} at {self._url}/v1\n"
            f"  model    {card.parameters / 1e6:,.1f}M parameters in {card.dtype}, context {card.context:,} tokens\n"
            f"{_quantised(card)}"
            f"  engine   {self.config.policy} policy, {threads} threads, up to {limits.max_sequences} sequences and "
            f"{limits.max_step_tokens} tokens a step, {slots:,} slots\n"
            f"{_classes(self.settings.slo_classes)}"
            f"  try      curl {self._url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'\n"
            f"  or       headrace chat --url {self._url}/v1"
            f"{_watch(self._url) if self.settings.dashboard else ''}"
        )


def _quantised(card: ModelCard) -> str:
    """A line about what was rounded, and what it costs where that is known; nothing when nothing was."""
    parts = [f"{card.quantization} weights"] if card.quantization else []
    parts += ["int8 K and V"] if card.kv_cache_dtype == "int8" else []
    cost = f": {card.quality}" if card.quality else ""
    return f"  rounded  {', '.join(parts)}{cost}\n" if parts else ""


def _classes(known: SLOClasses) -> str:
    """A line about the service classes, the default one first; nothing when there are none."""
    if not known.classes:
        return ""
    names = dict.fromkeys((known.default, *known.classes))
    described = (f"{name} ({known.named(name, 'slo')})" for name in names)
    return f"  classes  {', '.join(described)}; requests that name none are {known.default}\n"


def _watch(url: str) -> str:
    """A line about the dashboard."""
    return f"\n  watch    {url}/dashboard"


def _import_tokenizers() -> None:
    """Take the seconds that importing transformers costs while the engine's process loads the model."""
    from transformers import AutoTokenizer  # noqa: F401


def is_local(name: str) -> bool:
    """True when ``name`` can only mean the bundled pair or a folder here, so that no network is needed to know it."""
    from pathlib import Path

    from headrace.models.checkpoints.hub import BUNDLED

    return name in BUNDLED or Path(name).expanduser().exists() or name.startswith(("/", ".", "~"))


def is_loopback(host: str) -> bool:
    """True when only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, port: int) -> None:
    """Raise :class:`InvalidRequest` when ``host`` is unknown or the port is taken, before a model is loaded for nothing."""
    if not 0 <= port <= 65535:
        raise InvalidRequest(f"--port {port}: give a number from 0 (any free port) to 65535", field="port")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InvalidRequest(
            f"cannot listen on {host} port {port} ({error.strerror}): choose others with --host and --port",
            field="port",
        ) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
