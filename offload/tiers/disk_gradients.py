"""Parked gradients on disk: written when they have arrived in host memory, read for the next backward or
the update.

Owns the slots of the ring, one for each gradient on its way to disk, and knows which gradients of the step
in progress are there. A gradient in a slot is written by whoever has measured it (`write`); its slot is
taken back by the next caller who needs one, who would have to wait for it anyway, so no thread stands by.

[Note: progress of the ring] A slot is held by a write, which ends without anybody, by a gradient that is
being measured, which waits for its copy alone, or by one read ahead for the visit to come. At most one is
read ahead, and only with two slots or more. So whoever waits for a slot is never waited for.

Invariants: a gradient is read only when its write has been asked for, and the scratch area lets the read
wait for it; none is read ahead while a visit adds to it; a slot is lent again only when nothing is in flight
into or out of it.

Thread rule: `write` and `fail` by any thread; `read_part` by the update thread; the rest by the thread that
runs backward or ends the step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from ..buffers import Arena, Lease, Pool
from ..errors import OffloadError
from ..store import Ticket
from ..store.scratch import Scratch
from ..trace import Tracer
from .gradient_homes import PartLayout

__all__ = ["DiskGradients"]


@dataclass(frozen=True)
class _Transfer:
    """A gradient in a slot, on its way to disk or back."""

    owner: str
    lease: Lease
    ticket: Ticket
    nbytes: int
    issued_s: float


class DiskGradients:
    """See the module.

    Args:
        scratch: has a record for each gradient, by owner.
        host: the arena of the slots.
        ring: slots that are all as large as the largest gradient.
        numel: elements of each gradient, by owner.
        layout: how they are cut into parts.
        trace: counts the bytes.
    """

    def __init__(
        self,
        *,
        scratch: Scratch,
        host: Arena,
        ring: Pool,
        numel: Mapping[str, int],
        layout: PartLayout,
        trace: Tracer,
    ) -> None:
        self._scratch = scratch
        self._host = host
        self._ring = ring
        self._numel = dict(numel)
        self._layout = layout
        self._trace = trace
        self._changed = threading.Condition()
        self._kept: dict[str, None] = {}
        self._arriving: set[str] = set()
        # Brought back, and added to until `lease`: what is on disk of them is not their sum any more.
        self._in_hand: set[str] = set()
        self._writes: deque[_Transfer] = deque()
        self._ahead: _Transfer | None = None
        self._error: BaseException | None = None

    @property
    def owners(self) -> Collection[str]:
        """Owners whose parked gradient goes to disk."""
        return self._numel.keys()

    def kept(self) -> tuple[str, ...]:
        """Return the owners that have a gradient of this step."""
        return tuple(self._kept)

    # -- backward ----------------------------------------------------------------------------

    def lease(self, owner: str) -> Lease:
        """Return a slot for the owner's gradient, which `write` is to be called for once.

        Raises:
            OffloadError: an earlier gradient could not be written.
        """
        lease = self._slot(owner)
        self._in_hand.discard(owner)
        with self._changed:
            self._kept[owner] = None
            self._arriving.add(owner)
        return lease

    def write(self, owner: str, lease: Lease) -> None:
        """Begin to write the gradient in `lease`, which has arrived; takes the lease over.

        Raises:
            OffloadError: it cannot be written; the lease is released.
        """
        nbytes = self._scratch.records[owner].nbytes
        issued_s = time.perf_counter()
        try:
            ticket = self._scratch.write(owner, self._host.view(lease, 0, nbytes))
        except BaseException:
            lease.release()
            raise
        self._trace.count("disk_written_nbytes", nbytes)
        self._trace.count("parked_written_nbytes", nbytes)
        with self._changed:
            self._writes.append(_Transfer(owner, lease, ticket, nbytes, issued_s))
            self._arriving.discard(owner)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Wake whoever waits for a gradient that will not be written, with `error`."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def restore(self, owner: str) -> Lease | None:
        """Return a slot with the owner's gradient of this step, None when there is none yet.

        The caller releases the lease.

        Raises:
            OffloadError: it cannot be read, or was not written.
        """
        if owner not in self._kept:
            return None
        self._in_hand.add(owner)
        if self._ahead is not None and self._ahead.owner != owner:
            self._drop_ahead()
        transfer, self._ahead = self._ahead or self._begin_read(owner, self._slot(owner)), None
        try:
            self._finish_read(transfer)
        except BaseException:
            transfer.lease.release()
            raise
        return transfer.lease

    def read_ahead(self, owner: str) -> None:
        """Begin to read a gradient that the next visit adds to, where a slot can be spared."""
        if owner not in self._kept or self._ahead is not None or len(self._ring.slots) < 2:
            return
        if owner in self._in_hand:
            # Neighbours that share a parameter: the next visit adds to what this one is still adding to.
            return
        self._collect()
        lease = self._ring.try_lease(self._nbytes(owner), f"{owner} gradient read ahead")
        if lease is not None:
            self._ahead = self._begin_read(owner, lease)

    # -- the end of a step -------------------------------------------------------------------

    def take(self, owner: str) -> None:
        """Count the owner's gradient as handed over to the update."""
        if self._ahead is not None and self._ahead.owner == owner:
            self._drop_ahead()
        del self._kept[owner]

    def discard(self) -> None:
        """Forget every gradient of the step."""
        self._drop_ahead()
        self._kept.clear()

    def close(self) -> None:
        """Wait for what is in flight; nothing is written any more. The pools must outlive this call."""
        self._drop_ahead()
        while self._writes:
            write = self._writes.popleft()
            with suppress(OffloadError):  # The run is over; a resume does not need it.
                write.ticket.wait()
            write.lease.release()

    # -- the update --------------------------------------------------------------------------

    def part(self, owner: str, start: int, stop: int) -> tuple[int, int]:
        """Return the first byte and the length of what is read for elements [start, stop)."""
        return self._layout.part(start, stop, self._numel[owner])

    def read_part(self, owner: str, start: int, stop: int, memory: memoryview) -> Ticket:
        """Begin to read the `part` of a gradient with elements [start, stop) into `memory`.

        Raises:
            OffloadError: it cannot be read.
        """
        offset, nbytes = self.part(owner, start, stop)
        self._count_read(nbytes)
        return self._scratch.read(owner, memory, offset=offset, nbytes=nbytes)

    # -- parts -------------------------------------------------------------------------------

    def _nbytes(self, owner: str) -> int:
        return self._scratch.records[owner].nbytes

    def _count_read(self, nbytes: int) -> None:
        self._trace.count("disk_read_nbytes", nbytes)
        self._trace.count("parked_read_nbytes", nbytes)

    def _slot(self, owner: str) -> Lease:
        """Lease a slot, waiting for the oldest write when there is none; see [Note: progress of the ring]."""
        began_s = time.perf_counter()
        self._collect()
        while True:
            lease = self._ring.try_lease(self._nbytes(owner), f"{owner} gradient")
            if lease is not None:
                break
            with self._changed:
                self._changed.wait_for(lambda: self._writes or self._error is not None)
                if self._error is not None:
                    raise self._error
                write = self._writes.popleft()
            self._finish_write(write)
        ended_s = time.perf_counter()
        if ended_s - began_s > 1e-4:
            self._trace.add("stall", "wait for a gradient buffer", began_s, ended_s, owner=owner)
        return lease

    def _collect(self) -> None:
        """Take back the slots of writes that have landed."""
        while True:
            with self._changed:
                if not self._writes or not self._writes[0].ticket.done():
                    return
                write = self._writes.popleft()
            self._finish_write(write)

    def _finish_write(self, write: _Transfer) -> None:
        try:
            write.ticket.wait()
        finally:
            write.lease.release()
        self._show(write, "disk write")

    def _begin_read(self, owner: str, lease: Lease) -> _Transfer:
        with self._changed:
            # It may not have been measured yet, so that its write was not asked for.
            self._changed.wait_for(lambda: owner not in self._arriving or self._error is not None)
            error = self._error
        nbytes = self._nbytes(owner)
        issued_s = time.perf_counter()
        try:
            if error is not None:
                raise error
            ticket = self._scratch.read(owner, self._host.view(lease, 0, nbytes))
        except BaseException:
            lease.release()
            raise
        self._count_read(nbytes)
        return _Transfer(owner, lease, ticket, nbytes, issued_s)

    def _finish_read(self, read: _Transfer) -> None:
        began_s = time.perf_counter()
        read.ticket.wait()
        ended_s = time.perf_counter()
        if ended_s - began_s > 1e-4:
            self._trace.add("stall", "wait for a gradient", began_s, ended_s, owner=read.owner)
        self._show(read, "disk read")

    def _drop_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            with suppress(OffloadError):  # Nobody wants it any more; whoever does reads it again.
                ahead.ticket.wait()
            ahead.lease.release()

    def _show(self, transfer: _Transfer, track: str) -> None:
        ended_s = transfer.ticket.finished_s or transfer.issued_s
        name = f"{transfer.owner} gradient"
        self._trace.add(track, name, transfer.issued_s, ended_s, nbytes=transfer.nbytes)
