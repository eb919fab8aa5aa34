"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from headrace.core.protocols import ModelCard
from headrace.server.api.replies import ModelList, ModelObject, error_replies
from headrace.server.errors import json_response
from headrace.server.serving import Server

router = APIRouter()


@router.get("/v1/models", response_model=ModelList, responses=error_replies(401, 503))
async def list_models(server: Server) -> Response:
    """The served models."""
    return json_response({"object": "list", "data": [_model(server.card())]})


@router.get("/v1/models/{model:path}", response_model=ModelObject, responses=error_replies(401, 404, 503))
async def get_model(model: str, server: Server) -> Response:
    """One served model; its name may hold slashes."""
    return json_response(_model(server.check_model(model)))


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "headrace",
        "root": card.name,
        "max_model_len": card.context,
        "parameters": card.parameters,
        "dtype": card.dtype,
        "quantization": card.quantization or None,
        "kv_cache_dtype": card.kv_cache_dtype or None,
        "quality": None if card.quality is None else asdict(card.quality),
    }
