"""Reads and writes the records of updates: chunks ahead of their turn, written back behind it.

Owns the staging slots while chunks are in them, and the writes in flight. Backward completes
gradients in a known order, so the first chunks of the next update are in memory before its gradient
is; while a chunk is computed the next is read and the one before is written. An update between passes
has its weights read here, too; during backward they come with it. Records that live in host memory do not
pass through here.

Invariants: chunks are taken in the order they are asked for; a slot is reused when its write has
landed; `on_landed` is called for a unit when its weights record and everything before it are in the
store.

Thread rule: the update thread only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..buffers import Arena, Lease, Pool
from ..codec import OptimizerChunk
from ..errors import OffloadError
from ..specs import RecordKind
from ..store import Store, Ticket
from ..tiers.masters import begin_reading_weights
from ..tiers.records import RecordSet
from ..tiers.residents import ResidentRecords
from ..trace import Tracer

__all__ = ["ChunkPipeline"]


@dataclass
class _Staged:
    """A chunk of an optimizer record in a staging slot, read or being read."""

    owner: str
    chunk: OptimizerChunk
    lease: Lease
    ticket: Ticket
    issued_s: float


@dataclass
class _Weights:
    """A unit's weights and frozen records, read or being read for an update between passes."""

    owner: str
    lease: Lease
    tickets: list[Ticket]
    issued_s: float


@dataclass(frozen=True)
class _Write:
    """A write in flight; its lease goes back when it has landed.

    `completes` marks a weights record, the last write of its unit: once it and all before it have
    landed, the unit's records can be fetched again.
    """

    owner: str
    ticket: Ticket
    lease: Lease
    nbytes: int
    issued_s: float
    completes: bool


