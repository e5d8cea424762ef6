"""The live table of records: which extent holds which generation, and what is in flight on each.

A *version* is one generation's bytes of a record in one extent. A record has at most two: the committed
one and the one being built. Building never touches the committed one's extent, where the record has two;
a record of one extent is built over what is committed, chunk by chunk.

Thread rule: none of its own; every method is called under the store's lock, and none blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from ..errors import StateError
from .framing import chunk_seed
from .records import RecordEntry, RecordSpec
from .stripe import Stripe
from .ticket import Ticket

__all__ = ["Record", "Version", "describe_ranges"]


@dataclass(slots=True)
class Version:
    """One generation's bytes of a record.

    Attributes:
        extent: where they are.
        generation: whose they are.
        checksums: crc32c of each chunk; meaningless where `written` is 0.
        written: for each chunk whether this generation wrote it.
    """

    extent: int
    generation: int
    checksums: array[int]
    written: bytearray

    @classmethod
    def empty(cls, extent: int, generation: int, num_chunks: int) -> Version:
        """Return a version of which no chunk is written."""
        return cls(extent, generation, array("I", bytes(4 * num_chunks)), bytearray(num_chunks))

    def put(self, first: int, checksums: Sequence[int]) -> None:
        """Note that chunks from `first` on were written, with these checksums."""
        end = first + len(checksums)
        self.checksums[first:end] = array("I", checksums)
        self.written[first:end] = b"\x01" * len(checksums)


@dataclass(slots=True)
class Record:
    """One record of an open run.

    Attributes:
        run_id: the run.
        index: its position in the table, which its checksums are seeded with.
        spec: name, length, mutability.
        stripe: how its chunks are dealt.
        offsets: for each extent, its byte offset in each drive's data file.
        committed: the committed version, None when it was never written.
        pending: the version being built, None when this generation did not write it.
    """

    run_id: UUID
    index: int
    spec: RecordSpec
    stripe: Stripe
    offsets: tuple[tuple[int, ...], ...]
    committed: Version | None = None
    pending: Version | None = None
    _in_flight: list[Ticket] = field(default_factory=list)

    @classmethod
    def from_entry(cls, run_id: UUID, index: int, entry: RecordEntry, stripe: Stripe) -> Record:
        """Return the record that a manifest describes."""
        committed = None
        if entry.generation:
            committed = Version(
                entry.extent,
                entry.generation,
                array("I", entry.checksums),
                bytearray(b"\x01") * stripe.num_chunks,
            )
        return cls(run_id, index, entry.spec, stripe, entry.offsets, committed)

    def seed(self, chunk: int, generation: int) -> int:
        """Return what the checksum of a chunk written in `generation` begins from."""
        return chunk_seed(self.run_id, self.index, chunk, generation)

    def next_entry(self) -> RecordEntry:
        """Return what the next manifest says about the record."""
        version = self.pending if self.is_dirty else self.committed
        if version is None:
            return RecordEntry(self.spec, self.offsets)
        return RecordEntry(self.spec, self.offsets, version.extent, version.generation, version.checksums)

    def newest(self, first: int, end: int) -> list[tuple[Version, int, int]]:
        """Return which version holds the newest bytes of chunks `first` to `end`, in order, in spans.

        Raises:
            StateError: a chunk that was never written.
        """
        spans: list[tuple[Version, int, int]] = []
        while first < end:
            stop = end
            version = self.committed
            if self.pending is not None:
                flag = self.pending.written[first]
                change = self.pending.written.find(0 if flag else 1, first, end)
                stop = end if change < 0 else change
                version = self.pending if flag else self.committed
            if version is None:
                raise StateError(
                    f"chunk {first} of record {self.spec.name} was never written; write the record before "
                    "reading it"
                )
            spans.append((version, first, stop))
            first = stop
        return spans

    def version_to_write(self, generation: int) -> Version:
        """Return the version being built, begun now in the free extent if there is none.

        Raises:
            StateError: the record is immutable and already committed.
        """
        if self.pending is None:
            extent = 0
            if self.committed is not None:
                if not self.spec.mutable:
                    raise StateError(
                        f"record {self.spec.name} is immutable and was committed in generation "
                        f"{self.committed.generation}; create it with mutable=True to write it again"
                    )
                extent = (self.committed.extent + 1) % len(self.offsets)
            self.pending = Version.empty(extent, generation, self.stripe.num_chunks)
        return self.pending

    @property
    def is_dirty(self) -> bool:
        """Whether any chunk was written since the last commit."""
        return self.pending is not None and 1 in self.pending.written

    def missing(self) -> list[int]:
        """Return the chunks that the version being built lacks; none when no chunk of it was written."""
        if self.pending is None or not self.is_dirty or 0 not in self.pending.written:
            return []
        return [chunk for chunk, written in enumerate(self.pending.written) if not written]

    def commit(self) -> None:
        """Make the version being built the committed one."""
        if self.is_dirty:
            self.committed = self.pending
        self.pending = None

    def claim(self, ticket: Ticket) -> list[Ticket]:
        """Note that `ticket` uses its pieces, and return the earlier tickets that must settle first."""
        self._in_flight = [other for other in self._in_flight if not other.has_ended()]
        earlier = [
            other
            for other in self._in_flight
            if (ticket.is_write or other.is_write)
            and any(mine.overlaps(piece) for mine in ticket.pieces for piece in other.pieces)
        ]
        self._in_flight.append(ticket)
        return earlier

    def in_flight(self) -> list[Ticket]:
        """Return the tickets that may still have transfers in flight."""
        return [ticket for ticket in self._in_flight if not ticket.has_ended()]


def describe_ranges(numbers: Sequence[int], limit: int = 4) -> str:
    """Return sorted numbers as ranges, `0-3, 7`, the first `limit` of them.

    >>> describe_ranges([0, 1, 2, 3, 7])
    '0-3, 7'
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = [str(low) if low == high else f"{low}-{high}" for low, high in ranges[:limit]]
    return ", ".join(shown) + (f" and {len(ranges) - limit} more ranges" if len(ranges) > limit else "")
