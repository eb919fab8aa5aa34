"""Ways to choose which tokens a decode step attends to, for comparison with :class:`headrace.sparse.PQCache`.

A :class:`Selector` chooses, :class:`SelectedAttention` runs it on keys, queries and values, and :class:`SelectedCache` puts it under
transformers. To add one: a class in the file it belongs to, and a line in ``registry.py``.
"""

from headrace.sparse.selectors.base import Place, Selector
from headrace.sparse.selectors.cache import SelectedCache, enable_selected
from headrace.sparse.selectors.registry import SELECTORS, make
from headrace.sparse.selectors.step import SelectedAttention, Step

__all__ = ["SELECTORS", "Place", "SelectedAttention", "SelectedCache", "Selector", "Step", "enable_selected", "make"]
