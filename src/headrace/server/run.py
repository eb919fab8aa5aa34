"""Listening, and an end without broken answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from headrace.server.serving import Serving

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Idle connections stay open longer than clients pool them, so that none is closed just as it is used again."""

CLOSE_S = 3
"""How long connections may linger after the last answer."""


class GracefulServer(uvicorn.Server):
    """uvicorn with a drain: the first signal refuses new requests (503) and lets open ones finish, a second one ends at once."""

    def __init__(
        self, config: uvicorn.Config, serving: Serving, on_listen: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(config)
        self._serving, self._on_listen = serving, on_listen
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where the server listens; the port is the real one even when 0 was asked for."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    async def startup(self, sockets: list | None = None) -> None:  # type: ignore[type-arg]
        """Start to listen and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._limit_unread()
        if not self.should_exit and self.started and self._on_listen is not None:
            self._on_listen(self.url)

    def _limit_unread(self) -> None:
        """Have the kernel drop connections whose peer takes no data (Linux): closing alone would wait for it forever."""
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        if option is None:
            return
        limit_ms = int(self._serving.settings.write_timeout_s * 1e3)
        for server in self.servers:
            for listener in server.sockets:
                with contextlib.suppress(OSError):  # no TCP
                    listener.setsockopt(socket.IPPROTO_TCP, option, limit_ms)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler: drain, or end at once when already draining."""
        if self._drain is not None or self._loop is None or not self.started:
            self.should_exit = self.force_exit = True
            return
        log.info("got %s: finishing open requests (again to stop at once)", signal.Signals(sig).name)
        self._loop.call_soon_threadsafe(self.begin_drain)

    def begin_drain(self) -> None:
        """Refuse new requests, wait for the open ones and stop; call it on the server's loop."""
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        try:
            await self._serving.drain(self._serving.settings.drain_timeout_s)
        except Exception:
            log.exception("draining failed; stopping")
        finally:
            self.should_exit = True


def build_server(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    proxy_headers: bool = False,
    uvicorn_access_log: bool = False,
    on_listen: Callable[[str], None] | None = None,
) -> GracefulServer:
    """A server for an application made by :func:`headrace.server.app.create_app`; see :func:`run_server`."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        proxy_headers=proxy_headers,
        access_log=uvicorn_access_log,
        log_config=None,
        lifespan="on",
        ws="none",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
    )
    return GracefulServer(config, app.state.serving, on_listen)


def run_server(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    proxy_headers: bool = False,
    uvicorn_access_log: bool = False,
    on_listen: Callable[[str], None] | None = None,
) -> bool:
    """Serve until a signal to stop (SIGTERM, SIGINT), then drain.

    Args:
        app: from :func:`headrace.server.app.create_app`.
        host, port: where to listen; port 0 takes a free one.
        ssl_certfile, ssl_keyfile: serve HTTPS.
        proxy_headers: believe ``X-Forwarded-For`` of a proxy on this machine (it only changes the log).
        uvicorn_access_log: uvicorn's own access log beside ours.
        on_listen: told the URL once connections are accepted (which is before the model is loaded).

    Returns:
        False when the server could not start (the log says why).
    """
    serving: Serving = app.state.serving
    if not serving.settings.api_keys and host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("listening on %s without API keys: everybody who reaches this address can use the model", host)
    server = build_server(
        app,
        host=host,
        port=port,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        proxy_headers=proxy_headers,
        uvicorn_access_log=uvicorn_access_log,
        on_listen=on_listen,
    )
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that the address is taken; it has logged it
        return False
    return server.started
