"""A last-in, first-out range of one region: saved activations are pushed in the forward pass and
released in the backward pass, the last first.

Invariants: leases never overlap. A lease released below the top stays occupied until everything
above it was released; then both are freed.

Thread rule: every method may be called from any thread; none blocks.
"""

from __future__ import annotations

import threading

from ..errors import CapacityError, StateError
from ..sizes import align_up, format_bytes
from .lease import Lease, Region

__all__ = ["Stack"]

# 4 KiB: what direct I/O wants of a buffer's address, so that a pushed tensor can go to disk as it is.
_ALIGNMENT_NBYTES = 4096


class Stack:
    """`nbytes` bytes from `start` of a region, pushed and popped; see the module.

    Made by `Arena.stack` or `DeviceArena.stack`.
    """

    def __init__(self, region: Region, name: str, start: int, nbytes: int) -> None:
        self.region = region
        self.name = name
        self.nbytes = nbytes
        self._start = start
        self._lock = threading.Lock()
        self._leases: list[Lease] = []
        self._used_nbytes = 0
        self._high_water_nbytes = 0
        self._closed = False

    def push(self, nbytes: int, holder: str) -> Lease:
        """Lend the next `nbytes` bytes (rounded up to 4096) above the top.

        Raises:
            CapacityError: there is no room left above the top.
            StateError: the stack is closed.
            ValueError: `nbytes` is not positive.
        """
        if nbytes <= 0:
            raise ValueError(f"stack {self.name!r}: {holder!r} pushed {nbytes} bytes; push at least one")
        capacity = align_up(nbytes, _ALIGNMENT_NBYTES)
        with self._lock:
            if self._closed:
                raise StateError(
                    f"stack {self.name!r} of {self.region.name!r} is closed; {holder!r} cannot push"
                )
            if self._used_nbytes + capacity > self.nbytes:
                raise CapacityError(self._refusal(capacity, holder))
            lease = Lease(self, self._start + self._used_nbytes, nbytes, capacity, holder)
            self._leases.append(lease)
            self._used_nbytes += capacity
            self._high_water_nbytes = max(self._high_water_nbytes, self._used_nbytes)
            return lease

    def in_use(self) -> tuple[tuple[str, int], ...]:
        """Return (holder, bytes asked for) of the leases out, from the bottom up."""
        with self._lock:
            return tuple((lease.holder, lease.nbytes) for lease in self._leases if not lease.released)

    @property
    def used_nbytes(self) -> int:
        """Bytes between the bottom and the top."""
        return self._used_nbytes

    @property
    def high_water_nbytes(self) -> int:
        """The highest the top ever was."""
        return self._high_water_nbytes

    def close(self) -> None:
        """Refuse new pushes; leases out may still be released."""
        with self._lock:
            self._closed = True

    def take_back(self, lease: Lease) -> None:
        """Free a released lease and all released ones that it uncovers; called by `Lease.release` only."""
        with self._lock:
            while self._leases and self._leases[-1].released:
                self._used_nbytes -= self._leases.pop().capacity_nbytes

    def _refusal(self, capacity: int, holder: str) -> str:
        held: dict[str, int] = {}
        for lease in self._leases:
            held[lease.holder] = held.get(lease.holder, 0) + lease.capacity_nbytes
        largest_first = sorted(held.items(), key=lambda item: -item[1])
        names = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in largest_first)
        free = self.nbytes - self._used_nbytes
        return (
            f"stack {self.name!r} of {self.region.name!r} is full: {holder!r} pushed "
            f"{format_bytes(capacity)} ({capacity:,} bytes) but {format_bytes(free)} ({free:,} bytes) of "
            f"{format_bytes(self.nbytes)} are free; held by: {names or 'nobody'}; "
            f"give it more room, or use smaller micro-batches"
        )
