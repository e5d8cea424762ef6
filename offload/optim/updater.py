"""Runs AdamW over records behind the model's back, and commits behind the updates.

Owns one update thread and its queue of work: updates in the order their gradients completed (during
backward) or in which forward needs them (between passes), and commits between them. Because one thread
takes them in order, every write of step n is in the store before its commit, and none of step n+1. The
reads and writes around an update are `pipeline.py`.

Gradients are measured as they arrive (`arrivals.py`). When one that was not parked is not finite, neither its
record nor any later one is updated until `roll_back`.

Invariants: a chunk is read, updated and written once a step; a record can be fetched again
(`on_updated`) only when its bytes are in the store, or at home in host memory.

Thread rule: all public methods by the thread that runs the model. An error of the update
thread is given to `on_error` once, and raised by `drain`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..buffers import Arena, Lease, Pool
from ..codec import OptimizerChunk
from ..errors import StateError
from ..store import Store
from ..tiers.gradients import FinishedGradient, GradientOnDisk
from ..tiers.records import RecordSet
from ..tiers.residents import ResidentRecords
from ..trace import Tracer
from .arrivals import Measurement
from .chunk import ChunkMemory, update_chunk
from .gradient_parts import GradientParts
from .groups import ParameterSettings
from .pipeline import ChunkPipeline

__all__ = ["Update", "Updater"]

# What the update thread turns into the runtime's error: all. One that got past would end the thread, and
# `drain` would wait for it for ever.
_FAILURES = Exception


@dataclass(frozen=True)
class Update:
    """One record's update: everything it needs, fixed when it is submitted.

    Attributes:
        owner: the unit.
        weights: host lease with the weights record, updated in place and written; None when the update
            runs between passes and reads it.
        gradient: its gradient on the host or on the way there, or parked on disk.
        settings: learning rate and the rest by parameter name, as of this step.
        step: optimizer steps including this one, from 1.
        grad_scale: the gradient is multiplied with it first: the clip factor.
        measurement: says whether the gradient is finite; None when it is known to be.
        commits: whether this step will be committed, so that what lives in host memory is written behind the
            update, while others are computed.
    """

    owner: str
    weights: Lease | None
    gradient: FinishedGradient | GradientOnDisk
    settings: Mapping[str, ParameterSettings]
    step: int
    grad_scale: float = 1.0
    measurement: Measurement | None = None
    commits: bool = False


@dataclass(frozen=True)
class _Commit:
    state: Mapping[str, Any]
    step: int


@dataclass(frozen=True)
class _Pause:
    """Give the staging slots back: what follows on another thread needs them."""

    reached: threading.Event


@dataclass(frozen=True)
class _RollBack:
    reached: threading.Event


@dataclass(frozen=True)
class _Turn:
    """A step has ended that is not committed: what follows is read ahead from the first record again."""


_Work = Update | _Commit | _Turn | _Pause | _RollBack | threading.Event | None


class Updater:
    """See the module."""

    def __init__(
        self,
        *,
        records: Mapping[str, RecordSet],
        host: Arena,
        staging: Pool | None,
        weights: Pool | None,
        store: Store | None,
        residents: ResidentRecords,
        gradient_parts: GradientParts | None,
        num_threads: int,
        on_updated: Callable[[str, Lease], None],
        on_committed: Callable[[int, int], None],
        on_error: Callable[[BaseException], None],
        trace: Tracer,
    ) -> None:
        self._records = records
        self._host = host
        self._store = store
        self._residents = residents
        self._num_threads = num_threads
        self._on_updated = on_updated
        self._on_committed = on_committed
        self._on_error = on_error
        self._trace = trace
        self._order: tuple[str, ...] = ()
        self._gradient_parts = gradient_parts
        self._spoiled = False
        self._pipeline: ChunkPipeline | None = None
        if not residents.is_whole:
            assert store is not None
            self._pipeline = ChunkPipeline(
                records=records,
                host=host,
                residents=residents,
                staging=staging,
                weights=weights,
                store=store,
                on_landed=on_updated,
                trace=trace,
            )
        self._work: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="offload-update", daemon=True)
        self._thread.start()

    # -- the model's thread ------------------------------------------------------------------

    def expect(self, order: Sequence[str]) -> None:
        """Predict the owners that a step updates, in order; takes effect when the step ends."""
        self._order = tuple(order)

    def submit(self, update: Update) -> None:
        """Queue one record's update; the thread takes over its leases."""
        if isinstance(update.gradient, GradientOnDisk):
            assert self._gradient_parts is not None
            self._gradient_parts.expect(update.owner)
        self._work.put(update)

    def check(self) -> None:
        """Raise what went wrong so far; does not wait.

        Raises:
            OffloadError: the thread's error, if it failed.
        """
        if self._error is not None:
            raise self._error

    def commit(self, state: Mapping[str, Any], step: int) -> None:
        """Queue a commit of everything submitted so far, with `state` in its manifest."""
        self._work.put(_Commit(state, step))

    def turn(self) -> None:
        """Queue the end of a step that is not committed."""
        self._work.put(_Turn())

    def drain(self) -> None:
        """Wait until all queued work is done.

        Raises:
            StateError: the thread was stopped.
            OffloadError: the thread's error, if it failed.
        """
        reached = threading.Event()
        self._wait_for(reached, reached)
        if self._error is not None:
            raise self._error

    def quiet(self) -> None:
        """Wait as `drain` does, and give every staging slot back; the end of the next step reads ahead again.

        Raises:
            OffloadError: the thread's error, if it failed.
        """
        pause = _Pause(threading.Event())
        self._wait_for(pause, pause.reached)
        self.drain()

    def roll_back(self) -> None:
        """Wait as `drain` does, then forget every write since the last commit.

        Raises:
            OffloadError: the thread's error, if it failed.
        """
        item = _RollBack(threading.Event())
        self._wait_for(item, item.reached)
        self.drain()

    def close(self) -> None:
        """Finish the queue and stop the thread. The pools must outlive this call."""
        self._work.put(None)
        self._thread.join()

    def _wait_for(self, item: _Work, reached: threading.Event) -> None:
        """Queue `item` and wait until the thread has `reached` it."""
        if not self._thread.is_alive():
            raise StateError("the runtime is closed: attach the model again")
        self._work.put(item)
        reached.wait()

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
                self._pause()
                item.reached.set()
            elif isinstance(item, _RollBack):
                self._roll_back()
                item.reached.set()
            elif self._error is not None:
                # The generation is lost already; give back what the work item owns and go on, so
                # that `drain` and `close` return.
                self._drop(item)
            else:
                self._attempt(item)

    def _next_item(self) -> _Work:
        while self._work.empty() and self._error is None and self._make_progress():
            pass
        return self._work.get()

    def _make_progress(self) -> bool:
        """Use idle time: read ahead, else wait for the oldest write; False when there is neither."""
        try:
            return self._pipeline is not None and self._pipeline.advance()
        except _FAILURES as error:
            self._fail(error)
            return False

    def _pause(self) -> None:
        try:
            if self._pipeline is not None:
                self._pipeline.finish_writes()
                self._pipeline.restart(())
        except _FAILURES as error:
            self._fail(error)

    def _roll_back(self) -> None:
        try:
            if self._pipeline is not None:
                self._pipeline.finish_writes()
                self._pipeline.restart(())
            self._residents.finish_writes()
            if self._store is not None:
                self._store.rollback()
            self._spoiled = False
            if self._pipeline is not None:
                self._pipeline.restart(self._order)
        except _FAILURES as error:
            self._fail(error)

    def _settle(self) -> None:
        if self._gradient_parts is not None:
            self._gradient_parts.settle()
        self._residents.settle()
        if self._pipeline is not None:
            error = self._pipeline.settle()
            self._error = self._error or error

    def _attempt(self, item: Update | _Commit | _Turn) -> None:
        try:
            if isinstance(item, Update):
                self._update(item)
            elif isinstance(item, _Commit):
                self._finish_step(item)
            elif self._pipeline is not None:
                self._pipeline.restart(self._order)
        except _FAILURES as error:
            self._fail(error)
            if isinstance(item, Update):
                self._give_up(item)

    def _fail(self, error: BaseException) -> None:
        self._error = error
        # First: what is in flight on a drive that does not answer takes minutes to be given up.
        self._on_error(error)
        self._settle()

    def _drop(self, item: Update | _Commit | _Turn) -> None:
        if isinstance(item, Update):
            self._give_up(item)

    def _give_up(self, update: Update) -> None:
        """Give back what an update still holds; the model's thread may wait for the slot."""
        if update.measurement is not None:
            update.measurement.settle()
        if isinstance(update.gradient, FinishedGradient):
            # The copy into it may not have ended.
            update.gradient.arrived.wait()
            if not update.gradient.host.released:
                update.gradient.host.release()
        if update.weights is None or self._residents.holds_weights(update.owner):
            return
        if not update.weights.released:
            update.weights.release()

    def _is_finite(self, measurement: Measurement) -> bool:
        with self._trace.span("update waits for a gradient", "stall"):
            return measurement.wait()

    def _update(self, update: Update) -> None:
        record = self._records[update.owner]
        layout = record.layout
        if update.measurement is not None and not self._is_finite(update.measurement):
            self._spoiled = True
        if self._spoiled:
            self._give_back(update)
            return
        # Their reads go on while the updates before theirs are computed.
        while self._gradient_parts is not None and self._gradient_parts.advance():
            pass
        self._residents.finish_writes_of(update.owner)
        lease = update.weights or self._weights_of(update.owner)
        weights = self._host.view(lease, 0, record.weights_nbytes)
        for chunk in record.chunks:
            resident = self._residents.chunk(update.owner, chunk)
            memory = self._take(update.owner, chunk) if resident is None else resident
            gradient = self._gradient_memory(update, chunk)
            with self._trace.span(update.owner, "update", elements=chunk.numel):
                update_chunk(
                    ChunkMemory(record.format, chunk, memory, weights, gradient, update.gradient.dtype),
                    layout,
                    update.settings,
                    step=update.step,
                    grad_scale=update.grad_scale,
                    num_threads=self._num_threads,
                )
            if self._gradient_parts is not None and isinstance(update.gradient, GradientOnDisk):
                self._gradient_parts.give_back()
            if resident is None:
                assert self._pipeline is not None
                self._pipeline.write_back(update.owner, chunk)
        self._release_gradient(update)
        self._hand_over(update, lease)

    def _hand_over(self, update: Update, weights: Lease) -> None:
        """Give the new weights to those who wait for them, and to the store what goes there."""
        self._residents.mark_dirty(update.owner)
        if update.commits and self._store is not None:
            self._count_written(self._residents.begin_writing(self._store, update.owner))
        if self._residents.holds_weights(update.owner):
            self._on_updated(update.owner, weights)
        else:
            assert self._pipeline is not None
            self._pipeline.write_weights(update.owner, weights)

    def _count_written(self, nbytes: int) -> None:
        if nbytes:
            self._trace.count("disk_written_nbytes", nbytes)

    def _give_back(self, update: Update) -> None:
        """Leave a record as it is, in a step of which nothing will be kept."""
        self._release_gradient(update)
        assert update.weights is not None
        self._on_updated(update.owner, update.weights)

    def _release_gradient(self, update: Update) -> None:
        if isinstance(update.gradient, FinishedGradient):
            update.gradient.host.release()

    def _gradient_memory(self, update: Update, chunk: OptimizerChunk) -> memoryview:
        """Return the bytes of the gradient for a chunk, from disk if it was parked there."""
        if isinstance(update.gradient, GradientOnDisk):
            assert self._gradient_parts is not None
            return self._gradient_parts.take(update.owner, chunk)
        itemsize = update.gradient.dtype.itemsize
        return self._host.view(update.gradient.host, chunk.start * itemsize, chunk.numel * itemsize)

    def _weights_of(self, owner: str) -> Lease:
        resident = self._residents.weights(owner)
        if resident is not None:
            return resident
        assert self._pipeline is not None
        return self._pipeline.take_weights(owner)

    def _take(self, owner: str, chunk: OptimizerChunk) -> memoryview:
        assert self._pipeline is not None
        return self._pipeline.take(owner, chunk)

    def _finish_step(self, commit: _Commit) -> None:
        if self._pipeline is not None:
            self._pipeline.finish_writes()
        generation = 0
        if self._store is not None:
            with self._trace.span("commit", "commit", step=commit.step):
                self._count_written(self._residents.flush(self._store))
                generation = self._store.commit(commit.state)
                self._residents.committed()
        if self._pipeline is not None:
            # The next step's reads see this step's writes.
            self._pipeline.restart(self._order)
        self._on_committed(commit.step, generation)
