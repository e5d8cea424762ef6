"""Fetches weights ahead of their use and releases them behind it.

Owns the host and device copies of records between fetch and release, and one fetch thread. A visit
is bracketed by `enter` (blocks until the unit's records are on the device) and `leave`. While it
runs, the thread fetches what the schedule says comes next: disk -> host lease -> device lease.

Invariants:
- A copy in use is never released or overwritten; a record under update is not fetched until its
  update is done, so a visit sees either the weights before a step or those after it, never a mixture.
- Memory is bounded by the pools: when they are empty the thread waits, it never allocates.
- The first background error is raised at the next call of `enter`, `leave` or `check`, with its own
  traceback, and again at every later one.

Thread rule: `enter`, `leave` and `take_host` are called by the thread that runs the model, one visit
at a time, `begin_updates`, `drop` and `quiet` by it between visits; `end_update` by any thread.

It does not know what a gradient or an optimizer is; those are `gradients.py` and `optim/updater.py`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from ..buffers import Arena, Lease, Pool
from ..device import Device, DeviceArena, Event
from ..errors import OffloadError, StateError
from ..store import Store, Ticket
from ..trace import Tracer
from .masters import begin_reading_weights
from .records import RecordSet
from .residents import ResidentRecords
from .schedule import Pass, Schedule, Visit

__all__ = ["Transfer", "WeightsOnDevice"]


@dataclass(frozen=True)
class WeightsOnDevice:
    """One unit's weights in the compute dtype; valid from `enter` to `leave`.

    Attributes:
        trainable: 1-D, the flat trainable space of the record.
        frozen: 1-D, the flat frozen space.
    """

    trainable: torch.Tensor
    frozen: torch.Tensor


@dataclass
class _Copy:
    """One record on its way to the device, or there.

    `host` and `device` are leased together and live until the copy is released, because backward
    needs the host bytes again for the update; `take_host` moves `host` out, and what is left on the
    device is `stale`: it is not used by another visit. When updates run between passes, which read for
    themselves, `host` is given back as soon as its bytes are on the device.
    """

    owner: str
    host: Lease | None = None
    device: Lease | None = None
    users: int = 0
    ready: bool = False
    stale: bool = False
    used: Event | None = None
    tickets: list[Ticket] = field(default_factory=list)
    issued_s: float = 0.0


class Transfer:
    """See the module."""

    def __init__(
        self,
        *,
        schedule: Schedule,
        records: Mapping[str, RecordSet],
        window: int,
        device: Device,
        host: Arena,
        host_pool: Pool | None,
        device_arena: DeviceArena,
        device_pool: Pool,
        store: Store | None,
        residents: ResidentRecords,
        keep_on_device: bool,
        keep_host: bool,
        trace: Tracer,
    ) -> None:
        self._keep_host = keep_host
        self._keep_on_device = keep_on_device
        self._schedule = schedule
        self._records = records
        self._window = window
        self._device = device
        self._host = host
        self._host_pool = host_pool
        self._device_arena = device_arena
        self._device_pool = device_pool
        self._store = store
        self._residents = residents
        self._trace = trace
        self._changed = threading.Condition()
        self._position = -1
        self._copies: dict[str, _Copy] = {}
        self._queue: deque[str] = deque()
        self._starved: str | None = None
        self._updating: set[str] = set()
        self._offered: dict[str, Lease] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="offload-fetch", daemon=True)
        self._thread.start()

    # -- the model's thread ------------------------------------------------------------------

    def enter(self, visit: Visit, kind: Pass) -> dict[str, WeightsOnDevice]:
        """Wait until the records of `visit` are on the device and return them by owner.

        Raises:
            OffloadError: a fetch failed, now or earlier.
            StateError: closed.
        """
        owners = self._schedule.needs[visit.unit]
        with self._changed:
            self._raise_if_unusable()
            position = self._schedule.locate(visit, self._position, kind)
            self._position = self._position if position is None else position
            near = self._schedule.upcoming_records(self._position, kind, self._window)
            for owner in owners:
                if owner in self._copies:
                    self._copies[owner].users += 1
            self._release_idle(keep=(*owners, *near))
            wanted = dict.fromkeys((*self._largest_first(owners), *near))
            self._queue = deque(owner for owner in wanted if owner not in self._copies)
            self._changed.notify_all()
            self._wait_until_ready(owners)
            return {owner: self._on_device(self._copies[owner]) for owner in owners}

    def leave(self, visit: Visit, kind: Pass) -> None:
        """End the visit; its copies go unless a visit within the window needs them again."""
        with self._changed:
            near = self._schedule.upcoming_records(self._position, kind, self._window)
            for owner in self._schedule.needs[visit.unit]:
                copy = self._copies.get(owner)
                if copy is not None:
                    copy.users -= 1
                    # On the stream that computed with it, which need not be the one that releases it.
                    copy.used = self._device.record_compute()
                    if copy.stale:
                        self._release(copy)
            self._release_idle(keep=near)
            # What this visit updated may be wanted again soon: at the turn from one step to the next.
            self._queue = deque(owner for owner in near if owner not in self._copies)
            self._changed.notify_all()
            self._raise_if_unusable()

    def take_host(self, owner: str) -> Lease:
        """Move the host buffer of a record in use out to the caller, who updates and releases it.

        The record counts as under update from here until `end_update`.
        """
        with self._changed:
            copy = self._copies[owner]
            assert copy.users and copy.host is not None, f"{owner} is not in use"
            lease, copy.host, copy.stale = copy.host, None, True
            self._updating.add(owner)
            return lease

    def begin_updates(self, owners: Collection[str]) -> None:
        """Count records as under update, between two passes; what was fetched of them is dropped.

        Each is fetched again when its `end_update` came.
        """
        with self._changed:
            self._drop_copies(owners)
            self._raise_if_unusable()
            self._updating.update(owners)

    def drop(self, owners: Collection[str]) -> None:
        """Drop what was fetched of records whose bytes in the store or at home will be other ones."""
        with self._changed:
            self._drop_copies(owners)
            self._raise_if_unusable()

    def end_update(self, owner: str, host: Lease) -> None:
        """Take the buffer of `take_host` back with the new bytes, which are in the store too or live there.

        A record that is wanted next (the last unit of backward is the first of the next forward) goes
        to the device from this buffer and is not read again.
        """
        with self._changed:
            self._updating.discard(owner)
            if not self._residents.holds_weights(owner):
                if owner in self._queue and not self._closed:
                    self._offered[owner] = host
                else:
                    host.release()
            self._changed.notify_all()

    def follow(self, schedule: Schedule) -> None:
        """Predict by another order from now on; called between passes."""
        with self._changed:
            self._schedule = schedule
            self._position = -1
            self._release_idle(keep=())

    def quiet(self) -> None:
        """Stop fetching ahead and give back every slot; the next `enter` begins anew."""
        with self._changed:
            self._drop_copies(())
            self._raise_if_unusable()

    def check(self) -> None:
        """Raise the first background error, if there was one."""
        with self._changed:
            self._raise_if_unusable()

    def fail(self, error: BaseException) -> None:
        """Make every waiting and later call raise `error`; for failures of other threads."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching and wait for the thread. The pools must outlive this call."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._host_pool is not None:
            self._host_pool.close()
        self._device_pool.close()
        self._thread.join()
        for lease in self._offered.values():
            lease.release()
        self._offered.clear()

    # -- under the lock ----------------------------------------------------------------------

    def _drop_copies(self, owners: Collection[str]) -> None:
        """Stop fetching ahead; release all copies, those that stay on the device only if of `owners`."""
        self._queue.clear()
        self._position = -1
        self._release_idle(keep=())
        while self._error is None and any(not copy.ready for copy in self._copies.values()):
            self._release_idle(keep=())
            self._changed.wait()
        for copy in list(self._copies.values()):
            if copy.ready and (copy.owner in owners or not self._keep_on_device):
                self._release(copy)

    def _raise_if_unusable(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StateError("the runtime is closed: attach the model again")

    def _largest_first(self, owners: tuple[str, ...]) -> list[str]:
        # A unit that needs two records at once takes the scarcer (larger) slot first.
        return sorted(owners, key=lambda owner: -self._records[owner].device_nbytes)

    def _wait_until_ready(self, owners: tuple[str, ...]) -> None:
        began_s = time.perf_counter()
        counted = {owner for owner in owners if owner in self._copies}
        while True:
            self._raise_if_unusable()
            for owner in owners:
                if owner not in counted and owner in self._copies:
                    self._copies[owner].users += 1
                    counted.add(owner)
            if len(counted) == len(owners) and all(self._copies[owner].ready for owner in owners):
                break
            if self._starved is not None:
                # The fetch thread waits for a slot, for one of `owners` or for a record in front of it that
                # was predicted before the model took another path: nobody but this thread frees one.
                self._release_idle(keep=owners)
            self._changed.wait()
        ended_s = time.perf_counter()
        if ended_s - began_s > 1e-4:
            self._trace.add("stall", "wait for weights", began_s, ended_s, owners=",".join(owners))

    def _release_idle(self, keep: tuple[str, ...]) -> None:
        for owner in [owner for owner in self._offered if owner not in keep]:
            self._offered.pop(owner).release()
        for copy in list(self._copies.values()):
            wanted = copy.owner in keep or self._keep_on_device
            if copy.users == 0 and copy.ready and not wanted:
                self._release(copy)

    def _release(self, copy: _Copy) -> None:
        if copy.users:
            return
        del self._copies[copy.owner]
        if copy.device is not None:
            self._device_arena.release_after(copy.device, copy.used or self._device.record_compute())
        self._give_back(copy)

    def _give_back(self, copy: _Copy) -> None:
        """Release the host buffer of a copy, unless the record lives there."""
        if copy.host is not None and not self._residents.holds_weights(copy.owner):
            copy.host.release()
            copy.host = None

    def _on_device(self, copy: _Copy) -> WeightsOnDevice:
        assert copy.device is not None
        record = self._records[copy.owner]
        dtype = record.compute_dtype
        layout = record.layout
        return WeightsOnDevice(
            self._device_arena.tensor(copy.device, dtype, layout.trainable_numel),
            self._device_arena.tensor(
                copy.device, dtype, layout.frozen_numel, record.frozen_offset_on_device
            ),
        )

    # -- the fetch thread --------------------------------------------------------------------

    def _run(self) -> None:
        reading: deque[_Copy] = deque()
        try:
            while True:
                owner = self._next_to_read(block=not reading)
                if owner is None and not reading:
                    return
                if owner is not None:
                    copy = self._begin_read(owner, block=not reading)
                    if copy is not None:
                        reading.append(copy)
                    if copy is not None or not reading:
                        # None and nothing to do: the record was not wanted any more when a slot came free.
                        continue
                self._to_device(reading[0])
                reading.popleft()
        except Exception as error:  # noqa: BLE001 - the end of the thread: unreported, all who wait would hang
            with self._changed:
                if not self._closed:
                    self._error = self._error or error
                self._queue.clear()
                self._changed.notify_all()
        finally:
            for copy in reading:
                _settle(copy)
                # The update thread may wait for the slot.
                self._give_back(copy)

    def _next_to_read(self, *, block: bool) -> str | None:
        """Return the next record to read; None when closed, or when there is none and not `block`."""
        with self._changed:
            while not self._closed:
                for owner in self._queue:
                    # A record under update is skipped, not waited for: later ones may be ready.
                    if owner not in self._updating and owner not in self._copies:
                        return owner
                if not block:
                    return None
                self._changed.wait()
            return None

    def _begin_read(self, owner: str, *, block: bool) -> _Copy | None:
        record = self._records[owner]
        copy = _Copy(owner)
        offered: Lease | None = None
        resident = self._residents.weights(owner)
        if resident is not None:
            copy.host = resident
        elif (offered := self._take_offered(owner)) is not None:
            copy.host = offered
        else:
            assert self._host_pool is not None
            copy.host = self._lease(self._host_pool, record.host_nbytes, owner, block=block)
            if copy.host is None:
                return None
        with self._changed:
            # The order of visits may have changed while waiting for a slot.
            if owner in self._copies or owner in self._updating or owner not in self._queue:
                self._give_back(copy)
                return None
            self._queue.remove(owner)
            self._copies[owner] = copy
            self._changed.notify_all()
        copy.issued_s = time.perf_counter()
        if resident is None and offered is None:
            assert self._store is not None
            memory = self._host.view(copy.host, 0, record.host_nbytes)
            copy.tickets += begin_reading_weights(self._store, record, memory)
        return copy

    def _take_offered(self, owner: str) -> Lease | None:
        with self._changed:
            return self._offered.pop(owner, None)

    def _to_device(self, copy: _Copy) -> None:
        record = self._records[copy.owner]
        for ticket in copy.tickets:
            ticket.wait()
        if copy.tickets:
            ended_s = max(ticket.finished_s or copy.issued_s for ticket in copy.tickets)
            self._trace.add("disk read", copy.owner, copy.issued_s, ended_s, nbytes=record.host_nbytes)
            self._trace.count("disk_read_nbytes", record.host_nbytes)
        copy.device = self._lease(self._device_pool, record.device_nbytes, copy.owner, block=True)
        began_s = time.perf_counter()
        self._upload(copy, record)
        self._trace.add("host to device", copy.owner, began_s, time.perf_counter(), nbytes=record.host_nbytes)
        with self._changed:
            if not self._keep_host:
                self._give_back(copy)
            copy.ready = True
            self._changed.notify_all()

    def _upload(self, copy: _Copy, record: RecordSet) -> None:
        assert copy.host is not None
        weights = self._on_device(copy)
        events = []
        if record.weights_nbytes:
            source = self._device.host_tensor(
                self._host, copy.host, record.format.torch_dtype, record.layout.trainable_numel
            )
            events.append(self._device.upload(source, weights.trainable))
        if record.frozen_nbytes:
            source = self._device.host_tensor(
                self._host, copy.host, record.compute_dtype, record.layout.frozen_numel, record.weights_nbytes
            )
            events.append(self._device.upload(source, weights.frozen))
        for event in events:
            # This thread may block; the model's thread then needs no event of its own, and the host
            # bytes are free to be updated.
            event.wait()

    def _lease(self, pool: Pool, nbytes: int, owner: str, *, block: bool) -> Lease | None:
        lease = pool.try_lease(nbytes, owner)
        if lease is not None or not block:
            return lease
        with self._changed:
            self._starved = owner
            self._changed.notify_all()
        try:
            return pool.lease(nbytes, owner)
        finally:
            with self._changed:
                self._starved = None


def _settle(copy: _Copy) -> None:
    """Wait for the reads of a copy nobody will use, so that its buffer may be freed."""
    for ticket in copy.tickets:
        try:
            ticket.wait()
        except OffloadError:
            # The first error has been recorded; this one belongs to a read that is abandoned.
            continue
