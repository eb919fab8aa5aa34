"""The application: routes and layers, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from headrace.core.protocols import Service
from headrace.server import errors, openapi, operations
from headrace.server.api import chat, completions, models, tokens
from headrace.server.dashboard import routes as dashboard
from headrace.server.guards.access import Access
from headrace.server.guards.auth import Authentication
from headrace.server.guards.hosts import AllowedHosts
from headrace.server.guards.limits import BodyLimits
from headrace.server.metrics.exposition import Metrics
from headrace.server.serving import Serving
from headrace.server.settings import ServerSettings
from headrace.server.slo.targets import CLASS_HEADER, TARGETS_HEADER
from headrace.version import __version__

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer

_SLO_HEADERS = (CLASS_HEADER.lower(), TARGETS_HEADER.lower())


def create_app(
    service: Service,
    tokenizer: Callable[[], Tokenizer],
    settings: ServerSettings | None = None,
    *,
    background: Callable[[], AbstractAsyncContextManager[object]] | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        service: who generates; may still be loading, which ``/health`` then says.
        tokenizer: gives the model's tokenizer; called once, in a thread, at the first request after the service is ready.
        settings: every knob; the defaults let everybody in and listen to nobody's browser.
        background: entered when the server starts and left when it ends, on its event loop: the place to start and stop
            the service.

    Returns:
        The application, with the shared state at ``app.state.serving``.
    """
    settings = settings or ServerSettings()
    metrics = Metrics()
    serving = Serving(service, tokenizer, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with background() if background is not None else nullcontext(), _sampling(serving):
                yield
        finally:
            serving.close()

    app = FastAPI(
        title="headrace",
        version=__version__,
        summary="OpenAI's API with a latency target for every request.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.serving = serving
    errors.install(app)
    for part in (models, chat, completions, tokens, operations):
        app.include_router(part.router)
    if settings.dashboard:
        app.include_router(dashboard.router)
    openapi.install(app, needs_key=bool(settings.api_keys), protect_metrics=settings.protect_metrics)
    _add_layers(app, settings, metrics)
    return app


@asynccontextmanager
async def _sampling(serving: Serving) -> AsyncIterator[None]:
    """Collect for the dashboard, where there is one."""
    if not serving.settings.dashboard:
        yield
        return
    task = asyncio.create_task(serving.monitor.run(serving))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _add_layers(app: FastAPI, settings: ServerSettings, metrics: Metrics) -> None:
    """Middleware from the inside out: a request meets the last one first."""
    app.add_middleware(
        BodyLimits,
        max_bytes=settings.max_body_bytes,
        timeout_s=settings.body_timeout_s,
        max_open=settings.max_open_requests,
    )
    app.add_middleware(Authentication, digests=settings.key_digests(), protect_metrics=settings.protect_metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id", *_SLO_HEADERS],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(AllowedHosts, allowed=settings.allowed_hosts)
    app.add_middleware(Access, metrics=metrics, enabled=settings.access_log)
