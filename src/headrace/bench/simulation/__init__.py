"""Simulated runs of the real engine, and how far they are from real ones."""
