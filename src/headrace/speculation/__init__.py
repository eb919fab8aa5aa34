"""Speculation: drafts, which of them to verify, and policies that spend them where latency targets need them."""
