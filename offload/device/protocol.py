"""What a device is: the Protocols that the CUDA device and the CPU stand-in implement.

A device owns one budget of memory, hands out arenas of it, and copies between host and device
memory without stopping compute. Its order of events, held by the suite in `tests/device`:

- Compute is what the calling thread issues on its current stream. Uploads run on a stream of their
  own, downloads on another: neither waits for the other.
- An upload into bytes given up with `DeviceArena.release_after` begins when that event has passed.
  Compute that writes to such bytes without an upload calls `DeviceArena.claim_on_compute` first.
- A download begins when the compute issued so far by the calling thread has ended.
- Compute sees an upload, and may overwrite the source of a download, after `wait_on_compute`.
- The host may reuse the host bytes of a copy after `Event.wait`, not before.

Thread rule: every method may be called from any thread.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import torch

from ..buffers import Arena, Budget, Lease
from .arena import DeviceArena
from .event import Event

__all__ = ["Device", "Event"]


class Device(Protocol):
    """One compute device with a memory budget; see the module. A context manager."""

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors live."""

    @property
    def budget(self) -> Budget:
        """Every byte the device tier takes is charged here."""

    def host_arena(self, budget: Budget, nbytes: int) -> Arena:
        """Return host memory that copies to and from this device fastest: pinned if there is a GPU.

        A driver that refuses to pin is logged once; the arena then works, copies are slower.

        Raises:
            CapacityError: `budget` has not that much left.
        """

    def arena(self, nbytes: int) -> DeviceArena:
        """Return `nbytes` of device memory, charged to the budget until its `close`.

        Raises:
            CapacityError: the budget, or the device, has not that much left.
        """

    def host_tensor(
        self, arena: Arena, lease: Lease, dtype: torch.dtype, numel: int, offset_bytes: int = 0
    ) -> torch.Tensor:
        """Return a 1-D tensor over the bytes of a host lease, without a copy; valid until its release.

        Args:
            arena: the arena of the lease.
            offset_bytes: from the start of the lease, a multiple of the element size.

        Raises:
            StateError: the lease was released, or is of another arena.
            ValueError: the tensor would not lie within the lease, or is misaligned.
        """

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Begin a copy from host to device; see the module for what it waits for.

        Args:
            source: 1-D, contiguous, host memory; left as it is until the event has passed.
            target: 1-D, as many elements, in an arena of this device. When its dtype differs, the bytes
                cross the link in the source's dtype and are converted on the device.

        Raises:
            ValueError: the tensors do not match this description.
        """

    def download(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Begin a copy from device to host; see the module for what it waits for.

        Args:
            source: 1-D, contiguous, on this device, in an arena or not. In an arena, its lease is given
                up with `release_after` and this event.
            target: 1-D, as many elements, host memory; untouched by the host until the event has passed.
                When its dtype differs, elements are converted on the device.

        Raises:
            ValueError: the tensors do not match this description.
        """

    def save(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Begin a download whose `source` may be dropped at once, and changed.

        `restore` may read `target` from here on, anybody else when the event has passed.

        Args:
            source, target: as for `download`, of one dtype.
        """

    def restore(self, source: torch.Tensor) -> torch.Tensor:
        """Return a new device tensor with what `save` put into `source`.

        Compute issued from now on by the calling thread sees it. The host bytes may be lent to another
        `save` at once, to other uses after the next `record_compute().wait()`.
        """

    def record_compute(self) -> Event:
        """Return an event that passes when the compute issued so far by this thread has ended."""

    def wait_on_compute(self, event: Event) -> None:
        """Make the compute that this thread issues from now on begin after `event`; the host goes on."""

    def close(self) -> None:
        """Wait for all copies and give the device's memory back. Closing twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
