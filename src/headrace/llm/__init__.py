"""Offline generation in this process: :class:`LLM` and what it gives back."""

from headrace.llm.llm import LLM
from headrace.llm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"]
