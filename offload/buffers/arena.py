"""One contiguous, page-aligned region of host memory, and how a region is carved up.

Invariants: the memory is charged to a budget from construction to `close`; it is anonymous, private
and mapped once; nothing here touches its pages, so a page costs memory only when its user writes it.
Pools and heaps carved from one region never overlap.

First touch is the slow part (measured on a virtual machine: 1.8 GB/s with 4 KiB pages, 8 GB/s with
transparent huge pages, against 20 GB/s for memory that was touched before), so arenas ask for huge
pages and are kept for the whole run.

A forked child (a data loader's worker) does not inherit the mapping (MADV_DONTFORK): it would double
the memory at the first write, and direct I/O or DMA into pages shared copy-on-write goes astray.
Using an arena there raises.

Thread rule: carve and close from one thread; views may be taken by any.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from ..aio.memory import map_pages
from ..errors import CapacityError, StateError
from ..sizes import align_up, format_bytes
from .budget import Budget
from .heap import Heap
from .lease import POISON, Lease, Region
from .pool import Pool

__all__ = ["PAGE_NBYTES", "Arena", "Partition"]

# 4 KiB: the page, and the alignment that O_DIRECT wants of addresses and sizes.
PAGE_NBYTES = 4096


class Partition:
    """Carves a region, front to back, into pools and heaps. Bookkeeping only."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self._used_nbytes = 0
        self._parts: list[Pool | Heap] = []
        self._closed = False

    @property
    def free_nbytes(self) -> int:
        """Bytes not yet carved."""
        return self.region.nbytes - self._used_nbytes

    def pool(self, name: str, slots: Sequence[int]) -> Pool:
        """Carve a pool with slots of these sizes, each rounded up to 4096 bytes.

        Raises:
            CapacityError: the region has not that much left.
            StateError: the region is closed.
            ValueError: no slot, or one that is not positive.
        """
        if not slots or min(slots) <= 0:
            raise ValueError(f"pool {name!r}: slots must be one or more positive sizes, not {list(slots)}")
        rounded = [align_up(nbytes, PAGE_NBYTES) for nbytes in slots]
        pool = Pool(self.region, name, self._carve(name, sum(rounded)), rounded)
        self._parts.append(pool)
        return pool

    def heap(self, name: str, nbytes: int) -> Heap:
        """Carve a heap of `nbytes`, rounded up to 4096 bytes.

        Raises:
            CapacityError: the region has not that much left.
            StateError: the region is closed.
            ValueError: `nbytes` is not positive.
        """
        if nbytes <= 0:
            raise ValueError(f"heap {name!r}: {nbytes} bytes; it needs at least one")
        rounded = align_up(nbytes, PAGE_NBYTES)
        heap = Heap(self.region, name, self._carve(name, rounded), rounded)
        self._parts.append(heap)
        return heap

    def require(self, lease: Lease, offset: int, nbytes: int) -> None:
        """Check that bytes [offset, offset + nbytes) of `lease` may be used.

        Raises:
            StateError: the lease was released, or is of another region.
            ValueError: the range is not within the lease.
        """
        if lease.region is not self.region:
            raise StateError(f"{lease} is not of {self.region.name!r}")
        if lease.released:
            raise StateError(f"{lease} was released; its bytes may be another's by now")
        if offset < 0 or nbytes < 0 or offset + nbytes > lease.nbytes:
            raise ValueError(f"bytes [{offset:,}, {offset + nbytes:,}) are not within the {lease}")

    def close(self) -> None:
        """Close every pool and heap: nothing can be lent any more, and waiters wake."""
        self._closed = True
        for part in self._parts:
            part.close()

    def _carve(self, name: str, nbytes: int) -> int:
        if self._closed:
            raise StateError(f"{self.region.name!r} is closed; {name!r} cannot be carved from it")
        if nbytes > self.free_nbytes:
            parts = ", ".join(part.name for part in self._parts) or "nothing"
            raise CapacityError(
                f"{name!r} needs {format_bytes(nbytes)} ({nbytes:,} bytes) of {self.region.name!r}, "
                f"which has {format_bytes(self.free_nbytes)} ({self.free_nbytes:,} bytes) of "
                f"{format_bytes(self.region.nbytes)} left after {parts}; plan a larger arena"
            )
        start = self._used_nbytes
        self._used_nbytes += nbytes
        return start


