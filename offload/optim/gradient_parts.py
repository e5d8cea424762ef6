"""Reads the parts of gradients that were parked on disk, a part for each optimizer chunk, ahead of updates.

Owns the slots of parts. Updates between passes are submitted together, so the parts to come are known and
are read in their order while the updates before are computed.

Thread rule: `expect` by the thread that submits updates; the rest by the update thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from ..buffers import Arena, Lease, Pool
from ..codec import OptimizerChunk
from ..errors import OffloadError
from ..store import Ticket
from ..tiers.disk_gradients import DiskGradients
from ..tiers.records import RecordSet
from ..trace import Tracer

__all__ = ["GradientParts"]


@dataclass(frozen=True)
class _Part:
    """The part of one gradient that one chunk needs, read or being read."""

    owner: str
    chunk: OptimizerChunk
    lease: Lease
    ticket: Ticket
    begin: int
    nbytes: int
    issued_s: float


class GradientParts:
    """See the module."""

    def __init__(
        self,
        *,
        records: Mapping[str, RecordSet],
        disk: DiskGradients,
        itemsize: int,
        host: Arena,
        slots: Pool,
        trace: Tracer,
    ) -> None:
        self._records = records
        self._disk = disk
        self._itemsize = itemsize
        self._host = host
        self._slots = slots
        self._trace = trace
        self._to_come: deque[tuple[str, OptimizerChunk]] = deque()
        self._read: deque[_Part] = deque()
        self._taken: _Part | None = None

    def expect(self, owner: str) -> None:
        """Note that the update of `owner` comes next behind those noted before."""
        record = self._records[owner]
        self._to_come.extend(
            (owner, chunk) for chunk in record.format.optimizer_chunks(record.layout.trainable_numel)
        )

    def advance(self) -> bool:
        """Begin to read the next part to come; False when there is none or no slot is free."""
        if not self._to_come:
            return False
        owner, chunk = self._to_come[0]
        begin, nbytes = self._disk.part(owner, chunk.start, chunk.stop)
        lease = self._slots.try_lease(nbytes, f"{owner} part of a gradient")
        if lease is None:
            return False
        issued_s = time.perf_counter()
        try:
            memory = self._host.view(lease, 0, nbytes)
            ticket = self._disk.read_part(owner, chunk.start, chunk.stop, memory)
        except BaseException:
            lease.release()
            raise
        self._to_come.popleft()
        self._read.append(_Part(owner, chunk, lease, ticket, begin, nbytes, issued_s))
        return True

    def take(self, owner: str, chunk: OptimizerChunk) -> memoryview:
        """Return the bytes of the gradient for a chunk, read by now; `give_back` is next.

        Raises:
            OffloadError: they could not be read.
        """
        assert self._taken is None, "the part before was not given back"
        if not self._read:
            begun = self.advance()
            assert begun, "every slot was given back"
        part = self._taken = self._read.popleft()
        assert (part.owner, part.chunk) == (owner, chunk), "parts are taken in the order of the updates"
        part.ticket.wait()
        ended_s = part.ticket.finished_s or part.issued_s
        self._trace.add("disk read", f"{owner} gradient", part.issued_s, ended_s, nbytes=part.nbytes)
        while self.advance():
            pass
        return self._host.view(
            part.lease, chunk.start * self._itemsize - part.begin, (chunk.stop - chunk.start) * self._itemsize
        )

    def give_back(self) -> None:
        """End the use of the part taken last."""
        assert self._taken is not None
        taken, self._taken = self._taken, None
        taken.lease.release()

    def settle(self) -> None:
        """Wait for all reads and give every lease back: no update is to come."""
        self._to_come.clear()
        taken = () if self._taken is None else (self._taken,)
        for part in (*taken, *self._read):
            with suppress(OffloadError):  # The first error ended the updates and is reported.
                part.ticket.wait()
            part.lease.release()
        self._read.clear()
        self._taken = None
