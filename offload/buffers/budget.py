"""The byte ledger of one tier: who holds how much, and a hard limit.

Invariants: the sum over holders never exceeds the limit, and every byte charged is refunded by the
holder that charged it. The ledger counts; it allocates nothing.

Thread rule: every method may be called from any thread.
"""

from __future__ import annotations

import threading

from ..errors import CapacityError, StateError
from ..sizes import format_bytes
from ..specs import Tier

__all__ = ["Budget"]

# The setting a user raises when a tier is too small.
_KNOB = {Tier.DEVICE: "device_memory", Tier.HOST: "host_memory", Tier.DISK: "disk"}


class Budget:
    """A thread-safe ledger of one tier.

    Args:
        tier: the tier whose bytes are counted; it names the knob in messages.
        limit_nbytes: the most that may be charged at once, >= 0.

    Raises:
        ValueError: a negative limit.
    """

    def __init__(self, tier: Tier, limit_nbytes: int) -> None:
        if limit_nbytes < 0:
            raise ValueError(f"a {tier.value} budget cannot be negative: {limit_nbytes} bytes")
        self.tier = tier
        self.limit_nbytes = limit_nbytes
        self._lock = threading.Lock()
        self._holders: dict[str, int] = {}
        self._used_nbytes = 0
        self._high_water_nbytes = 0

    def charge(self, nbytes: int, holder: str) -> None:
        """Add `nbytes` to what `holder` holds.

        Raises:
            CapacityError: the limit would be exceeded; nothing was charged. The message names every
                holder and the setting to raise.
            ValueError: a negative size.
        """
        if nbytes < 0:
            raise ValueError(f"cannot charge {nbytes} bytes to {holder!r}: a size cannot be negative")
        with self._lock:
            if self._used_nbytes + nbytes > self.limit_nbytes:
                raise CapacityError(self._refusal(nbytes, holder))
            self._holders[holder] = self._holders.get(holder, 0) + nbytes
            self._used_nbytes += nbytes
            self._high_water_nbytes = max(self._high_water_nbytes, self._used_nbytes)

    def refund(self, nbytes: int, holder: str) -> None:
        """Take back `nbytes` that `holder` was charged.

        Raises:
            StateError: `holder` was charged less than that.
            ValueError: a negative size.
        """
        if nbytes < 0:
            raise ValueError(f"cannot refund {nbytes} bytes to {holder!r}: a size cannot be negative")
        with self._lock:
            held = self._holders.get(holder, 0)
            if nbytes > held:
                raise StateError(
                    f"{self.tier.value} budget: {holder!r} refunds {nbytes:,} bytes but was charged {held:,}"
                )
            self._used_nbytes -= nbytes
            self._holders[holder] = held - nbytes
            if held == nbytes:
                del self._holders[holder]

    @property
    def used_nbytes(self) -> int:
        """Bytes charged now."""
        return self._used_nbytes

    @property
    def free_nbytes(self) -> int:
        """Bytes that could still be charged now."""
        return self.limit_nbytes - self._used_nbytes

    @property
    def high_water_nbytes(self) -> int:
        """The most bytes that were ever charged at once."""
        return self._high_water_nbytes

    def holders(self) -> dict[str, int]:
        """Return bytes by holder, largest first; those that hold nothing are left out."""
        with self._lock:
            return self._sorted_holders()

    def _sorted_holders(self) -> dict[str, int]:
        return dict(sorted(self._holders.items(), key=lambda item: (-item[1], item[0])))

    def _refusal(self, nbytes: int, holder: str) -> str:
        held = ", ".join(f"{name} {format_bytes(size)}" for name, size in self._sorted_holders().items())
        needed = self._used_nbytes + nbytes
        return (
            f"{self.tier.value} budget exceeded: {holder!r} asked for {format_bytes(nbytes)} ({nbytes:,} "
            f"bytes) but {format_bytes(self.free_nbytes)} ({self.free_nbytes:,} bytes) of "
            f"{format_bytes(self.limit_nbytes)} are free; held by: "
            f"{held or 'nobody'}; raise {_KNOB[self.tier]} to at least {needed:,} bytes"
        )
