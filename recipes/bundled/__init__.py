"""The recipe that makes the bundled target and draft."""
