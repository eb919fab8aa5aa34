"""Measurements: each compares systems in one interleaved run and writes rows and claims."""
