"""A heap of one region: leases of any size, at the first place that is free.

Saved inputs of units live here. They are taken in the forward pass and given back in the backward pass,
the last first, but not all: one that went to disk gives its bytes back before those saved later do.

Invariants: leases never overlap; what is released is free at once, together with the free bytes beside it.

Thread rule: every method may be called from any thread; none blocks.
"""

from __future__ import annotations

import threading

from ..errors import CapacityError, StateError
from ..sizes import align_up, format_bytes
from .free_ranges import FreeRanges
from .lease import Lease, Region

__all__ = ["Heap"]

# 4 KiB: what direct I/O wants of a buffer's address and length, so that a lease can go to disk as it is.
_ALIGNMENT_NBYTES = 4096


class Heap:
    """`nbytes` bytes from `start` of a region; see the module. Made by `Arena.heap`."""

    def __init__(self, region: Region, name: str, start: int, nbytes: int) -> None:
        self.region = region
        self.name = name
        self.nbytes = nbytes
        self._start = start
        self._lock = threading.Lock()
        self._free = FreeRanges(nbytes)
        self._leases: dict[int, Lease] = {}
        self._used_nbytes = 0
        self._high_water_nbytes = 0
        self._closed = False

    def lease(self, nbytes: int, holder: str) -> Lease:
        """Lend `nbytes` bytes, rounded up to 4096.

        Raises:
            CapacityError: no free range is that large; says who holds what.
            StateError: the heap is closed.
            ValueError: `nbytes` is not positive.
        """
        lease = self.try_lease(nbytes, holder)
        if lease is None:
            raise CapacityError(f"{self.refusal(nbytes, holder)}; give it more room, or use smaller batches")
        return lease

    def try_lease(self, nbytes: int, holder: str) -> Lease | None:
        """Lend `nbytes` bytes, rounded up to 4096, or return None when no free range is that large.

        Raises:
            StateError: the heap is closed.
            ValueError: `nbytes` is not positive.
        """
        if nbytes <= 0:
            raise ValueError(f"heap {self.name!r}: {holder!r} asked for {nbytes} bytes; ask for at least one")
        capacity = align_up(nbytes, _ALIGNMENT_NBYTES)
        with self._lock:
            if self._closed:
                raise StateError(
                    f"heap {self.name!r} of {self.region.name!r} is closed; {holder!r} cannot lease from it"
                )
            offset = self._free.take(capacity)
            if offset is None:
                return None
            lease = Lease(self, self._start + offset, nbytes, capacity, holder)
            self._leases[lease.offset] = lease
            self._used_nbytes += capacity
            self._high_water_nbytes = max(self._high_water_nbytes, self._used_nbytes)
            return lease

    def refusal(self, nbytes: int, holder: str) -> str:
        """Return why `nbytes` cannot be lent now: what is free, and who holds the rest."""
        capacity = align_up(nbytes, _ALIGNMENT_NBYTES)
        with self._lock:
            held: dict[str, int] = {}
            for lease in self._leases.values():
                held[lease.holder] = held.get(lease.holder, 0) + lease.capacity_nbytes
            free = self._free.largest_nbytes
        largest_first = sorted(held.items(), key=lambda item: -item[1])
        names = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in largest_first)
        return (
            f"heap {self.name!r} of {self.region.name!r} is full: {holder!r} asked for "
            f"{format_bytes(capacity)} ({capacity:,} bytes) but {format_bytes(free)} ({free:,} bytes) of "
            f"{format_bytes(self.nbytes)} are free in one piece; held by: {names or 'nobody'}"
        )

    def in_use(self) -> tuple[tuple[str, int], ...]:
        """Return (holder, bytes asked for) of the leases out, the oldest first."""
        with self._lock:
            return tuple((lease.holder, lease.nbytes) for lease in self._leases.values())

    @property
    def largest_free_nbytes(self) -> int:
        """The most that could be lent in one piece."""
        with self._lock:
            return self._free.largest_nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes that are lent, rounded up."""
        return self._used_nbytes

    @property
    def high_water_nbytes(self) -> int:
        """The most bytes that were ever lent at once."""
        return self._high_water_nbytes

    def close(self) -> None:
        """Refuse new leases; leases out may still be released."""
        with self._lock:
            self._closed = True

    def take_back(self, lease: Lease) -> None:
        """Free the bytes of a released lease; called by `Lease.release` only."""
        with self._lock:
            del self._leases[lease.offset]
            self._free.give(lease.offset - self._start, lease.capacity_nbytes)
            self._used_nbytes -= lease.capacity_nbytes
