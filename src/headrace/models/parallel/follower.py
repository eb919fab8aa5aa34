"""A rank other than 0: loads its share of the model and runs every batch that rank 0 runs.

``python -m headrace.models.parallel.follower PIPE LINE``: numbers of two inherited descriptors. Over the pipe come a
:class:`Setup`, then batches (:mod:`headrace.models.parallel.wire`) until it ends; the line carries
nothing, and its end means that rank 0 is gone, however it went and whatever this process is waiting for.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

import numpy as np
import torch

from headrace.core.errors import HeadraceError
from headrace.models.parallel.group import Group, device_of, join
from headrace.models.parallel.ranks import Setup
from headrace.models.parallel.wire import unpack


def main(pipe: Connection, line: int) -> None:
    """Serve rank 0 until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; rank 0 decides when we end
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    try:
        pipe.send(("started", None))
        setup: Setup = pipe.recv()
        enter(setup)
        serve(pipe, setup)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except HeadraceError as error:
        pipe.send(("failed", error))


def enter(setup: Setup) -> None:
    """Take the threads given and meet the other ranks."""
    torch.set_num_threads(setup.threads)
    join(Group(setup.rank, setup.size), setup.store, device_of(setup.rank, setup.device, setup.size))


def serve(pipe: Connection, setup: Setup) -> None:
    """Load, make room, say so, and run batches until the pipe ends, which raises EOFError or OSError."""
    from headrace.models.cache.slots import SlotPool
    from headrace.models.fused.linear import choose_linears
    from headrace.models.load import load
    from headrace.models.parallel.room import shared_slots
    from headrace.models.runner import ModelRunner

    group = Group(setup.rank, setup.size)
    device = device_of(setup.rank, setup.device, setup.size)
    model = load(**setup.load, device=str(device), group=group, progress=False)
    choose_linears(model, setup.linears, setup.quantize)
    runner = ModelRunner(model, SlotPool(shared_slots(model, group, **setup.slots)), **setup.runner)
    pipe.send(("ready", None))
    while True:
        runner.run(unpack(np.frombuffer(bytearray(pipe.recv_bytes()), np.int32)))


def _end_with(line: int) -> None:
    """End this process at once when rank 0 is gone: the main thread may be waiting for a sum that never comes."""
    os.read(line, 1)
    os._exit(0)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # nothing to save, and the group's own farewell would wait for ranks that are gone
