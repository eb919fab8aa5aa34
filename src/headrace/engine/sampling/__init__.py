"""Tokens drawn from logits: distributions, penalties, log-probabilities, randomness."""