class ChunkPipeline:
    """See the module."""

    def __init__(
        self,
        *,
        records: Mapping[str, RecordSet],
        host: Arena,
        residents: ResidentRecords,
        staging: Pool | None,
        weights: Pool | None,
        store: Store,
        on_landed: Callable[[str, Lease], None],
        trace: Tracer,
    ) -> None:
        self._records = records
        self._host = host
        self._residents = residents
        self._slots = staging
        self._weights_slots = weights
        self._store = store
        self._on_landed = on_landed
        self._trace = trace
        self._order: tuple[str, ...] = ()
        self._next_record = 0
        self._next_chunk = 0
        self._staged: deque[_Staged] = deque()
        self._taken: _Staged | None = None
        self._weights_ahead: _Weights | None = None
        self._writes: deque[_Write] = deque()

    def advance(self) -> bool:
        """Use idle time: read ahead, else wait for the oldest write; False when there is neither."""
        if self._read_next():
            return True
        if not self._writes:
            return False
        self._finish(down_to=len(self._writes) - 1)
        return True

    def take(self, owner: str, chunk: OptimizerChunk) -> memoryview:
        """Return a chunk's bytes, read by now, to be updated in place; `write_back` is next."""
        assert self._taken is None, "the chunk before was not written back"
        staged = self._taken = self._next_staged(owner, chunk)
        # Keep the drive busy while this chunk is verified and computed.
        self._read_next()
        staged.ticket.wait()
        ended_s = staged.ticket.finished_s or staged.issued_s
        self._trace.add("disk read", owner, staged.issued_s, ended_s, nbytes=chunk.nbytes)
        self._trace.count("disk_read_nbytes", chunk.nbytes)
        return self._host.view(staged.lease, 0, chunk.nbytes)

    def write_back(self, owner: str, chunk: OptimizerChunk) -> None:
        """Begin to write the chunk taken last; its slot is free when it has landed."""
        assert self._taken is not None
        staged, self._taken = self._taken, None
        memory = self._host.view(staged.lease, 0, chunk.nbytes)
        self._write(owner, "optimizer", memory, chunk.offset_bytes, staged.lease)

    def take_weights(self, owner: str) -> Lease:
        """Return a lease with a unit's weights and frozen records, read by now; `write_weights` is next.

        The weights of the update predicted behind it are begun.
        """
        weights, self._weights_ahead = self._weights_ahead, None
        if weights is not None and weights.owner != owner:
            _drop(weights)
            weights = None
        while weights is None and self._writes:
            weights = self._begin_weights(owner)
            if weights is None:
                self._finish(down_to=len(self._writes) - 1)
        if weights is None:
            # No slot is on its way out of here: what holds them is on its way to the device.
            weights = self._begin_weights(owner, block=True)
        assert weights is not None
        for ticket in weights.tickets:
            ticket.wait()
        record = self._records[owner]
        ended_s = max(ticket.finished_s or weights.issued_s for ticket in weights.tickets)
        self._trace.add("disk read", owner, weights.issued_s, ended_s, nbytes=record.host_nbytes)
        self._trace.count("disk_read_nbytes", record.host_nbytes)
        following = self._next_weights(owner)
        if following is not None:
            self._weights_ahead = self._begin_weights(following)
        return weights.lease

    def write_weights(self, owner: str, lease: Lease) -> None:
        """Begin to write a weights record, the last of its unit; `on_landed` gets the lease back."""
        memory = self._host.view(lease, 0, self._records[owner].weights_nbytes)
        self._write(owner, "weights", memory, 0, lease)

    def finish_writes(self) -> None:
        """Wait until every write has landed.

        Raises:
            OffloadError: one of them failed.
        """
        self._finish(down_to=0)

    def restart(self, order: Sequence[str]) -> None:
        """Forget what was read ahead and predict by `order` from its beginning; nothing when empty."""
        self._drop_staged()
        if self._weights_ahead is not None:
            _drop(self._weights_ahead)
            self._weights_ahead = None
        self._order, self._next_record, self._next_chunk = tuple(order), 0, 0

    def settle(self) -> OffloadError | None:
        """Wait for all I/O after a failure, give every lease back, and return the first error met."""
        first: OffloadError | None = None
        pending = [(write.ticket, write.lease) for write in self._writes]
        taken = () if self._taken is None else (self._taken,)
        pending += [(staged.ticket, staged.lease) for staged in (*taken, *self._staged)]
        if self._weights_ahead is not None:
            ahead, self._weights_ahead = self._weights_ahead, None
            pending += [(ticket, ahead.lease) for ticket in ahead.tickets]
        for ticket, _ in pending:
            try:
                ticket.wait()
            except OffloadError as error:
                first = first or error
        for _, lease in pending:
            if not lease.released:
                lease.release()
        self._writes.clear()
        self._staged.clear()
        self._taken = None
        return first

    def _next_weights(self, owner: str) -> str | None:
        """Return the next owner behind `owner` whose weights are on disk; None when there is none."""
        behind = self._order[self._order.index(owner) + 1 :] if owner in self._order else ()
        return next((one for one in behind if not self._residents.holds_weights(one)), None)

    def _begin_weights(self, owner: str, *, block: bool = False) -> _Weights | None:
        record = self._records[owner]
        assert self._weights_slots is not None
        holder = f"{owner} weights under update"
        if block:
            lease: Lease | None = self._weights_slots.lease(record.host_nbytes, holder)
        else:
            lease = self._weights_slots.try_lease(record.host_nbytes, holder)
        if lease is None:
            return None
        memory = self._host.view(lease, 0, record.host_nbytes)
        issued_s = time.perf_counter()
        return _Weights(owner, lease, begin_reading_weights(self._store, record, memory), issued_s)

    def _next_staged(self, owner: str, chunk: OptimizerChunk) -> _Staged:
        staged = self._staged
        if staged and (staged[0].owner, staged[0].chunk) != (owner, chunk):
            self._drop_staged()
        if not staged:
            self._point_at(owner, chunk)
            while not self._read_next():
                # Every slot holds a chunk on its way out.
                self._finish(down_to=len(self._writes) - 1)
        return staged.popleft()

    def _read_next(self) -> bool:
        """Begin one read of the predicted order; False when there is none or no slot is free."""
        ahead = self._next_ahead()
        if ahead is None:
            return False
        owner, chunk = ahead
        self._finish(down_to=None)
        assert self._slots is not None, "there are slots where chunks are on disk"
        lease = self._slots.try_lease(chunk.nbytes, f"{owner} optimizer chunk")
        if lease is None:
            return False
        view = self._host.view(lease, 0, chunk.nbytes)
        # Before it is submitted: a small read may end before the call returns.
        issued_s = time.perf_counter()
        name = self._records[owner].name("optimizer")
        ticket = self._store.read(name, view, offset=chunk.offset_bytes, nbytes=chunk.nbytes)
        self._staged.append(_Staged(owner, chunk, lease, ticket, issued_s))
        self._next_chunk += 1
        return True

    def _next_ahead(self) -> tuple[str, OptimizerChunk] | None:
        """Return the next chunk on disk of the predicted order; None behind the last."""
        while self._next_record < len(self._order):
            owner = self._order[self._next_record]
            chunks = self._records[owner].chunks
            first = max(self._next_chunk, self._residents.num_chunks(owner))
            if first < len(chunks):
                self._next_chunk = first
                return owner, chunks[first]
            self._next_record, self._next_chunk = self._next_record + 1, 0
        return None

    def _point_at(self, owner: str, chunk: OptimizerChunk) -> None:
        """Make (owner, chunk) the next to be read, then go on in the predicted order."""
        if owner not in self._order:
            self._order = (owner,)
        self._next_record = self._order.index(owner)
        self._next_chunk = self._records[owner].chunks.index(chunk)

    def _drop_staged(self) -> None:
        while self._staged:
            staged = self._staged.popleft()
            staged.ticket.wait()
            staged.lease.release()

    def _write(self, owner: str, kind: RecordKind, memory: memoryview, offset: int, lease: Lease) -> None:
        name = self._records[owner].name(kind)
        issued_s = time.perf_counter()
        ticket = self._store.write(name, memory, offset=offset, nbytes=len(memory))
        self._trace.count("disk_written_nbytes", len(memory))
        completes = kind == "weights"
        self._writes.append(_Write(owner, ticket, lease, len(memory), issued_s, completes))

    def _finish(self, *, down_to: int | None) -> None:
        """Wait for the oldest writes until `down_to` are left; None: collect those that are done."""
        while self._writes and (
            self._writes[0].ticket.done() if down_to is None else len(self._writes) > down_to
        ):
            write = self._writes[0]
            write.ticket.wait()
            self._writes.popleft()
            ended_s = write.ticket.finished_s or write.issued_s
            self._trace.add("disk write", write.owner, write.issued_s, ended_s, nbytes=write.nbytes)
            if write.completes:
                self._on_landed(write.owner, write.lease)
            else:
                write.lease.release()


def _drop(weights: _Weights) -> None:
    for ticket in weights.tickets:
        ticket.wait()
    weights.lease.release()
