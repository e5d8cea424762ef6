"""Gradients of one record at a time: summed in a flat device buffer, handed over on the host.

Owns the device buffers that autograd adds into and the host leases that carry the sums to the
update. A record that several backward visits add to is summed over them: between them its partial sum
waits on the host and is restored first.

[Note: where partial sums wait] A sum that is finished takes a slot of the pool, which an update gives
back; a sum that is not finished never does, or the visits that would finish it could wait for its slot
for ever. Records that units share (tied embeddings) have a place of their own, which the plan foresaw.
What it cannot foresee (a model called twice in a step) waits in the memory of saved inputs. With `parks`
every sum has a slot, and keeps it from the first backward of a step until the update, or goes to disk
(`disk_gradients.py`) from a slot that it leaves again.

Thread rule: called by the thread that runs backward, one visit at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..buffers import Arena, Lease, Pool
from ..device import Device, DeviceArena, Event
from ..trace import Tracer
from .disk_gradients import DiskGradients
from .records import RecordSet

__all__ = ["FinishedGradient", "GradientBuffer", "GradientOnDisk", "Gradients", "Overflow"]


class Overflow(Protocol):
    """Host memory for the partial sums that no plan foresees."""

    def lease(self, nbytes: int, holder: str) -> Lease:
        """Lend `nbytes`.

        Raises:
            CapacityError: there is not that much.
        """


@dataclass(frozen=True)
class GradientBuffer:
    """Where one visit's gradient of one record accumulates.

    Attributes:
        total: 1-D, the flat trainable space; what is handed over. fp32 when micro-batches are
            summed, else the compute dtype.
        micro: 1-D in the compute dtype: autograd adds one micro-batch's gradient into it. The same
            tensor as `total` when the dtypes agree.
    """

    total: torch.Tensor
    micro: torch.Tensor
    lease: Lease

    def end_micro_batch(self) -> None:
        """Move what one micro-batch added into the total."""
        if self.micro is not self.total:
            self.total.add_(self.micro)
            self.micro.zero_()


@dataclass(frozen=True)
class FinishedGradient:
    """A complete gradient on its way to host memory.

    Attributes:
        host: lease of the flat gradient; readable once `arrived` has passed.
        dtype: of its elements.
        numel: elements of the flat trainable space.
        arrived: the copy's event.
    """

    host: Lease
    dtype: torch.dtype
    numel: int
    arrived: Event


@dataclass(frozen=True)
class GradientOnDisk:
    """A gradient that was parked on disk, handed over to its update.

    Attributes:
        dtype: of its elements.
        numel: elements of the flat trainable space.
    """

    dtype: torch.dtype
    numel: int


class Gradients:
    """See the module."""

    def __init__(
        self,
        *,
        records: Mapping[str, RecordSet],
        device: Device,
        host: Arena,
        host_pool: Pool | None,
        disk: DiskGradients | None,
        device_arena: DeviceArena,
        device_pool: Pool,
        shared: Sequence[str],
        overflow: Overflow,
        wide: Collection[str],
        parks: bool,
        dtype: torch.dtype,
        trace: Tracer,
    ) -> None:
        """
        Args:
            wide: owners whose gradients are summed in fp32 beside the compute dtype's own.
        """
        self._records = records
        self._device = device
        self._host = host
        self._host_pool = host_pool
        self._disk = disk
        self._device_arena = device_arena
        self._device_pool = device_pool
        self._wide = wide
        self._parks = parks
        self._dtype = dtype
        self._trace = trace
        self._overflow = overflow
        self._partial: dict[str, FinishedGradient] = {}
        # Largest first: each gets the smallest slot that fits, which is the one planned for it.
        self._places = {
            owner: self._lease(self._host_nbytes(owner), f"{owner} partial gradient")
            for owner in sorted(shared, key=self._host_nbytes, reverse=True)
        }

    def begin(self, owner: str) -> GradientBuffer:
        """Lease a device buffer, filled with the partial sum so far (zeros at first)."""
        record = self._records[owner]
        numel = record.layout.trainable_numel
        compute = record.compute_dtype
        wide = torch.float32 if owner in self._wide else compute
        nbytes = numel * wide.itemsize + (numel * compute.itemsize if wide is not compute else 0)
        lease = self._device_pool.lease(nbytes, f"{owner} gradient")
        # The bytes may still be on their way to the host for the unit before.
        self._device_arena.claim_on_compute(lease)
        total = self._device_arena.tensor(lease, wide, numel)
        micro = total
        if wide is not compute:
            micro = self._device_arena.tensor(lease, compute, numel, numel * wide.itemsize)
            micro.zero_()
        if not self._restore(owner, total):
            total.zero_()
        return GradientBuffer(total, micro, lease)

    def _restore(self, owner: str, total: torch.Tensor) -> bool:
        """Copy the partial sum so far into `total`; False when there is none."""
        partial = self._partial.get(owner)
        if partial is not None:
            partial.arrived.wait()
            source = self._device.host_tensor(self._host, partial.host, partial.dtype, total.numel())
            uploaded = self._upload(owner, source, total)
            # Its place may be a saved input's next, which a drive writes: not before it was read.
            self._partial[owner] = replace(partial, arrived=uploaded)
            return True
        lease = None if self._disk is None else self._disk.restore(owner)
        if lease is None:
            return False
        source = self._device.host_tensor(self._host, lease, self._dtype, total.numel())
        uploaded = self._upload(owner, source, total)
        # The slot goes on to the next gradient.
        uploaded.wait()
        lease.release()
        return True

    def _upload(self, owner: str, source: torch.Tensor, total: torch.Tensor) -> Event:
        with self._trace.span(owner, "host to device", nbytes=source.numel() * source.itemsize):
            uploaded = self._device.upload(source, total)
        self._device.wait_on_compute(uploaded)
        return uploaded

    def read_ahead(self, owner: str) -> None:
        """Begin to bring back a partial sum that the next visit will add to."""
        if self._disk is not None:
            self._disk.read_ahead(owner)

    def finish(self, owner: str, buffer: GradientBuffer, *, complete: bool) -> FinishedGradient | None:
        """Copy the sum to host memory and free the device buffer.

        Args:
            complete: no further visit of this step adds to the record.

        Returns:
            The gradient when complete, to be released by the update; None otherwise.

        Raises:
            CapacityError: a sum that other visits add to has no place to wait.
        """
        gradient = self._download(
            owner, buffer, self._finished_place(owner) if complete else self._partial_place(owner)
        )
        if complete:
            self._forget_partial(owner)
            return gradient
        self._partial[owner] = gradient
        return None

    def park(self, owner: str, buffer: GradientBuffer) -> FinishedGradient:
        """Copy the sum so far to host memory, where it stays until `take_partial`; free the device buffer.

        Returns:
            The sum, to be read only: later visits of the step replace it, in the same place. One that goes
            to disk is the caller's, to be given to `DiskGradients.write`.
        """
        if self._on_disk(owner):
            assert self._disk is not None
            return self._download(owner, buffer, self._disk.lease(owner))
        parked = self._partial.get(owner)
        host = self._finished_place(owner) if parked is None else parked.host
        self._partial[owner] = self._download(owner, buffer, host)
        return self._partial[owner]

    def parked(self, owner: str) -> FinishedGradient:
        """Return a sum that `park` holds, to be read only."""
        return self._partial[owner]

    def _download(self, owner: str, buffer: GradientBuffer, host: Lease) -> FinishedGradient:
        numel = self._records[owner].layout.trainable_numel
        with self._trace.span(owner, "device to host", nbytes=numel * self._dtype.itemsize):
            target = self._device.host_tensor(self._host, host, self._dtype, numel)
            arrived = self._device.download(buffer.total, target)
        self._device_arena.release_after(buffer.lease, arrived)
        return FinishedGradient(host, self._dtype, numel, arrived)

    def discard(self) -> None:
        """Forget every partial sum; for a step that is given up."""
        for owner in list(self._partial):
            self._forget_partial(owner)
        if self._disk is not None:
            self._disk.discard()

    def pending(self) -> tuple[str, ...]:
        """Return the owners whose gradient has begun and is not complete."""
        return (*self._partial, *(() if self._disk is None else self._disk.kept()))

    def take_partial(self, owner: str) -> FinishedGradient:
        """Hand over a partial sum as it is: no other visit will add to it in this step."""
        assert not self._parks
        partial = self._partial[owner]
        partial.arrived.wait()
        host = self._finished_place(owner)
        source = self._device.host_tensor(self._host, partial.host, partial.dtype, partial.numel)
        self._device.host_tensor(self._host, host, partial.dtype, partial.numel).copy_(source)
        self._forget_partial(owner)
        return FinishedGradient(host, partial.dtype, partial.numel, self._device.record_compute())

    def take_parked(self, owner: str) -> FinishedGradient | GradientOnDisk:
        """Hand over a parked sum to its update."""
        if self._on_disk(owner):
            assert self._disk is not None
            self._disk.take(owner)
            return GradientOnDisk(self._dtype, self._records[owner].layout.trainable_numel)
        return self._partial.pop(owner)

    def _on_disk(self, owner: str) -> bool:
        return self._disk is not None and owner in self._disk.owners

    def _lease(self, nbytes: int, holder: str) -> Lease:
        assert self._host_pool is not None, "no gradient stays in host memory"
        return self._host_pool.lease(nbytes, holder)

    def _host_nbytes(self, owner: str) -> int:
        return self._records[owner].layout.trainable_numel * self._dtype.itemsize

    def _finished_place(self, owner: str) -> Lease:
        with self._trace.span("wait for a gradient buffer", "stall", owner=owner):
            return self._lease(self._host_nbytes(owner), f"{owner} gradient")

    def _partial_place(self, owner: str) -> Lease:
        if owner in self._partial:
            return self._partial[owner].host
        return self._places.get(owner) or self._overflow.lease(
            self._host_nbytes(owner), f"{owner} partial gradient"
        )

    def _forget_partial(self, owner: str) -> None:
        partial = self._partial.pop(owner, None)
        if partial is not None and owner not in self._places:
            partial.arrived.wait()
            partial.host.release()
