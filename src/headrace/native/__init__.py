"""Kernels in C++, compiled for this machine at their first use and kept in a cache."""
