"""Records that live in host memory: a lease each, for the whole run.

Owns a lease of the weights (weights and frozen records together) and one of the first optimizer chunks of
each unit, as far as `Residency` says; filled once and updated in place. Where there is a store, what changed
since the last commit is written before the next: at once by `begin_writing` while the step that commits goes
on, the rest by `flush`.

Invariant: a record is not changed while it is being written; `finish_writes_of` comes first.

Thread rule: none of its own: a record is touched by one thread at a time, as `transfer.py` arranges. Writes
are the update thread's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from ..buffers import Arena, Lease
from ..codec import OptimizerChunk
from ..errors import OffloadError
from ..specs import RecordKind
from ..store import Store, Ticket
from ..trace import Tracer
from .records import RecordSet
from .residency import Residency

__all__ = ["ResidentRecords"]


@dataclass(frozen=True)
class _Write:
    """A part of a record on its way to the store, from where it lives."""

    owner: str
    ticket: Ticket
    nbytes: int
    issued_s: float


class ResidentRecords:
    """See the module."""

    def __init__(
        self, arena: Arena, records: Mapping[str, RecordSet], residency: Residency, trace: Tracer
    ) -> None:
        self._arena = arena
        self._records = records
        self._trace = trace
        self._sizes: dict[tuple[str, RecordKind], int] = {}
        for owner, unit in records.items():
            self._sizes[owner, "weights"] = residency.weights_nbytes(unit)
            self._sizes[owner, "optimizer"] = residency.optimizer_nbytes(unit)
        # Largest first: the pool gives each the smallest slot that fits, so every slot is used fully.
        ordered = sorted(((size, key) for key, size in self._sizes.items() if size), reverse=True)
        self._leases: dict[tuple[str, RecordKind], Lease] = {}
        if ordered:
            pool = arena.pool("resident records", [size for size, _ in ordered])
            self._leases = {key: pool.lease(size, " ".join(key)) for size, key in ordered}
        self._counts = {owner: residency.chunks.get(owner, 0) for owner in records}
        self._is_whole = residency.is_whole(records)
        # Of these, what the store was given last is not what is here, or not what is committed.
        self._dirty: set[str] = set()
        self._uncommitted: set[str] = set()
        self._writes: list[_Write] = []

    @property
    def is_whole(self) -> bool:
        """Whether every record lives here, and none on disk."""
        return self._is_whole

    @property
    def uncommitted(self) -> frozenset[str]:
        """Owners of what differs from the last commit."""
        return frozenset(self._uncommitted)

    def holds_weights(self, owner: str) -> bool:
        """Return whether the unit's weights and frozen records live here."""
        return (owner, "weights") in self._leases

    def weights(self, owner: str) -> Lease | None:
        """Return the lease of the unit's weights record and, behind it, its frozen one; None when on disk."""
        return self._leases.get((owner, "weights"))

    def optimizer(self, owner: str) -> memoryview:
        """Return what of the unit's optimizer record lives here, from its first byte; may be empty."""
        lease = self._leases.get((owner, "optimizer"))
        if lease is None:
            return memoryview(b"")
        return self._arena.view(lease, 0, self._sizes[owner, "optimizer"])

    def chunk(self, owner: str, chunk: OptimizerChunk) -> memoryview | None:
        """Return the bytes of an optimizer chunk, to be updated in place; None when it is on disk."""
        end = chunk.offset_bytes + chunk.nbytes
        if end > self._sizes[owner, "optimizer"]:
            return None
        return self.optimizer(owner)[chunk.offset_bytes : end]

    def num_chunks(self, owner: str) -> int:
        """Return how many chunks of the unit's optimizer record live here: the first ones."""
        return self._counts[owner]

    def mark_dirty(self, owner: str) -> None:
        """Note that what lives here of the unit's mutable records was changed."""
        if self._mutable(owner):
            self._dirty.add(owner)
            self._uncommitted.add(owner)

    def mark_clean(self, owner: str) -> None:
        """Note that it is as the last commit has it."""
        self._dirty.discard(owner)
        self._uncommitted.discard(owner)

    # -- writing -----------------------------------------------------------------------------

    def begin_writing(self, store: Store, owner: str) -> int:
        """Begin to write what was changed of a unit into the generation that `store` is building.

        Returns:
            Bytes to be written.
        """
        if owner not in self._dirty:
            return 0
        unit = self._records[owner]
        parts = self._mutable(owner)
        for kind, memory in parts.items():
            issued_s = time.perf_counter()
            ticket = store.write(unit.name(kind), memory, nbytes=len(memory))
            self._writes.append(_Write(owner, ticket, len(memory), issued_s))
        self._dirty.discard(owner)
        return sum(len(memory) for memory in parts.values())

    def flush(self, store: Store) -> int:
        """Write what was changed and not yet written, and wait for all writes.

        Returns:
            Bytes of those that were begun here.

        Raises:
            OffloadError: one of the writes failed.
        """
        nbytes = sum(self.begin_writing(store, owner) for owner in sorted(self._dirty))
        self.finish_writes()
        return nbytes

    def finish_writes_of(self, owner: str) -> None:
        """Wait until nothing of a unit is being written, so that it may be changed.

        Raises:
            OffloadError: a write failed.
        """
        if any(write.owner == owner for write in self._writes):
            self.finish_writes()

    def finish_writes(self) -> None:
        """Wait for all writes.

        Raises:
            OffloadError: one of them failed.
        """
        while self._writes:
            write = self._writes[0]
            write.ticket.wait()
            self._writes.pop(0)
            ended_s = write.ticket.finished_s or write.issued_s
            self._trace.add("disk write", write.owner, write.issued_s, ended_s, nbytes=write.nbytes)

    def committed(self) -> None:
        """Note that everything written was committed."""
        self._uncommitted.intersection_update(self._dirty)

    def settle(self) -> None:
        """Wait for all writes, whatever comes of them."""
        for write in self._writes:
            with suppress(OffloadError):  # Who needs to know asks `finish_writes`, or commits.
                write.ticket.wait()
        self._writes.clear()

    def _mutable(self, owner: str) -> dict[RecordKind, memoryview]:
        """Return what lives here of a unit's mutable records."""
        unit = self._records[owner]
        found: dict[RecordKind, memoryview] = {}
        lease = self.weights(owner)
        if lease is not None and unit.weights_nbytes:
            found["weights"] = self._arena.view(lease, 0, unit.weights_nbytes)
        if self._sizes[owner, "optimizer"]:
            found["optimizer"] = self.optimizer(owner)
        return found
