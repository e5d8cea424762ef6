"""Saves the inputs of units between forward and backward, in host memory.

Owns a heap in the host arena: forward takes from it, backward gives back, and what an abandoned pass leaves
is dropped by `reset`. A saved tensor is a copy, so the model may reuse or overwrite the original.

Thread rule: `save` is called by the thread that runs forward, `restore` and `drop` by the one that
runs backward; the two phases do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..buffers import Arena, Heap, Lease
from ..device import Device
from ..errors import StateError
from ..trace import Tracer

__all__ = ["Activations", "SavedTensor"]


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """A tensor's bytes on the host, and what is needed to make it again.

    Attributes:
        step: the pass it belongs to; it cannot be restored in a later one.
    """

    lease: Lease
    dtype: torch.dtype
    shape: torch.Size
    step: int


class Activations:
    """See the module."""

    def __init__(self, device: Device, host: Arena, heap: Heap, trace: Tracer) -> None:
        self._device = device
        self._host = host
        self._heap = heap
        self._trace = trace
        self._live: dict[int, SavedTensor] = {}
        self._step = 0

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
            CapacityError: the part of the host budget left for saved inputs is full.
        """
        source = tensor.detach().contiguous().view(-1)
        # A lease has at least one byte; a tensor may have none (an expert that got no tokens).
        nbytes = max(1, source.numel() * source.element_size())
        lease = self._heap.lease(nbytes, f"{holder} input")
        with self._trace.span(holder, "device to host", nbytes=nbytes):
            target = self._device.host_tensor(self._host, lease, source.dtype, source.numel())
            self._device.save(source, target)
        saved = SavedTensor(lease, tensor.dtype, tensor.shape, self._step)
        self._live[id(saved)] = saved
        return saved

    def restore(self, saved: SavedTensor) -> torch.Tensor:
        """Return a new device tensor with the saved values.

        Raises:
            StateError: the pass it was saved in is over.
        """
        if saved.step != self._step:
            raise StateError(
                "backward reached a unit whose step is over: call backward() once, before runtime.step()"
            )
        numel = saved.shape.numel()
        with self._trace.span("saved input", "host to device", nbytes=saved.lease.nbytes):
            source = self._device.host_tensor(self._host, saved.lease, saved.dtype, numel)
            return self._device.restore(source).view(saved.shape)

    def drop(self, saved: SavedTensor) -> None:
        """Free the saved bytes; after this `restore` is not possible."""
        if self._live.pop(id(saved), None) is not None:
            saved.lease.release()

    @property
    def free_nbytes(self) -> int:
        """The most bytes that can be lent in one piece."""
        return self._heap.largest_free_nbytes

    @contextmanager
    def lend(self, nbytes: int, holder: str) -> Iterator[memoryview]:
        """Lend `nbytes` of the free memory between passes; the view is valid inside the block."""
        with self._heap.lease(nbytes, holder) as lease:
            yield self._host.view(lease)

    def reset(self) -> None:
        """Free everything saved and begin the next pass."""
        for saved in reversed(self._live.values()):
            saved.lease.release()
        self._live.clear()
        self._step += 1
