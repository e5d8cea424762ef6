"""One region of device memory, lent by pools, and the events its slots wait for.

Invariants: the memory is allocated once. A fence (a range and an event) is kept until its event has
passed, so bytes that were given up while work on them was under way are never written before it ends.

Thread rule: every method may be called from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch

from ..buffers import Lease, Partition, Pool
from ..errors import StateError
from .event import Event
from .tensors import device_tensor, nbytes_of

__all__ = ["DeviceArena"]


class DeviceArena:
    """Device memory under leases; see the module. A context manager.

    Made by `Device.arena`.

    Args:
        memory: all bytes, 1-D uint8.
        partition: carves the same number of bytes.
        wait_on_compute: the device's.
        give_back: called once by `close`.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        *,
        partition: Partition,
        wait_on_compute: Callable[[Event], None],
        give_back: Callable[[DeviceArena], None],
    ) -> None:
        self.nbytes = memory.numel()
        self.partition = partition
        self._memory: torch.Tensor | None = memory
        self._address = memory.data_ptr()
        self._wait_on_compute = wait_on_compute
        self._give_back = give_back
        self._lock = threading.Lock()
        self._fences: list[tuple[int, int, Event]] = []

    @property
    def free_nbytes(self) -> int:
        """Bytes not yet carved into pools."""
        return self.partition.free_nbytes

    def pool(self, name: str, slots: Sequence[int]) -> Pool:
        """Carve a pool; see `Partition.pool`."""
        return self.partition.pool(name, slots)

    def tensor(self, lease: Lease, dtype: torch.dtype, numel: int, offset_bytes: int = 0) -> torch.Tensor:
        """Return a 1-D tensor over bytes of a lease, valid until its release.

        Args:
            lease: of a pool of this arena.
            offset_bytes: from the start of the lease, a multiple of the element size.

        Raises:
            StateError: the lease was released or is of another arena, or this one is closed.
            ValueError: the tensor would not lie within the lease, or is misaligned.
        """
        self.partition.require(lease, offset_bytes, numel * dtype.itemsize)
        if self._memory is None:
            raise StateError(f"device arena is closed; {lease} has no memory any more")
        return device_tensor(self._memory, dtype, numel, lease.offset + offset_bytes)

    def release_after(self, lease: Lease, event: Event) -> None:
        """Release a lease whose bytes are in use until `event`, without waiting for it.

        The next upload into them waits for the event on the copy stream; compute that writes to them
        without an upload must call `claim_on_compute` first.

        Raises:
            StateError: already released.
        """
        if not event.done():
            with self._lock:
                # Before the release: whoever is lent the bytes next must find the fence.
                self._fences.append((lease.offset, lease.offset + lease.capacity_nbytes, event))
        lease.release()

    def claim_on_compute(self, lease: Lease) -> None:
        """Make compute issued from now on by this thread wait until earlier work on the lease has ended."""
        for event in self.fences(lease.offset, lease.offset + lease.capacity_nbytes):
            self._wait_on_compute(event)

    def fences(self, begin: int, end: int) -> list[Event]:
        """Return the events not yet passed that guard any of the bytes [begin, end)."""
        with self._lock:
            self._fences = [fence for fence in self._fences if not fence[2].done()]
            return [event for first, last, event in self._fences if first < end and begin < last]

    def locate(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Return the range of bytes of a tensor in this arena, or None when it is not in it."""
        begin = tensor.data_ptr() - self._address
        if not 0 <= begin < self.nbytes:
            return None
        return begin, begin + nbytes_of(tensor)

    def close(self) -> None:
        """Give the memory back and wake every waiter. Closing twice is harmless."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        self.partition.close()
        self._fences.clear()
        # `memory` lives until this returns: the device waits for copies into it before it is freed.
        self._give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
