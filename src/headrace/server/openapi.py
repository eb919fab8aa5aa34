"""The OpenAPI document, corrected where FastAPI's own does not say what this server does."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from headrace.server.guards.auth import OPEN_PATHS


def install(app: FastAPI, *, needs_key: bool, protect_metrics: bool) -> None:
    """Serve the corrected document at ``/openapi.json``; it is made once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            _drop_422(document)
            if needs_key:
                _add_security(document, OPEN_PATHS if protect_metrics else OPEN_PATHS | {"/metrics"})
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _drop_422(document: dict[str, Any]) -> None:
    """A request that is not valid is answered with 400 and OpenAI's error object, never with FastAPI's 422."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _add_security(document: dict[str, Any], open_paths: frozenset[str]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for name, path in document["paths"].items():
        if name not in open_paths:
            for operation in path.values():
                operation["security"] = [{"key": []}]
