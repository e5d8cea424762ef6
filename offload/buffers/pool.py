"""A pool of fixed slots in one region, lent to whoever comes first.

Invariants: a slot is free, on offer to one waiter, or lent to one lease; and no free slot fits any
waiter, because a slot that comes back is offered to the waiters first, in the order they came. So a
late caller never overtakes a waiter whose request would fit the slot.

Thread rule: every method may be called from any thread; `lease` blocks.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import CapacityError, RequestTimeoutError, StateError
from ..sizes import format_bytes
from .lease import Lease, Region

__all__ = ["Pool"]


@dataclass(frozen=True, order=True, slots=True)
class _Slot:
    nbytes: int
    offset: int


class _Waiter:
    """One blocked `lease` call; `slot` is set by the thread that released it."""

    __slots__ = ("nbytes", "slot")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.slot: _Slot | None = None


class Pool:
    """Slots of fixed sizes, one after the other from `start` of a region; see the module.

    Made by `Arena.pool` or `DeviceArena.pool`.

    Args:
        region: what the leases point into.
        name: for messages.
        start: offset of the first slot.
        slots: the slots' sizes, in order; multiples of the page size.
    """

    def __init__(self, region: Region, name: str, start: int, slots: Sequence[int]) -> None:
        self.region = region
        self.name = name
        self.slots = tuple(slots)
        self._changed = threading.Condition()
        self._free: list[_Slot] = []
        for nbytes in slots:
            self._free.append(_Slot(nbytes, start))
            start += nbytes
        self._free.sort()
        self._largest_nbytes = self._free[-1].nbytes
        self._leases: dict[int, Lease] = {}
        self._waiters: list[_Waiter] = []
        self._used_nbytes = 0
        self._high_water_nbytes = 0
        self._closed = False

    def lease(self, nbytes: int, holder: str, timeout_s: float | None = None) -> Lease:
        """Lend the smallest free slot that holds `nbytes`, blocking until there is one.

        Raises:
            CapacityError: no slot of this pool, free or not, is that large.
            RequestTimeoutError: none came free within `timeout_s`; the message names the holders.
            StateError: the pool is closed, or was while waiting.
            ValueError: `nbytes` is not positive.
        """
        with self._changed:
            slot = self._take(nbytes, holder)
            if slot is None:
                slot = self._wait(nbytes, holder, timeout_s)
            return self._lend(slot, nbytes, holder)

    def try_lease(self, nbytes: int, holder: str) -> Lease | None:
        """Lend the smallest free slot that holds `nbytes`, or return None when none is free.

        Raises:
            CapacityError: no slot of this pool, free or not, is that large.
            StateError: the pool is closed.
            ValueError: `nbytes` is not positive.
        """
        with self._changed:
            slot = self._take(nbytes, holder)
            return None if slot is None else self._lend(slot, nbytes, holder)

    def in_use(self) -> tuple[tuple[str, int], ...]:
        """Return (holder, bytes asked for) of every lease out, the oldest first."""
        with self._changed:
            return self._in_use()

    @property
    def used_nbytes(self) -> int:
        """Bytes of the slots that are lent."""
        return self._used_nbytes

    @property
    def high_water_nbytes(self) -> int:
        """The most bytes of slots that were ever lent at once."""
        return self._high_water_nbytes

    @property
    def num_waiting(self) -> int:
        """How many `lease` calls are blocked."""
        return len(self._waiters)

    def close(self) -> None:
        """Refuse new leases and wake all waiters with a StateError; leases out may still be released."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take_back(self, lease: Lease) -> None:
        """Free the slot of a released lease; called by `Lease.release` only."""
        with self._changed:
            del self._leases[lease.offset]
            self._used_nbytes -= lease.capacity_nbytes
            self._offer(_Slot(lease.capacity_nbytes, lease.offset))

    def _take(self, nbytes: int, holder: str) -> _Slot | None:
        if nbytes <= 0:
            raise ValueError(f"pool {self.name!r}: {holder!r} asked for {nbytes} bytes; ask for at least one")
        if self._closed:
            raise StateError(self._closed_message(holder))
        if nbytes > self._largest_nbytes:
            raise CapacityError(
                f"pool {self.name!r} of {self.region.name!r}: {holder!r} asked for {format_bytes(nbytes)} "
                f"({nbytes:,} bytes) but the largest of its {len(self.slots)} slots holds "
                f"{format_bytes(self._largest_nbytes)} ({self._largest_nbytes:,} bytes); plan larger slots"
            )
        index = bisect.bisect_left(self._free, _Slot(nbytes, 0))
        return self._free.pop(index) if index < len(self._free) else None

    def _wait(self, nbytes: int, holder: str, timeout_s: float | None) -> _Slot:
        waiter = _Waiter(nbytes)
        self._waiters.append(waiter)
        granted = False
        try:
            self._changed.wait_for(lambda: waiter.slot is not None or self._closed, timeout_s)
            if self._closed:
                raise StateError(self._closed_message(holder))
            if waiter.slot is None:
                raise RequestTimeoutError(
                    f"pool {self.name!r} of {self.region.name!r}: no slot for {nbytes:,} bytes came free for "
                    f"{holder!r} within {timeout_s} s; lent to: {self._describe_holders()}"
                )
            granted = True
            return waiter.slot
        finally:
            # Also on Ctrl-C: a slot granted to a waiter that gives up goes to the next one.
            if not granted:
                self._withdraw(waiter)

    def _withdraw(self, waiter: _Waiter) -> None:
        if waiter.slot is None:
            self._waiters.remove(waiter)
        else:
            self._offer(waiter.slot)

    def _offer(self, slot: _Slot) -> None:
        for waiter in self._waiters:
            if waiter.nbytes <= slot.nbytes:
                self._waiters.remove(waiter)
                waiter.slot = slot
                self._changed.notify_all()
                return
        bisect.insort(self._free, slot)

    def _lend(self, slot: _Slot, nbytes: int, holder: str) -> Lease:
        lease = Lease(self, slot.offset, nbytes, slot.nbytes, holder)
        self._leases[slot.offset] = lease
        self._used_nbytes += slot.nbytes
        self._high_water_nbytes = max(self._high_water_nbytes, self._used_nbytes)
        return lease

    def _in_use(self) -> tuple[tuple[str, int], ...]:
        return tuple((lease.holder, lease.nbytes) for lease in self._leases.values())

    def _describe_holders(self) -> str:
        return ", ".join(f"{holder} {format_bytes(nbytes)}" for holder, nbytes in self._in_use()) or "nobody"

    def _closed_message(self, holder: str) -> str:
        return f"pool {self.name!r} of {self.region.name!r} is closed; {holder!r} cannot lease from it"
