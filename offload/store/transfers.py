"""Reads and writes of a table's records: in the order they were asked for, checksummed, and waited for.

What the store and its scratch areas share. It owns the lock of the table and knows what is in flight; what
may be read or written, and as which generation, is for its owner to say (`allow`).

Thread rule: `read` and `write` from any threads. No lock is held while waiting for a drive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..aio.engine import Engine
from ..errors import StateError
from .drives import Drive
from .span import Span
from .submit import submit, submitting
from .table import Record, Version
from .ticket import Piece, Ticket

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Source", "Transfers"]

# Chunks of a record to read: the version that has them, the first, and the one behind the last.
Source = tuple[Version, int, int]


class Transfers:
    """See the module.

    Args:
        whose: the records are, for messages.
        drives: what they lie on.
        records: the table, by name.
        engine: does the I/O.

    Attributes:
        lock: guards the table and what its owner decides by it.
    """

    def __init__(
        self, whose: str, drives: Sequence[Drive], records: Mapping[str, Record], *, engine: Engine
    ) -> None:
        self.lock = threading.Lock()
        self._whose = whose
        self._drives = drives
        self._records = records
        self._engine = engine

    def record(self, name: str) -> Record:
        """Return a record of the table.

        Raises:
            StateError: it has none of that name.
        """
        record = self._records.get(name)
        if record is None:
            raise StateError(f"{self._whose} has no record {name!r} among its {len(self._records)}")
        return record

    def read(
        self,
        name: str,
        buffer: Buffer,
        offset: int,
        nbytes: int | None,
        *,
        allow: Callable[[Record, Sequence[Source]], None],
    ) -> Ticket:
        """Begin to read the newest bytes of a record, behind the writes of them that are in flight.

        Args:
            name, buffer, offset, nbytes: as in `Store.read`.
            allow: raises what forbids it. Called under the lock: at first without sources, and with those
                to be read when the writes before have ended, one of which may have failed.
        """
        span = Span.of(self.record(name), buffer, offset, nbytes)
        if span.view.readonly:
            raise ValueError(f"the buffer to read record {name} into is read-only")
        with self.lock:
            allow(span.record, ())
            sources = span.record.newest(span.first, span.end)
            pieces = [Piece(version.extent, first, end) for version, first, end in sources]
            ticket = Ticket(name, pieces, is_write=False)
            earlier = span.record.claim(ticket)
        with submitting(ticket, earlier) as parts:
            with self.lock:
                if len(span.record.offsets) == 1:
                    # A write that was begun before and has ended by now: it went over the bytes seen above.
                    sources = span.record.newest(span.first, span.end)
                allow(span.record, sources)
            for version, first, end in sources:
                transfers = span.transfers(version, first, end, verify=True)
                submit(self._engine, self._drives, "read", parts, transfers)
        return ticket

    def write(
        self,
        name: str,
        buffer: Buffer,
        offset: int,
        nbytes: int | None,
        *,
        allow: Callable[[], int],
        on_failure: Callable[[BaseException], None],
    ) -> Ticket:
        """Begin to write bytes of a record into the version being built, and checksum them.

        Args:
            name, buffer, offset, nbytes: as in `Store.write`.
            allow: returns the generation to write as, or raises what forbids it; called under the lock.
            on_failure: called once with why a transfer failed, perhaps under the lock.
        """
        span = Span.of(self.record(name), buffer, offset, nbytes)
        with self.lock:
            version = span.record.version_to_write(allow())
            piece = Piece(version.extent, span.first, span.end)
            ticket = Ticket(name, [piece], is_write=True, on_failure=on_failure)
            earlier = span.record.claim(ticket)
        with submitting(ticket, earlier) as parts:
            transfers = span.transfers(version, span.first, span.end, verify=False)
            submit(self._engine, self._drives, "write", parts, transfers)
            checksums = span.checksums(version.generation)  # while the drives are at work
            with self.lock:
                version.put(span.first, checksums)
        return ticket

    def in_flight(self) -> list[Ticket]:
        """Return the tickets that may still have transfers in flight; called under the lock."""
        return [ticket for record in self._records.values() for ticket in record.in_flight()]
