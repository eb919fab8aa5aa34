"""GET /dashboard: a page that shows what the server does, and the data it polls.

The page and its files hold nothing secret and are open, as a key can only be typed in once there is a page to type it into. The
data needs a key wherever the API does; the page sends it as a header, never in an address.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from headrace.server.errors import json_response
from headrace.server.serving import Server

router = APIRouter(include_in_schema=False)

PAGE = "/dashboard"
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "app.js": "text/javascript; charset=utf-8",
    "feed.js": "text/javascript; charset=utf-8",
    "draw.js": "text/javascript; charset=utf-8",
    "timeline.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "tables.js": "text/javascript; charset=utf-8",
}
OPEN_PATHS = frozenset({PAGE, *(f"{PAGE}/{name}" for name in TYPES if name != "index.html")})
"""What is served without a key: all but the data."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


@router.get(PAGE)
async def page() -> Response:
    """The page."""
    return _static("index.html")


@router.get(f"{PAGE}/data")
async def data(request: Request, server: Server, after: Annotated[int, Query(ge=0)] = 0) -> Response:
    """What is new since revision ``after``, for the page."""
    request.state.quiet = True  # a line a second would drown the log
    return json_response(server.monitor.snapshot(server, after), headers={"cache-control": "no-store"})


def _file(name: str) -> None:
    """Add the route of one of the page's files; a table of names, so that no path of a client's is ever opened."""

    async def serve() -> Response:
        return _static(name)

    router.add_api_route(f"{PAGE}/{name}", serve, methods=["GET"], name=name)


for _name in TYPES:
    if _name != "index.html":
        _file(_name)


def _static(name: str) -> Response:
    return Response(_content(name), headers={**HEADERS, "content-type": TYPES[name]})


@lru_cache(maxsize=len(TYPES))
def _content(name: str) -> bytes:
    return (files("headrace.server.dashboard") / "page" / name).read_bytes()
