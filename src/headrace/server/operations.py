"""For those who run the server: GET /health, /version and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.server.api.replies import HealthReply, VersionReply, error_replies
from headrace.server.errors import json_response
from headrace.server.serving import Server
from headrace.version import __version__

router = APIRouter()

_METRICS = {
    "description": "Metrics in the text format of Prometheus, or of OpenMetrics when asked for.",
    "content": {"text/plain": {}, "application/openmetrics-text": {}},
}


@router.get(
    "/health",
    response_model=HealthReply,
    responses={503: {"model": HealthReply, "description": "Loading, draining or failed."}},
)
async def health(server: Server) -> Response:
    """200 when requests are served, else 503; either way with the state."""
    state = server.state
    model = server.service.card.name if state == "ready" else None
    return json_response({"state": state, "model": model, "version": __version__}, 200 if state == "ready" else 503)


@router.get("/version", response_model=VersionReply)
async def version() -> Response:
    """The server's version."""
    return json_response({"version": __version__})


@router.get("/metrics", response_class=Response, responses={200: _METRICS, **error_replies(401)})
async def metrics(request: Request, server: Server) -> Response:
    """Everything the server counts, for Prometheus."""
    stats = await server.stats()
    server.metrics.show_attainment(server.monitor.attainment)
    accept = request.headers.get("accept", "")
    text, content_type = server.metrics.render(accept, server.state, server.open_requests, stats)
    return Response(text, headers={"content-type": content_type})
