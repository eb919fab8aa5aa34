"""Checkpoint folders: found, checked, supported or refused."""
