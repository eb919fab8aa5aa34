"""Rank 1 of a test: joins once, then serves one model after the other, each over a pipe of its own."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from headrace.models.parallel.follower import enter, serve

if __name__ == "__main__":
    pipes = [Connection(int(number)) for number in sys.argv[1:]]
    joined = False
    for pipe in pipes:
        try:
            setup = pipe.recv()
            if not joined:
                enter(setup)
                joined = True
            serve(pipe, setup)
        except (EOFError, OSError):
            continue
    os._exit(0)
