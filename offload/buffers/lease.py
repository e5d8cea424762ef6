"""A range of bytes on loan, and the region it points into. Bookkeeping only: no memory is touched.

Invariant: a lease is released exactly once; a second release is a programmer's error and raises.

Thread rule: a lease may be released by another thread than the one that took it, by one thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from ..errors import StateError

__all__ = ["POISON", "Lease", "Lender", "Region"]

# What released memory is filled with under OFFLOAD_DEBUG=1. 0xDBDBDBDB is -1.2e17 in float32 and in
# bfloat16: a use after release shows in the first loss.
POISON = 0xDB


@dataclass(frozen=True, eq=False, slots=True)
class Region:
    """One contiguous range of bytes, [0, nbytes), that leases point into.

    Attributes:
        name: for messages.
        nbytes: its size.
        on_release: called with each lease as it is released, before its bytes can be lent again.
    """

    name: str
    nbytes: int
    on_release: Callable[[Lease], None] | None = None


class Lender(Protocol):
    """What a lease goes back to: a pool or a heap."""

    name: str
    region: Region

    def take_back(self, lease: Lease) -> None:
        """Make the bytes of a released lease lendable again."""


class Lease:
    """`nbytes` bytes at `offset` of a region, on loan to `holder`. A context manager.

    Attributes:
        offset: byte offset in the region, a multiple of 4096.
        nbytes: what was asked for.
        capacity_nbytes: what is set aside for it, >= nbytes (the slot's size).
        holder: who asked, for messages.
        released: whether it was given back.
    """

    __slots__ = ("capacity_nbytes", "holder", "lender", "nbytes", "offset", "released")

    def __init__(self, lender: Lender, offset: int, nbytes: int, capacity_nbytes: int, holder: str) -> None:
        self.lender = lender
        self.offset = offset
        self.nbytes = nbytes
        self.capacity_nbytes = capacity_nbytes
        self.holder = holder
        self.released = False

    @property
    def region(self) -> Region:
        """The region `offset` counts from."""
        return self.lender.region

    def release(self) -> None:
        """Give the bytes back.

        Raises:
            StateError: already released.
        """
        if self.released:
            raise StateError(f"{self} was released already; a lease is given back once")
        if self.region.on_release is not None:
            self.region.on_release(self)
        self.released = True
        self.lender.take_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Released inside the block (after a device event, say) is in order.
        if not self.released:
            self.release()

    def __repr__(self) -> str:
        return (
            f"lease of {self.nbytes:,} bytes at {self.offset:,} of {self.lender.name!r} in "
            f"{self.region.name!r} (holder {self.holder!r})"
        )
