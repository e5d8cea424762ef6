"""Gradients of one record at a time: summed in a flat device buffer, handed over on the host.

Owns the device buffers that autograd adds into and the host leases that carry the sums to the
update. A record that several backward visits add to is summed over them: between them its partial sum
waits on the host and is restored first.

[Note: where partial sums wait] A sum that is finished takes a slot of the pool, which an update gives
back; a sum that is not finished never does, or the visits that would finish it could wait for its slot
for ever. Records that units share (tied embeddings) have a place of their own, which the plan foresaw.
What it cannot foresee (a model called twice in a step) waits in the stack of saved inputs.

Thread rule: called by the thread that runs backward, one visit at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .buffers import Arena, Lease, Pool, Stack
from .device import Device, DeviceArena, Event
from .records import RecordSet
from .trace import Tracer

__all__ = ["FinishedGradient", "GradientBuffer", "Gradients"]


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


class Gradients:
    """See the module."""

    def __init__(
        self,
        *,
        records: Mapping[str, RecordSet],
        device: Device,
        host: Arena,
        host_pool: Pool,
        device_arena: DeviceArena,
        device_pool: Pool,
        shared: Sequence[str],
        overflow: Stack,
        sum_micro_batches: bool,
        trace: Tracer,
    ) -> None:
        self._records = records
        self._device = device
        self._host = host
        self._host_pool = host_pool
        self._device_arena = device_arena
        self._device_pool = device_pool
        self._sum_micro_batches = sum_micro_batches
        self._trace = trace
        self._overflow = overflow
        self._partial: dict[str, Lease] = {}
        # Largest first: each gets the smallest slot that fits, which is the one planned for it.
        self._places = {
            owner: host_pool.lease(self._host_nbytes(owner), f"{owner} partial gradient")
            for owner in sorted(shared, key=self._host_nbytes, reverse=True)
        }

    def begin(self, owner: str) -> GradientBuffer:
        """Lease a device buffer, filled with the partial sum so far (zeros at first)."""
        record = self._records[owner]
        numel = record.layout.trainable_numel
        compute = record.compute_dtype
        wide = self._host_dtype(owner)
        nbytes = numel * wide.itemsize + (numel * compute.itemsize if wide is not compute else 0)
        lease = self._device_pool.lease(nbytes, f"{owner} gradient")
        # The bytes may still be on their way to the host for the unit before.
        self._device_arena.claim_on_compute(lease)
        total = self._device_arena.tensor(lease, wide, numel)
        micro = total
        if wide is not compute:
            micro = self._device_arena.tensor(lease, compute, numel, numel * wide.itemsize)
            micro.zero_()
        partial = self._partial.get(owner)
        if partial is None:
            total.zero_()
        else:
            source = self._device.host_tensor(self._host, partial, wide, numel)
            self._device.wait_on_compute(self._device.upload(source, total))
        return GradientBuffer(total, micro, lease)

    def finish(self, owner: str, buffer: GradientBuffer, *, complete: bool) -> FinishedGradient | None:
        """Copy the sum to host memory and free the device buffer.

        Args:
            complete: no further visit of this step adds to the record.

        Returns:
            The gradient when complete, to be released by the update; None otherwise.

        Raises:
            CapacityError: a sum that other visits add to has no place to wait.
        """
        numel = self._records[owner].layout.trainable_numel
        dtype = buffer.total.dtype
        host = self._finished_place(owner) if complete else self._partial_place(owner)
        with self._trace.span(owner, "device to host", nbytes=numel * dtype.itemsize):
            target = self._device.host_tensor(self._host, host, dtype, numel)
            arrived = self._device.download(buffer.total, target)
        self._device_arena.release_after(buffer.lease, arrived)
        if complete:
            self._forget_partial(owner)
            return FinishedGradient(host, dtype, numel, arrived)
        # The next visit uploads it again, on another stream.
        arrived.wait()
        self._partial[owner] = host
        return None

    def discard(self) -> None:
        """Forget every partial sum; for a step that is given up."""
        for owner in list(self._partial):
            self._forget_partial(owner)

    def pending(self) -> tuple[str, ...]:
        """Return the owners whose gradient has begun and is not complete."""
        return tuple(self._partial)

    def take_partial(self, owner: str) -> FinishedGradient:
        """Hand over a partial sum as it is: no other visit will add to it in this step."""
        numel = self._records[owner].layout.trainable_numel
        dtype = self._host_dtype(owner)
        host = self._finished_place(owner)
        source = self._device.host_tensor(self._host, self._partial[owner], dtype, numel)
        self._device.host_tensor(self._host, host, dtype, numel).copy_(source)
        self._forget_partial(owner)
        return FinishedGradient(host, dtype, numel, self._device.record_compute())

    def _host_dtype(self, owner: str) -> torch.dtype:
        return torch.float32 if self._sum_micro_batches else self._records[owner].compute_dtype

    def _host_nbytes(self, owner: str) -> int:
        return self._records[owner].layout.trainable_numel * self._host_dtype(owner).itemsize

    def _finished_place(self, owner: str) -> Lease:
        with self._trace.span("wait for a gradient buffer", "stall", owner=owner):
            return self._host_pool.lease(self._host_nbytes(owner), f"{owner} gradient")

    def _partial_place(self, owner: str) -> Lease:
        kept = self._partial.get(owner) or self._places.get(owner)
        return kept or self._overflow.push(self._host_nbytes(owner), f"{owner} partial gradient")

    def _forget_partial(self, owner: str) -> None:
        # On a GPU the copy out of it has not ended, perhaps; compute waits for it, and whatever is
        # written here next (a saved input, a partial sum) is copied behind compute.
        lease = self._partial.pop(owner, None)
        if lease is not None and owner not in self._places:
            lease.release()
