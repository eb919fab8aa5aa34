"""Fast forms of a decoder's parts: packed and quantised linear layers, fused modules, and whole steps in native calls."""
