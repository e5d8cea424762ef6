"""The CPU stand-in for a GPU: an arena of its own under a budget of its own, copies in the caller.

It lets the streaming code run, and be tested, without a GPU: a copy really is one, between a host
arena and a device arena, and what would be an error on a GPU is one here (an upload from device
memory, into memory of no arena). By default a copy is done when its call returns. In strict mode
(OFFLOAD_DEBUG=1) it runs as late as it may (see `late.py`), a release of bytes that a copy is still
using raises, and released bytes are poisoned: whatever is a race on a GPU fails every time.

Thread rule: every method may be called from any thread.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

import torch

from ..buffers import Arena, Budget, Lease
from ..errors import StateError
from ..specs import Tier
from .arena import DeviceArena
from .event import Event
from .late import LateCopies, LateEvent, QueueName
from .tensors import check_copy, host_tensor

__all__ = ["CpuDevice"]


class _Passed:
    """The event of work that has ended."""

    __slots__ = ()

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


class CpuDevice:
    """The stand-in; see the module. A context manager.

    Args:
        device_memory: the budget of its arenas, in bytes.
        strict: run copies as late as they may and refuse early releases; when None, whether the
            environment has OFFLOAD_DEBUG=1.
    """

    def __init__(self, *, device_memory: int, strict: bool | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.budget = Budget(Tier.DEVICE, device_memory)
        strict = os.environ.get("OFFLOAD_DEBUG") == "1" if strict is None else strict
        self._late = LateCopies() if strict else None
        self._arenas: dict[DeviceArena, Arena] = {}

    def host_arena(self, budget: Budget, nbytes: int) -> Arena:
        """See `Device.host_arena`; there is no driver to register it with."""
        return Arena(budget, nbytes, "host arena", on_release=self._host_released if self._late else None)

    def arena(self, nbytes: int) -> DeviceArena:
        """See `Device.arena`; lazily touched, like a host arena."""
        memory = Arena(
            self.budget, nbytes, "device arena", on_release=self._device_released if self._late else None
        )
        arena = DeviceArena(
            torch.frombuffer(memory.memory, dtype=torch.uint8),
            partition=memory.partition,
            wait_on_compute=self.wait_on_compute,
            give_back=self._give_back,
        )
        self._arenas[arena] = memory
        return arena

    def host_tensor(
        self, arena: Arena, lease: Lease, dtype: torch.dtype, numel: int, offset_bytes: int = 0
    ) -> torch.Tensor:
        """See `Device.host_tensor`."""
        return host_tensor(arena, lease, dtype, numel, offset_bytes)

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """See `Device.upload`."""
        check_copy(source, target)
        if not target.numel():
            return _Passed()
        self._require_host(source, "source of an upload")
        for arena in list(self._arenas):
            place = arena.locate(target)
            if place is not None:
                for fence in arena.fences(*place):
                    fence.wait()
                return self._copy("upload", source, target)
        raise ValueError("the target of an upload must lie in an arena of this device")

    def download(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """See `Device.download`."""
        check_copy(source, target)
        if not target.numel():
            return _Passed()
        self._require_host(target, "target of a download")
        return self._copy("download", source, target)

    def save(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """See `Device.save`; done when it returns."""
        check_copy(source, target)
        self._require_host(target, "target of a download")
        with torch.no_grad():
            target.copy_(source)
        return _Passed()

    def restore(self, source: torch.Tensor) -> torch.Tensor:
        """See `Device.restore`; done when it returns."""
        self._require_host(source, "source of an upload")
        return source.clone()

    def record_compute(self) -> Event:
        """See `Device.record_compute`: compute has ended when its call returns."""
        return _Passed()

    def wait_on_compute(self, event: Event) -> None:
        """See `Device.wait_on_compute`: compute runs in this thread, so the thread waits."""
        event.wait()

    def close(self) -> None:
        """See `Device.close`."""
        if self._late is not None:
            self._late.run_all()
        for arena in list(self._arenas):
            arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _copy(self, queue: QueueName, source: torch.Tensor, target: torch.Tensor) -> Event:
        if self._late is not None:
            return self._late.begin(queue, source, target)
        with torch.no_grad():
            target.copy_(source)
        return _Passed()

    def _require_host(self, tensor: torch.Tensor, role: str) -> None:
        if tensor.device.type != "cpu" or any(arena.locate(tensor) for arena in list(self._arenas)):
            raise ValueError(f"the {role} must be host memory; this tensor is device memory")

    def _give_back(self, arena: DeviceArena) -> None:
        self._arenas.pop(arena).close()

    def _host_released(self, memory: Arena, lease: Lease) -> None:
        self._refuse(lease, self._touching(memory, lease))
        memory.poison(lease)

    def _device_released(self, memory: Arena, lease: Lease) -> None:
        arena = next(arena for arena, owned in self._arenas.items() if owned is memory)
        fences = arena.fences(lease.offset, lease.offset + lease.capacity_nbytes)
        # Behind the fences: the copies of one that has just passed are not pending any more.
        pending = self._touching(memory, lease)
        covering = [fence for fence in fences if isinstance(fence, LateEvent)]
        self._refuse(
            lease, [event for event in pending if not any(fence.covers(event) for fence in covering)]
        )
        if not pending:
            memory.poison(lease)

    def _touching(self, memory: Arena, lease: Lease) -> list[LateEvent]:
        assert self._late is not None, "the hooks are installed in strict mode only"
        return self._late.touching(memory.address + lease.offset, lease.capacity_nbytes)

    def _refuse(self, lease: Lease, pending: list[LateEvent]) -> None:
        if pending:
            raise StateError(
                f"{lease} is released while {len(pending)} copies of it are under way "
                f"({', '.join(event.queue for event in pending)}); wait for their events first, or use "
                f"release_after"
            )
