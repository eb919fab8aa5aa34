"""Attention of packed segments over slots: one interface, several backends chosen by name."""

from headrace.models.attention.interface import (
    BACKENDS,
    AttentionBackend,
    AttentionStep,
    get_backend,
)

__all__ = ["BACKENDS", "AttentionBackend", "AttentionStep", "get_backend"]
