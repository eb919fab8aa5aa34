"""Tensor parallelism inside a node: every layer split over ranks, each a process that holds its share of heads and slots."""
