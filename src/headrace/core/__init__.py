"""Torch-free types and protocols that every floor above shares."""
