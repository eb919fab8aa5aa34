"""Checkpoints to measure with: sizes of decoders people run, and cost-padded ones."""
