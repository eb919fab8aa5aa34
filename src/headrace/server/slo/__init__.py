"""Latency targets of requests, and whether they are met."""
