"""PQCache: attention that reads the few past tokens a product-quantised sketch of the keys points at (arXiv 2407.12820)."""

from headrace.sparse.cache import PQCache, enable

__all__ = ["PQCache", "enable"]
