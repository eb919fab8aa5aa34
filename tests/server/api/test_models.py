"""What /v1/models says of a model that was rounded."""

from __future__ import annotations

from headrace.core.protocols import ModelCard, Quality
from headrace.server.api.models import _model
from headrace.server.api.replies import ModelObject


def test_a_rounded_model_says_how_and_at_what_cost() -> None:
    quality = Quality(tokens=300, nll_before=3.0, nll=3.01, same_greedy=0.97)
    card = ModelCard("m", "/m", 100, 97, (0,), quantization="int8", kv_cache_dtype="int8", quality=quality)
    shown = ModelObject.model_validate(_model(card)).model_dump()
    assert shown["quantization"] == shown["kv_cache_dtype"] == "int8"
    assert shown["quality"] == {"tokens": 300, "nll_before": 3.0, "nll": 3.01, "same_greedy": 0.97}


def test_a_plain_model_says_nothing_of_it() -> None:
    shown = ModelObject.model_validate(_model(ModelCard("m", "/m", 100, 97, (0,)))).model_dump()
    assert shown["quantization"] is shown["kv_cache_dtype"] is shown["quality"] is None
