"""A batch in buffers that never move, for graphs that are captured once and replayed with other numbers in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from headrace.core.batch import WORD_BITS, Batch
from headrace.models.attention.gpu_cut import (
    MERGE,
    PART,
    ROWS,
    TASK,
    Spare,
    Tables,
    cut_small,
    padded,
    parts_needed,
)
from headrace.models.attention.gpu_step import Launch, TritonStep
from headrace.models.attention.interface import check_window

MOST_ROWS = 256  # beyond, a step is long enough to launch its kernels one by one
_FINE, _COARSE = 8, 32
_FINE_UPTO = 128


@dataclass(frozen=True, slots=True)
class Key:
    """What a graph depends on besides the model: all steps of one key run the same kernels over the same grids.

    Attributes:
        spare: sizes the batch is padded to.
        widest: rows of the longest segment, rounded up to a power of two.
    """

    spare: Spare
    widest: int


def key_of(batch: Batch, group: int) -> Key | None:
    """The key of ``batch``, or None when it has segments of several tiles or too many rows.

    Args:
        group: query heads per K/V head, the most of any layer.
    """
    rows = padded_rows(batch.tokens)
    longest = int(np.diff(batch.query_starts).max(initial=0))
    if rows is None or not 0 < longest * group <= ROWS:
        return None
    tasks = parts_needed(batch) + rows - batch.tokens
    return Key(Spare(rows, 1 << (max(rows, tasks) - 1).bit_length()), 1 << (longest - 1).bit_length())


def padded_rows(tokens: int) -> int | None:
    """Rows that ``tokens`` are padded to: 1, 2, 4, then multiples of 8, beyond 128 of 32; None above :data:`MOST_ROWS`."""
    if not 0 < tokens <= MOST_ROWS:
        return None
    if tokens <= 4:
        return 1 << (tokens - 1).bit_length()
    step = _FINE if tokens <= _FINE_UPTO else _COARSE
    return -(-tokens // step) * step


class Mirror:
    """An int32 array on the host, and its copy on the device at an address that stays.

    Args:
        sizes: lengths of its parts by name.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        total = sum(sizes.values())
        pinned = device.type == "cuda"  # so that the copy does not hold the host up
        self._source = torch.zeros(total, dtype=torch.int32, pin_memory=pinned)
        self._target = torch.zeros(total, dtype=torch.int32, device=device)
        ends = np.cumsum([0, *sizes.values()]).tolist()
        self._places = {name: slice(*ends[i : i + 2]) for i, name in enumerate(sizes)}

    def host(self, name: str) -> np.ndarray:
        """A part, to be written."""
        array: np.ndarray = self._source[self._places[name]].numpy()
        return array

    def device(self, name: str) -> torch.Tensor:
        """A part's copy."""
        return self._target[self._places[name]]

    def send(self, upto: int | None = None) -> None:
        """Copy the first ``upto`` numbers (None: all) to the device; the host's must stay as they are until it has them."""
        self._target[:upto].copy_(self._source[:upto], non_blocking=True)


class StaticStep(TritonStep):
    """The attention step of every batch of one key, and the batch's own numbers beside it.

    Args:
        key: what to make room for.
        slot: where rows that only pad the batch write their K and V.
    """

    def __init__(self, key: Key, slot: int, device: torch.device) -> None:
        rows, tasks = key.spare.rows, key.spare.tasks
        words = rows * -(-key.widest // WORD_BITS)
        sizes = {"ids": rows, "positions": rows, "writes": rows, "words": words, "slots": tasks * PART}
        self._numbers = Mirror(sizes, device)
        self._tables: dict[tuple[int, int | None], Mirror] = {}
        self._key, self._slot, self._upto = key, slot, sum(sizes.values()) - sizes["slots"]
        super().__init__(
            batch=None,  # type: ignore[arg-type]  # the one that fill() was last given
            device=device,
            positions=self._numbers.device("positions"),
            writes=self._numbers.device("writes"),
            slots=self._numbers.device("slots"),
            words=self._numbers.device("words"),
        )

    @property
    def ids(self) -> torch.Tensor:
        """int32[rows] token ids; 0 for padding."""
        return self._numbers.device("ids")

    def fill(self, batch: Batch) -> None:
        """Put ``batch``, whose key is this step's, where the kernels read."""
        self.batch = batch
        for name, array, rest in (
            ("ids", batch.ids, 0),
            ("positions", batch.positions, 0),
            ("writes", batch.write_slots, self._slot),
            ("words", batch.mask_words, 0),
        ):
            place = self._numbers.host(name)
            place[: len(array)] = array
            place[len(array) :] = rest
        self._numbers.host("slots")[: len(batch.context_slots)] = batch.context_slots
        self._numbers.send(self._upto + len(batch.context_slots))
        for (_, window), mirror in self._tables.items():
            _fill_tables(mirror, cut_small(batch, window, self._key.spare))

    def launches_of(self, group: int, window: int | None) -> dict[int, Launch]:
        """As :meth:`TritonStep.launches_of`: one tile size, and as many tasks for every batch of the key."""
        key = (group, window)
        if key not in self.launches:
            check_window(window)
            spare = self._key.spare
            mirror = Mirror({"tasks": spare.tasks * TASK, "merges": spare.rows * MERGE}, self.device)
            _fill_tables(mirror, cut_small(self.batch, window, spare))
            self._tables[key] = mirror
            tasks, merges = mirror.device("tasks").view(-1, TASK), mirror.device("merges").view(-1, MERGE)
            self.launches[key] = {padded(self._key.widest * group): Launch(tasks, merges, spare.tasks)}
        return self.launches[key]


def _fill_tables(mirror: Mirror, tables: Tables) -> None:
    mirror.host("tasks")[:] = tables.tasks.ravel()
    mirror.host("merges")[:] = tables.merges.ravel()
    mirror.send()
