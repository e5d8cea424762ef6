"""Which records live in host memory for the whole run: all of them, none, or a part. Pure.

A unit's weights and frozen records go together, since they are fetched into one buffer. Of its optimizer
record any number of chunks may be in host memory, always the first ones: an update begins with them while
the others are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .records import RecordSet

__all__ = ["Residency"]


@dataclass(frozen=True)
class Residency:
    """See the module.

    Attributes:
        weights: owners whose weights and frozen records are in host memory.
        chunks: by owner, how many chunks of the optimizer record are; none for those left out.
    """

    weights: frozenset[str] = frozenset()
    chunks: Mapping[str, int] = field(default_factory=dict, hash=False)

    @classmethod
    def whole(cls, records: Mapping[str, RecordSet]) -> Residency:
        """Return that of a run whose records are all in host memory."""
        return cls(frozenset(records), {owner: len(unit.chunks) for owner, unit in records.items()})

    def weights_nbytes(self, unit: RecordSet) -> int:
        """Return the bytes of a unit's weights and frozen records that are in host memory: all or none."""
        return unit.host_nbytes if unit.owner in self.weights else 0

    def optimizer_nbytes(self, unit: RecordSet) -> int:
        """Return the bytes of a unit's optimizer record that are in host memory, from its first."""
        count = self.chunks.get(unit.owner, 0)
        return unit.chunks[count - 1].offset_bytes + unit.chunks[count - 1].nbytes if count else 0

    def nbytes(self, records: Mapping[str, RecordSet]) -> int:
        """Return the bytes of host memory that all of it takes."""
        return sum(self.weights_nbytes(unit) + self.optimizer_nbytes(unit) for unit in records.values())

    def mutable_nbytes(self, records: Mapping[str, RecordSet]) -> int:
        """Return the bytes that a step changes, and a commit writes."""
        return sum(
            (unit.weights_nbytes if unit.owner in self.weights else 0) + self.optimizer_nbytes(unit)
            for unit in records.values()
        )

    def is_whole(self, records: Mapping[str, RecordSet]) -> bool:
        """Return whether nothing is left on disk."""
        return all(
            owner in self.weights and self.chunks.get(owner, 0) == len(unit.chunks)
            for owner, unit in records.items()
        )
