"""Saves the inputs of units between forward and backward: in host memory, and on disk what it does not hold.

Owns a heap in the host arena: forward takes from it, backward gives back, and what an abandoned pass leaves
is dropped by `reset`. A saved tensor is a copy, so the model may reuse or overwrite the original.

[Note: which inputs go to disk] Backward wants the input first that was saved last. So when there is no room
for another, the oldest in memory goes to disk, and comes back ahead of its use as backward gives memory back.
No fewer bytes could cross the drives' link, and each crosses it once each way. Who has to wait for a write
waits for the drive; but as many bytes as were away at most in the step before are written as they are saved,
and are on disk by the time that their memory is wanted. Until then they keep it: a forecast that is too high
costs writes, never a read.

[Note: bytes on their way] An input that is not needed any more may still be read by the device, or written by
a drive. It keeps its memory, and its room on disk, until that has ended (`_retiring`); nobody stands by for
that, each call looks. Without a disk the memory is free at once, since only copies that the device does in
order go there next.

Invariants: memory is lent again when neither the device nor a drive uses it; an input that is away is whole
on disk; no more inputs are read ahead than there is free memory.

Thread rule: `save` and `lease` are called by the thread that runs forward, `restore`, `drop` and `lease` by
the one that runs backward; the two phases do not overlap.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..buffers import Arena, Heap, Lease
from ..device import Device, Event
from ..errors import CapacityError, OffloadError, RequestTimeoutError, StateError
from ..sizes import align_up
from ..trace import Tracer
from .spill import Spill, Spilled

__all__ = ["Activations", "SavedTensor"]

_PAGE_NBYTES = 4096

# Inputs on their way back at the same time. Each call begins more, and weights share the link: two keep it
# busy from one visit to the next, more would only come before the weights of that visit.
_READS_AHEAD = 2


class SavedTensor:
    """A tensor's bytes, on the host or on disk, and what is needed to make it again. Opaque to callers.

    Attributes:
        holder: the unit that it is an input of.
        step: the pass it belongs to; it cannot be restored in a later one.
        number: counts what was saved, in order.
        nbytes: of its whole pages.
        lease: its memory; None while it is away.
        busy: passes when the device neither writes nor reads that memory.
        spilled: what is on disk of it; None when nothing is.
        leaves: whether it counts as one that goes to disk.
    """

    __slots__ = ("busy", "dtype", "holder", "lease", "leaves", "nbytes", "number", "shape", "spilled", "step")

    def __init__(
        self,
        tensor: torch.Tensor,
        *,
        holder: str,
        step: int,
        number: int,
        nbytes: int,
        lease: Lease,
        busy: Event,
    ) -> None:
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.holder = holder
        self.step = step
        self.number = number
        self.nbytes = nbytes
        self.lease: Lease | None = lease
        self.busy = busy
        self.spilled: Spilled | None = None
        self.leaves = False


class Activations:
    """See the module.

    Args:
        device: what the tensors live on.
        host: the arena of the heap.
        heap: memory for inputs; other holders, who never wait, may lease from it as well.
        trace: counts and times.
        spill: room on disk; None keeps everything in memory.
    """

    def __init__(
        self, device: Device, host: Arena, heap: Heap, trace: Tracer, spill: Spill | None = None
    ) -> None:
        self._device = device
        self._host = host
        self._heap = heap
        self._trace = trace
        self._spill = spill
        self._live: dict[int, SavedTensor] = {}
        self._due: deque[SavedTensor] = deque()
        self._retiring: deque[SavedTensor] = deque()
        self._step = 0
        self._num_saved = 0
        # Bytes of live inputs: that count as going to disk, and that have given their memory up.
        self._leaving_nbytes = self._away_nbytes = 0
        self._most_away_nbytes = self._forecast_nbytes = 0

    @property
    def device_type(self) -> str:
        """`cpu` or `cuda`, as torch names it."""
        return self._device.torch_device.type

    def save(self, tensor: torch.Tensor, holder: str) -> SavedTensor:
        """Copy `tensor` to the host.

        Args:
            tensor: on the device, any shape and dtype.
            holder: the unit's name, for messages.

        Raises:
            CapacityError: neither the part of the host budget left for saved inputs nor the room on disk
                holds it.
            OffloadError: an input could not be written to disk.
        """
        source = tensor.detach().contiguous().view(-1)
        # A lease has at least one byte; a tensor may have none (an expert that got no tokens).
        nbytes = max(1, source.numel() * source.element_size())
        pages_nbytes = align_up(nbytes, _PAGE_NBYTES)
        lease = self.lease(pages_nbytes, f"{holder} input")
        with self._trace.span(holder, "device to host", nbytes=nbytes):
            target = self._device.host_tensor(self._host, lease, source.dtype, source.numel())
            arrived = self._device.save(source, target)
        self._num_saved += 1
        saved = SavedTensor(
            tensor,
            holder=holder,
            step=self._step,
            number=self._num_saved,
            nbytes=pages_nbytes,
            lease=lease,
            busy=arrived,
        )
        self._live[saved.number] = saved
        if self._leaving_nbytes < self._forecast_nbytes:
            self._count_leaving(saved)
            self._due.append(saved)
        self._collect()
        return saved

    def restore(self, saved: SavedTensor) -> torch.Tensor:
        """Return a new device tensor with the saved values, which are given up.

        Raises:
            StateError: the pass it was saved in is over.
            OffloadError: it cannot be read back from disk.
        """
        if saved.step != self._step:
            raise StateError(
                "backward reached a unit whose step is over: call backward() once, before runtime.step()"
            )
        self._collect()
        if saved.lease is None:
            self._begin_read(saved, self.lease(saved.nbytes, f"{saved.holder} input"))
        if saved.spilled is not None and saved.spilled.is_read:
            with self._waiting("wait for a saved input", saved.holder):
                self._disk.wait(saved.spilled)
        assert saved.lease is not None
        numel = saved.shape.numel()
        nbytes = max(1, numel * saved.dtype.itemsize)
        with self._trace.span("saved input", "host to device", nbytes=nbytes):
            source = self._device.host_tensor(self._host, saved.lease, saved.dtype, numel)
            restored = self._device.restore(source).view(saved.shape)
        if self._spill is not None:
            saved.busy = self._device.record_compute()
        self.drop(saved)
        self._read_ahead(saved.number)
        return restored

    def drop(self, saved: SavedTensor) -> None:
        """Give the saved bytes up; after this `restore` is not possible. Harmless when that is so already.

        Raises:
            OffloadError: an input that was not needed any more could not be written to disk.
        """
        if self._live.pop(saved.number, None) is None:
            return
        if saved in self._due:
            self._due.remove(saved)
        if saved.leaves:
            self._leaving_nbytes -= saved.nbytes
        if saved.lease is None:
            self._away_nbytes -= saved.nbytes
        self._retiring.append(saved)
        self._collect()

    def lease(self, nbytes: int, holder: str) -> Lease:
        """Lend memory of the heap, which saved inputs leave for the disk when there is too little.

        Raises:
            CapacityError: there is not that much, and nothing more can leave; with the numbers.
            OffloadError: an input could not be written to disk.
        """
        self._collect()
        lease = self._heap.try_lease(nbytes, holder)
        if lease is None:
            with self._waiting("wait for room for saved inputs", holder):
                lease = self._make_room(nbytes, holder)
        return lease

    def free_nbytes(self) -> int:
        """Wait for what is on its way, and return the most bytes that can be lent in one piece."""
        self._settle()
        return self._heap.largest_free_nbytes

    @contextmanager
    def lend(self, nbytes: int, holder: str) -> Iterator[memoryview]:
        """Lend `nbytes` of the free memory between passes; the view is valid inside the block."""
        self._settle()
        with self._heap.lease(nbytes, holder) as lease:
            yield self._host.view(lease)

    def reset(self) -> None:
        """Give up everything saved and begin the next pass."""
        self._retiring.extend(self._live.values())
        self._live.clear()
        self._due.clear()
        while self._retiring:
            try:
                self._release(self._retiring.popleft())
            except RequestTimeoutError:
                # Nor is there time to wait for the others: their memory stays lent.
                self._retiring.clear()
            except OffloadError:
                # Nobody wants it any more. A drive that fails is met again by whoever wants something.
                continue
        self._forecast_nbytes, self._most_away_nbytes = self._most_away_nbytes, 0
        self._leaving_nbytes = self._away_nbytes = 0
        self._step += 1

    # -- memory ------------------------------------------------------------------------------

    def _make_room(self, nbytes: int, holder: str) -> Lease:
        while True:
            if self._retiring:
                self._release(self._retiring.popleft())
            elif not self._evict_oldest():
                raise CapacityError(self._refusal(nbytes, holder))
            lease = self._heap.try_lease(nbytes, holder)
            if lease is not None:
                return lease

    def _collect(self) -> None:
        """Write what has arrived, and give back what nobody uses any more; without waiting."""
        while self._due and self._due[0].busy.done():
            saved = self._due.popleft()
            assert saved.lease is not None
            # Without room on disk for it now, it may yet stay where it is.
            saved.spilled = self._disk.write(saved.lease, saved.holder)
        while self._retiring and self._has_ended(self._retiring[0]):
            self._release(self._retiring.popleft())

    def _has_ended(self, saved: SavedTensor) -> bool:
        if self._spill is None:
            return True
        return saved.busy.done() and not (saved.spilled is not None and self._disk.in_flight(saved.spilled))

    def _settle(self) -> None:
        while self._retiring:
            self._release(self._retiring.popleft())

    def _release(self, saved: SavedTensor) -> None:
        """Give back the memory and the room of an input that is not live, when nothing uses them."""
        if self._spill is not None:
            saved.busy.wait()
        try:
            if saved.spilled is not None:
                self._disk.free(saved.spilled)
        except RequestTimeoutError:
            # The drive may still read or write this memory: nobody gets it.
            raise
        except OffloadError:
            self._give_back(saved)
            raise
        self._give_back(saved)

    def _give_back(self, saved: SavedTensor) -> None:
        if saved.lease is not None:
            saved.lease.release()
            saved.lease = None

    def _refusal(self, nbytes: int, holder: str) -> str:
        knobs = "raise activations_nbytes, or host_memory where that is not set"
        if self._spill is None:
            knobs += ", keep them on disk as well (activations_disk_nbytes)"
        return f"{self._heap.refusal(nbytes, holder)}; {knobs}, or use a smaller batch"

    # -- disk --------------------------------------------------------------------------------

    @property
    def _disk(self) -> Spill:
        assert self._spill is not None, "nothing goes to disk"
        return self._spill

    def _evict_oldest(self) -> bool:
        """Let the oldest input in memory leave it; False when there is none that can."""
        if self._spill is None:
            return False
        saved = next((saved for saved in self._live.values() if saved.lease is not None), None)
        if saved is None:
            return False
        assert saved.lease is not None
        if saved.spilled is None:
            if saved in self._due:
                self._due.remove(saved)
            saved.busy.wait()
            saved.spilled = self._disk.write(saved.lease, saved.holder)
        if saved.spilled is None:
            raise CapacityError(self._disk.refusal(saved.nbytes, saved.holder))
        self._disk.wait(saved.spilled)
        self._give_back(saved)
        self._count_leaving(saved)
        self._away_nbytes += saved.nbytes
        self._most_away_nbytes = max(self._most_away_nbytes, self._away_nbytes)
        return True

    def _count_leaving(self, saved: SavedTensor) -> None:
        if not saved.leaves:
            saved.leaves = True
            self._leaving_nbytes += saved.nbytes

    def _begin_read(self, saved: SavedTensor, lease: Lease) -> None:
        assert saved.spilled is not None
        try:
            self._disk.read(saved.spilled, lease)
        except BaseException:
            lease.release()
            raise
        saved.lease = lease
        self._away_nbytes -= saved.nbytes

    def _read_ahead(self, number: int) -> None:
        """Begin to read inputs that were saved before `number`, as far as memory goes, the next first."""
        if self._spill is None:
            return
        reading = 0
        for saved in reversed(self._live.values()):
            if saved.number > number:
                continue
            if saved.lease is None:
                lease = self._heap.try_lease(saved.nbytes, f"{saved.holder} input")
                if lease is None:
                    return
                self._begin_read(saved, lease)
            if saved.spilled is not None and saved.spilled.is_read:
                reading += self._disk.in_flight(saved.spilled)
            if reading == _READS_AHEAD:
                return

    @contextmanager
    def _waiting(self, what: str, holder: str) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        finally:
            ended_s = time.perf_counter()
            if ended_s - began_s > 1e-4:
                self._trace.add("stall", what, began_s, ended_s, holder=holder)
