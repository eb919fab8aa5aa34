"""The engine without a model: simulated steps, drafts and fates of requests."""
