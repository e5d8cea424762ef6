"""Records whose home is host memory (or the device): one lease each, for the whole run.

Owns a weights lease (weights and frozen records together) and an optimizer lease per unit, filled
once and updated in place. With a store beside them, `flush` writes what changed since the last
commit. Not thread-safe: a record is touched by one thread at a time, as `transfer.py` arranges.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..buffers import Arena, Lease, Pool
from ..store import Store
from .records import RecordSet

__all__ = ["ResidentRecords"]


class ResidentRecords:
    """See the module."""

    def __init__(self, arena: Arena, records: Mapping[str, RecordSet]) -> None:
        self._arena = arena
        self._records = records
        sizes = {
            (owner, part): nbytes
            for owner, unit in records.items()
            for part, nbytes in (("weights", unit.host_nbytes), ("optimizer", unit.optimizer_nbytes))
            if nbytes
        }
        pool: Pool = arena.pool("resident records", list(sizes.values()))
        # Largest first: the pool gives each the smallest slot that fits, so every slot is used fully.
        ordered = sorted(sizes.items(), key=lambda item: -item[1])
        self._leases: dict[tuple[str, str], Lease] = {
            (owner, part): pool.lease(nbytes, f"{owner} {part}") for (owner, part), nbytes in ordered
        }
        self._dirty: set[str] = set()

    def weights(self, owner: str) -> Lease:
        """Return the lease that holds the unit's weights record and, behind it, its frozen record."""
        return self._leases[owner, "weights"]

    def optimizer(self, owner: str) -> memoryview:
        """Return the bytes of the unit's optimizer record, to be updated in place."""
        return self._arena.view(self._leases[owner, "optimizer"], 0, self._records[owner].optimizer_nbytes)

    def mark_dirty(self, owner: str) -> None:
        """Note that the unit's weights and optimizer records differ from the store's."""
        self._dirty.add(owner)

    def flush(self, store: Store) -> int:
        """Write the changed records into the generation that `store` is building.

        Returns:
            Bytes written.
        """
        tickets = []
        nbytes = 0
        for owner in sorted(self._dirty):
            unit = self._records[owner]
            weights = self._arena.view(self.weights(owner), 0, unit.weights_nbytes)
            tickets.append(store.write(unit.name("weights"), weights))
            tickets.append(store.write(unit.name("optimizer"), self.optimizer(owner)))
            nbytes += unit.weights_nbytes + unit.optimizer_nbytes
        for ticket in tickets:
            ticket.wait()
        self._dirty.clear()
        return nbytes
