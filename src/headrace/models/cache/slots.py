"""Slots: room for one token's K and V (and whatever else is kept per token) in every layer.

Pages hold a single token, so a sequence's context is a table of slot numbers in order. Accepting a path of a draft tree,
sharing a prefix or forking a sequence edits tables and reference counts; nothing is copied. The accounting is plain numpy, so
that a simulator can run it without tensors; torch is imported only when a plane is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int32]
OnFree = Callable[[Ints], None]
OnRemap = Callable[[Ints, Ints], None]

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


class OutOfSlots(Exception):
    """Fewer slots are free than were asked for; nothing was taken.

    Attributes:
        wanted: slots asked for.
        free: slots free at that moment.
    """

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} slots wanted, {free} free")
        self.wanted = wanted
        self.free = free


@dataclass(frozen=True, slots=True)
class _Plane:
    tensor: Any
    on_free: OnFree | None
    on_remap: OnRemap | None


class SlotPool:
    """A fixed number of slots with reference counts, and the planes stored under them.

    Freed slots are handed out again last in, first out, so that a busy pool keeps touching the same memory.
    Every method that takes slots wants distinct ones in a call and raises ValueError otherwise, before anything changes.

    Args:
        size: number of slots, at least 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}: a pool needs at least 1 slot")
        self.size = size
        self._refs = np.zeros(size, np.int32)
        self._stack = np.arange(size - 1, -1, -1, dtype=np.int32)
        self._free = size
        self._mark = np.empty(size, np.int32)
        self._planes: dict[str, _Plane] = {}
        self._watchers: list[OnFree] = []

    @property
    def free(self) -> int:
        """Slots nobody references."""
        return self._free

    def take(self, n: int) -> Ints:
        """Take ``n`` free slots, each with one reference.

        Returns:
            int32[n], owned by the caller.

        Raises:
            OutOfSlots: when fewer than ``n`` are free; nothing is taken then.
        """
        if n < 0:
            raise ValueError(f"take({n}): give a number of slots of at least 0")
        if n > self._free:
            raise OutOfSlots(n, self._free)
        taken = self._stack[self._free - n : self._free][::-1].copy()
        self._free -= n
        self._refs[taken] = 1
        return taken

    def share(self, slots: ArrayLike) -> None:
        """Add a reference to each of ``slots`` (int32[n], all in use)."""
        held = self._in_use(slots, "share")
        if len(held):
            self._refs[held] += 1
            self._tell(held)

    def release(self, slots: ArrayLike) -> None:
        """Drop a reference to each of ``slots`` (int32[n], all in use); those left with none become free.

        Planes' ``on_free`` hooks get the freed slots before these can be taken again.
        """
        held = self._in_use(slots, "release")
        if not len(held):
            return
        self._refs[held] -= 1
        freed = held[self._refs[held] == 0]
        if len(freed):
            for plane in self._planes.values():
                if plane.on_free is not None:
                    plane.on_free(freed)
            self._stack[self._free : self._free + len(freed)] = freed[::-1]
            self._free += len(freed)
        self._tell(held)

    def refs(self, slots: ArrayLike) -> Ints:
        """int32[n] reference counts of ``slots`` (0: free)."""
        return self._refs[self._checked(slots, "refs")]

    def watch(self, callback: OnFree) -> None:
        """Call ``callback(slots)`` after each :meth:`share` and :meth:`release`, with the slots whose counts changed."""
        self._watchers.append(callback)

    def add_plane(
        self,
        name: str,
        shape: Sequence[int],
        dtype: Any,
        device: Any,
        on_free: OnFree | None = None,
        on_remap: OnRemap | None = None,
    ) -> Any:
        """Store a tensor under every slot.

        Args:
            name: unique in the pool.
            shape: the shape of one slot's entry.
            dtype, device: torch's.
            on_free: called with slots that just became free, for state kept outside of the tensor.
            on_remap: called as ``on_remap(old, new)`` after :meth:`remap` copied rows, for the same purpose.

        Returns:
            The zeroed tensor, ``[size, *shape]``.
        """
        import torch

        if name in self._planes:
            raise ValueError(f"add_plane({name!r}): the pool has a plane of that name")
        tensor = _zeros((self.size, *shape), dtype, torch.device(device))
        self._planes[name] = _Plane(tensor, on_free, on_remap)
        return tensor

    def plane(self, name: str) -> Any:
        """The tensor of plane ``name``; KeyError when there is none."""
        return self._planes[name].tensor

    @property
    def planes(self) -> Mapping[str, Any]:
        """Name -> tensor, in the order they were added."""
        return MappingProxyType({name: plane.tensor for name, plane in self._planes.items()})

    def remap(self, old: ArrayLike, new: ArrayLike) -> None:
        """Copy every plane's entries from slots ``old`` to slots ``new``; reference counts stay as they are.

        The copy reads everything before it writes, so the two may overlap. Committing a draft path needs no copy: this is for
        owners that must have other slots (to unshare a prefix before writing into it, or to move between devices' ranges).
        """
        source, target = self._in_use(old, "remap"), self._in_use(new, "remap")
        if len(source) != len(target):
            raise ValueError(f"remap: {len(source)} old slots but {len(target)} new ones")
        if not len(source):
            return
        import torch

        for plane in self._planes.values():
            at = torch.from_numpy(source).to(plane.tensor.device, torch.int64)
            to = torch.from_numpy(target).to(plane.tensor.device, torch.int64)
            plane.tensor[to] = plane.tensor[at]
            if plane.on_remap is not None:
                plane.on_remap(source, target)

    def _checked(self, slots: ArrayLike, what: str) -> Ints:
        array = np.ascontiguousarray(slots, dtype=np.int32)
        if array.ndim != 1:
            raise ValueError(f"{what}: slots must be one-dimensional, not {array.shape}")
        if len(array) and (array.min() < 0 or array.max() >= self.size):
            raise ValueError(
                f"{what}: slots run from {array.min()} to {array.max()}, the pool from 0 to {self.size - 1}"
            )
        return array

    def _in_use(self, slots: ArrayLike, what: str) -> Ints:
        array = self._checked(slots, what)
        order = np.arange(len(array), dtype=np.int32)
        self._mark[array] = order
        if (self._mark[array] != order).any():
            raise ValueError(f"{what}: a slot is given twice")
        if len(array) and self._refs[array].min() < 1:
            idle = array[self._refs[array] < 1]
            raise ValueError(f"{what}: {len(idle)} slots are free already, among them {idle[0]}")
        return array

    def _tell(self, slots: Ints) -> None:
        for callback in self._watchers:
            callback(slots)


def _zeros(shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
    """Zeros; on the CPU from pages the system provides as they are first written, so an idle pool takes no memory.

    ``torch.zeros`` writes every page at once: gigabytes, and seconds, before the first request.
    """
    import torch

    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)
