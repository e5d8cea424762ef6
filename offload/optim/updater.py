"""Runs AdamW over records behind backward's back: read a chunk, update it, write it, in order.

Owns one update thread, the staging slots for optimizer chunks, and the queue of work: updates in
the order their gradients completed, and commits between them. Because one thread takes them in
order, every write of step n is in the store before its commit, and none of step n+1.

While it waits for a gradient it reads ahead: backward goes through the units in a known order, so
the first chunks of the next update are in memory before its gradient is.

Invariants: a chunk is read, updated and written once a step; weights are written after all their
chunks were updated; a record can be fetched again (`on_updated`) only when its bytes are in the store.

Thread rule: `submit`, `commit` and `drain` by the thread that runs the model. An error of the update
thread is given to `on_error` once, and raised by `drain`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..buffers import Arena, Lease, Pool
from ..codec import OptimizerChunk
from ..errors import OffloadError
from ..gradients import FinishedGradient
from ..records import RecordSet
from ..residents import ResidentRecords
from ..specs import RecordKind
from ..store import Store, Ticket
from ..trace import Tracer
from .chunk import ChunkMemory, update_chunk
from .groups import ParameterSettings

__all__ = ["Update", "Updater"]


@dataclass(frozen=True)
class Update:
    """One record's update: everything it needs, fixed when it is submitted.

    Attributes:
        owner: the unit.
        weights: host lease with the weights record, updated in place and written.
        gradient: its gradient on the host, or on the way there.
        settings: learning rate and the rest by parameter name, as of this step.
        step: optimizer steps including this one, from 1.
    """

    owner: str
    weights: Lease
    gradient: FinishedGradient
    settings: Mapping[str, ParameterSettings]
    step: int


@dataclass(frozen=True)
class _Commit:
    state: Mapping[str, Any]
    step: int


@dataclass(frozen=True)
class _Pause:
    """Give the staging slots back: what follows on another thread needs them."""

    reached: threading.Event


@dataclass
class _Staged:
    """A chunk of an optimizer record in a staging slot, read or being read."""

    owner: str
    chunk: OptimizerChunk
    lease: Lease
    ticket: Ticket
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


@dataclass
class _ReadAhead:
    """Chunks read before their turn, and the position in the predicted order."""

    order: Sequence[str] = ()
    next_record: int = 0
    next_chunk: int = 0
    staged: deque[_Staged] = field(default_factory=deque)


class Updater:
    """See the module."""

    def __init__(
        self,
        *,
        records: Mapping[str, RecordSet],
        host: Arena,
        staging: Pool | None,
        store: Store | None,
        residents: ResidentRecords | None,
        num_threads: int,
        on_updated: Callable[[str, Lease], None],
        on_committed: Callable[[int, int], None],
        on_error: Callable[[BaseException], None],
        trace: Tracer,
    ) -> None:
        self._records = records
        self._host = host
        self._staging = staging
        self._store = store
        self._residents = residents
        self._num_threads = num_threads
        self._on_updated = on_updated
        self._on_committed = on_committed
        self._on_error = on_error
        self._trace = trace
        self._order: tuple[str, ...] = ()
        self._ahead = _ReadAhead()
        self._writes: deque[_Write] = deque()
        self._work: queue.SimpleQueue[Update | _Commit | _Pause | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="offload-update", daemon=True)
        self._thread.start()

    # -- the model's thread ------------------------------------------------------------------

    def expect(self, order: Sequence[str]) -> None:
        """Predict the owners that a step updates, in order; takes effect at the next commit."""
        self._order = tuple(order)

    def submit(self, update: Update) -> None:
        """Queue one record's update; the thread takes over its leases."""
        self._work.put(update)

    def commit(self, state: Mapping[str, Any], step: int) -> None:
        """Queue a commit of everything submitted so far, with `state` in its manifest."""
        self._work.put(_Commit(state, step))

    def drain(self) -> None:
        """Wait until all queued work is done.

        Raises:
            OffloadError: the thread's error, if it failed.
        """
        reached = threading.Event()
        self._work.put(reached)
        reached.wait()
        if self._error is not None:
            raise self._error

    def quiet(self) -> None:
        """Wait as `drain` does, and give every staging slot back; the next commit reads ahead again.

        Raises:
            OffloadError: the thread's error, if it failed.
        """
        pause = _Pause(threading.Event())
        self._work.put(pause)
        pause.reached.wait()
        self.drain()

    def close(self) -> None:
        """Finish the queue and stop the thread. The pools must outlive this call."""
        self._work.put(None)
        self._thread.join()

    # -- the update thread -------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            item = self._next_item()
            if item is None:
                self._settle()
                return
            if isinstance(item, threading.Event):
                item.set()
            elif isinstance(item, _Pause):
                self._stop_reading_ahead()
                item.reached.set()
            elif self._error is not None:
                # The generation is lost already; give back what the work item owns and go on, so
                # that `drain` and `close` return.
                self._drop(item)
            else:
                self._attempt(item)

    def _next_item(self) -> Update | _Commit | _Pause | threading.Event | None:
        while self._work.empty() and self._error is None and self._make_progress():
            pass
        return self._work.get()

    def _make_progress(self) -> bool:
        """Use idle time: read ahead, else wait for the oldest write; False when there is neither."""
        try:
            if self._read_next_ahead():
                return True
            if not self._writes:
                return False
            self._finish_writes(down_to=len(self._writes) - 1)
        except OffloadError as error:
            self._fail(error)
        return True

    def _attempt(self, item: Update | _Commit) -> None:
        try:
            if isinstance(item, Update):
                self._update(item)
            else:
                self._finish_step(item)
        except (OffloadError, OSError, RuntimeError, ValueError, MemoryError) as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._settle()
        self._on_error(error)

    def _drop(self, item: Update | _Commit) -> None:
        if isinstance(item, Update):
            item.gradient.host.release()
            if self._residents is None:
                item.weights.release()

    def _update(self, update: Update) -> None:
        record = self._records[update.owner]
        layout = record.layout
        began_s = time.perf_counter()
        update.gradient.arrived.wait()
        waited_s = time.perf_counter()
        if waited_s - began_s > 1e-4:
            self._trace.add("stall", "update waits for a gradient", began_s, waited_s)
        numel = layout.trainable_numel
        dtype = update.gradient.dtype
        gradient = self._host.view(update.gradient.host, 0, numel * dtype.itemsize)
        weights = self._host.view(update.weights, 0, record.weights_nbytes)
        for chunk in record.format.optimizer_chunks(numel):
            memory, lease = self._chunk_memory(update.owner, chunk)
            with self._trace.span(update.owner, "update", elements=chunk.numel):
                update_chunk(
                    ChunkMemory(record.format, chunk, memory, weights, gradient, dtype),
                    layout.trainable,
                    update.settings,
                    step=update.step,
                    num_threads=self._num_threads,
                )
            if lease is not None:
                self._write(update.owner, "optimizer", memory, chunk.offset_bytes, lease)
        update.gradient.host.release()
        if self._residents is not None:
            self._residents.mark_dirty(update.owner)
            self._on_updated(update.owner, update.weights)
        else:
            self._write(update.owner, "weights", weights, 0, update.weights)

    def _finish_step(self, commit: _Commit) -> None:
        self._finish_writes(down_to=0)
        generation = 0
        if self._store is not None:
            with self._trace.span("commit", "commit", step=commit.step):
                if self._residents is not None:
                    self._trace.count("disk_written_nbytes", self._residents.flush(self._store))
                generation = self._store.commit(commit.state)
        self._begin_reading_ahead()
        self._on_committed(commit.step, generation)

    # -- optimizer chunks --------------------------------------------------------------------

    def _chunk_memory(self, owner: str, chunk: OptimizerChunk) -> tuple[memoryview, Lease | None]:
        """Return a chunk's bytes; with a lease when they came from the store and must go back."""
        if self._residents is not None:
            whole = self._residents.optimizer(owner)
            return whole[chunk.offset_bytes : chunk.offset_bytes + chunk.nbytes], None
        staged = self._take_staged(owner, chunk)
        staged.ticket.wait()
        self._trace.add("disk read", owner, staged.issued_s, time.perf_counter(), nbytes=chunk.nbytes)
        self._trace.count("disk_read_nbytes", chunk.nbytes)
        # Keep the drive busy while this chunk is computed.
        self._read_next_ahead()
        return self._host.view(staged.lease, 0, chunk.nbytes), staged.lease

    def _take_staged(self, owner: str, chunk: OptimizerChunk) -> _Staged:
        staged = self._ahead.staged
        if staged and (staged[0].owner, staged[0].chunk) != (owner, chunk):
            self._drop_read_ahead(owner, chunk)
        if not staged:
            self._point_read_ahead(owner, chunk)
            while not self._read_next_ahead():
                self._finish_writes(down_to=len(self._writes) - 1)
        return staged.popleft()

    def _read_next_ahead(self) -> bool:
        """Begin one read of the predicted order; False when nothing can be read now."""
        ahead = self._ahead
        if self._residents is not None or ahead.next_record >= len(ahead.order):
            return False
        assert self._staging is not None and self._store is not None
        owner = ahead.order[ahead.next_record]
        record = self._records[owner]
        chunks = record.format.optimizer_chunks(record.layout.trainable_numel)
        chunk = chunks[ahead.next_chunk]
        self._finish_writes(down_to=None)
        lease = self._staging.try_lease(chunk.nbytes, f"{owner} optimizer chunk")
        if lease is None:
            return False
        view = self._host.view(lease, 0, chunk.nbytes)
        ticket = self._store.read(
            record.name("optimizer"), view, offset=chunk.offset_bytes, nbytes=chunk.nbytes
        )
        ahead.staged.append(_Staged(owner, chunk, lease, ticket, time.perf_counter()))
        ahead.next_chunk += 1
        if ahead.next_chunk == len(chunks):
            ahead.next_record, ahead.next_chunk = ahead.next_record + 1, 0
        return True

    def _begin_reading_ahead(self) -> None:
        """Start over with the expected order: the next step's reads see this step's writes."""
        self._drop_staged()
        self._ahead = _ReadAhead(self._order)

    def _stop_reading_ahead(self) -> None:
        try:
            self._finish_writes(down_to=0)
            self._drop_staged()
        except OffloadError as error:
            self._fail(error)
        self._ahead = _ReadAhead()

    def _drop_read_ahead(self, owner: str, chunk: OptimizerChunk) -> None:
        self._drop_staged()
        self._point_read_ahead(owner, chunk)

    def _point_read_ahead(self, owner: str, chunk: OptimizerChunk) -> None:
        """Make (owner, chunk) the next to be read, then go on in the predicted order."""
        ahead = self._ahead
        record = self._records[owner]
        chunks = record.format.optimizer_chunks(record.layout.trainable_numel)
        if owner in ahead.order:
            ahead.next_record = list(ahead.order).index(owner)
        else:
            ahead.order, ahead.next_record = (owner,), 0
        ahead.next_chunk = chunks.index(chunk)

    def _drop_staged(self) -> None:
        while self._ahead.staged:
            staged = self._ahead.staged.popleft()
            staged.ticket.wait()
            staged.lease.release()

    # -- writes ------------------------------------------------------------------------------

    def _write(self, owner: str, kind: RecordKind, memory: memoryview, offset: int, lease: Lease) -> None:
        assert self._store is not None
        name = self._records[owner].name(kind)
        ticket = self._store.write(name, memory, offset=offset, nbytes=len(memory))
        self._trace.count("disk_written_nbytes", len(memory))
        completes = kind == "weights"
        self._writes.append(_Write(owner, ticket, lease, len(memory), time.perf_counter(), completes))

    def _finish_writes(self, *, down_to: int | None) -> None:
        """Wait for the oldest writes until `down_to` are left; None: collect those that are done."""
        while self._writes and (
            self._writes[0].ticket.done() if down_to is None else len(self._writes) > down_to
        ):
            write = self._writes[0]
            write.ticket.wait()
            self._writes.popleft()
            self._trace.add(
                "disk write", write.owner, write.issued_s, time.perf_counter(), nbytes=write.nbytes
            )
            if write.completes:
                self._on_updated(write.owner, write.lease)
            else:
                write.lease.release()

    def _settle(self) -> None:
        """Wait for all I/O and give every staging slot back; errors were or will be raised elsewhere."""
        pending = [(write.ticket, write.lease) for write in self._writes]
        pending += [(staged.ticket, staged.lease) for staged in self._ahead.staged]
        for ticket, lease in pending:
            try:
                ticket.wait()
            except OffloadError as error:
                self._error = self._error or error
            lease.release()
        self._writes.clear()
        self._ahead.staged.clear()