class Arena:
    """Page-aligned host memory under a budget. A context manager; see the module.

    With OFFLOAD_DEBUG=1 in the environment, released bytes are filled with `POISON`.

    Args:
        budget: charged with the size, rounded up to 4096 bytes, until `close`.
        nbytes: the size wanted, > 0.
        holder: who the budget is told holds it, and the name in messages.
        on_release: called with the arena and each lease as it is released, instead of poisoning; it
            may raise to refuse.

    Raises:
        CapacityError: the budget has not that much left, or the operating system refuses.
        ValueError: `nbytes` is not positive.
    """

    def __init__(
        self,
        budget: Budget,
        nbytes: int,
        holder: str = "arena",
        *,
        on_release: Callable[[Arena, Lease], None] | None = None,
    ) -> None:
        if nbytes <= 0:
            raise ValueError(f"arena {holder!r}: {nbytes} bytes; it needs at least one")
        self.budget = budget
        self.holder = holder
        self.nbytes = align_up(nbytes, PAGE_NBYTES)
        budget.charge(self.nbytes, holder)
        try:
            self._map: mmap.mmap | None = map_pages(self.nbytes)
            self._map.madvise(mmap.MADV_DONTFORK)
        except OSError as error:
            budget.refund(self.nbytes, holder)
            raise CapacityError(
                f"{holder!r}: the system refused to map {format_bytes(self.nbytes)} ({self.nbytes:,} bytes) "
                f"of memory: {error}; lower host_memory, or raise the limit (ulimit -v, vm.overcommit_memory)"
            ) from error
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._pid = os.getpid()
        self._unpin: Callable[[], None] | None = None
        self._on_release = on_release
        hooked = on_release is not None or os.environ.get("OFFLOAD_DEBUG") == "1"
        self.partition = Partition(Region(holder, self.nbytes, self._released if hooked else None))

    @property
    def memory(self) -> memoryview:
        """All bytes, writable. Views keep the mapping alive, but their contents are lost by `close`.

        Raises:
            StateError: the arena is closed, or this process is a fork of its owner.
        """
        if self._map is None:
            raise StateError(f"arena {self.holder!r} is closed")
        if os.getpid() != self._pid:
            raise StateError(f"arena {self.holder!r} belongs to process {self._pid}, not to a fork of it")
        return memoryview(self._map)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._map is None

    @property
    def pinned(self) -> bool:
        """Whether a GPU driver has registered the memory."""
        return self._unpin is not None

    @property
    def free_nbytes(self) -> int:
        """Bytes not yet carved into pools and heaps."""
        return self.partition.free_nbytes

    def pool(self, name: str, slots: Sequence[int]) -> Pool:
        """Carve a pool; see `Partition.pool`."""
        return self.partition.pool(name, slots)

    def heap(self, name: str, nbytes: int) -> Heap:
        """Carve a heap; see `Partition.heap`."""
        return self.partition.heap(name, nbytes)

    def view(self, lease: Lease, offset: int = 0, nbytes: int | None = None) -> memoryview:
        """Return bytes [offset, offset + nbytes) of a lease, writable, valid until it is released.

        Args:
            lease: of a pool or heap of this arena.
            offset: from the start of the lease.
            nbytes: the rest of the lease when None.

        Raises:
            StateError: the lease was released or is of another arena, or the arena is closed.
            ValueError: the range is not within the lease.
        """
        size = lease.nbytes - offset if nbytes is None else nbytes
        self.partition.require(lease, offset, size)
        start = lease.offset + offset
        return self.memory[start : start + size]

    def poison(self, lease: Lease) -> None:
        """Fill the bytes of a lease with `POISON`, so that a stale reader shows."""
        ctypes.memset(self.address + lease.offset, POISON, lease.capacity_nbytes)

    def pin(self, unpin: Callable[[], None]) -> None:
        """Note that a driver registered the memory; `unpin` undoes it when the arena closes."""
        self._unpin = unpin

    def close(self) -> None:
        """Give the memory back and wake every waiter. Closing twice is harmless.

        The pages go back at once, also under views that are still alive: those read zeros from then
        on, but never fault.
        """
        if self._map is None:
            return
        self.partition.close()
        if os.getpid() == self._pid:
            if self._unpin is not None:
                self._unpin()
            self._map.madvise(mmap.MADV_DONTNEED)
        self._unpin = None
        # Not mmap.close(): it raises while any view lives. The last view unmaps.
        self._map = None
        self.budget.refund(self.nbytes, self.holder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _released(self, lease: Lease) -> None:
        # Leases may outlive the arena; its memory does not.
        if self._map is None:
            return
        if self._on_release is None:
            self.poison(lease)
        else:
            self._on_release(self, lease)
