"""The CUDA device: one arena allocation, persistent streams, recycled events, pinned host memory.

Invariants:

- No stream, event or memory is made per step, except by `save` and `restore`, whose tensors are
  torch's as all activations are.
- The link carries each copy in the dtype of its host end. (torch's own `copy_` would do the same, by
  way of a temporary as large as the tensor.)
- The order of work is that of `protocol.py`, kept with events between streams; only `Event.wait`,
  `close` and a `save` too far ahead of the link block the host.

Thread rule: every method may be called from any thread; each sets the current GPU for its calls. A
lock per direction keeps the enqueueing of one copy together.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from ..buffers import PAGE_NBYTES, Arena, Budget, Lease, Partition, Region
from ..errors import CapacityError, StateError
from ..sizes import align_up, format_bytes
from ..specs import Tier
from .arena import DeviceArena
from .cuda_events import CudaEvent, EventPool
from .cuda_staging import STAGING_NBYTES, Staging
from .event import Event
from .tensors import check_copy, host_tensor

__all__ = ["CudaDevice"]

_log = logging.getLogger(__name__)

# cudaHostRegisterPortable: pinned for every context, whichever GPU is current in a thread.
_PORTABLE = 1

# Saved inputs on their way to the host hold device memory: further ahead than this, `save` waits.
_MAX_SAVES_IN_FLIGHT = 4


class CudaDevice:
    """One GPU; see the module. A context manager.

    Args:
        index: of the GPU, as torch counts.
        device_memory: the budget of its arenas and of the staging buffers (16 MiB), in bytes.

    Raises:
        CapacityError: the GPU has less memory free, or the budget does not hold the staging buffers.
    """

    def __init__(self, index: int, *, device_memory: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.budget = Budget(Tier.DEVICE, device_memory)
        self._index = index
        self._arenas: list[DeviceArena] = []
        self._events = EventPool()
        self._upload_lock = threading.Lock()
        self._download_lock = threading.Lock()
        self._saves: deque[CudaEvent] = deque()
        self._told_unpinned = False
        self._closed = False
        _require_free_memory(self.torch_device, device_memory)
        self.budget.charge(2 * STAGING_NBYTES, "dtype conversion")
        with torch.cuda.device(index):
            # torch leaves this constructor untyped.
            new_stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream
            self._uploads = new_stream(self.torch_device)
            self._widening = new_stream(self.torch_device)
            self._downloads = new_stream(self.torch_device)
            self._narrowing = new_stream(self.torch_device)
        self._staging = {name: Staging(self._allocate(STAGING_NBYTES)) for name in ("upload", "download")}

    def host_arena(self, budget: Budget, nbytes: int) -> Arena:
        """See `Device.host_arena`. Registering touches every page."""
        arena = Arena(budget, nbytes, "host arena")
        refusal = self._register(arena)
        if refusal is None:
            arena.pin(partial(self._unregister, arena.address))
        elif not self._told_unpinned:
            self._told_unpinned = True
            _log.warning(
                "%s of host memory cannot be pinned (%s): copies to %s will be slower; lower host_memory, or "
                "raise the limit on locked memory (on WSL about 1 GiB in all)",
                format_bytes(arena.nbytes),
                refusal,
                self.torch_device,
            )
        return arena

    def arena(self, nbytes: int) -> DeviceArena:
        """See `Device.arena`."""
        size = align_up(nbytes, PAGE_NBYTES)
        self.budget.charge(size, "device arena")
        try:
            memory = self._allocate(size)
        except torch.OutOfMemoryError as error:
            self.budget.refund(size, "device arena")
            raise CapacityError(
                f"{self.torch_device} has no {format_bytes(size)} ({size:,} bytes) in one piece: "
                f"{str(error).splitlines()[0]}; lower device_memory, or free the GPU's memory"
            ) from error
        arena = DeviceArena(
            memory,
            partition=Partition(Region("device arena", size)),
            wait_on_compute=self.wait_on_compute,
            give_back=self._give_back,
        )
        self._arenas.append(arena)
        return arena

    def host_tensor(
        self, arena: Arena, lease: Lease, dtype: torch.dtype, numel: int, offset_bytes: int = 0
    ) -> torch.Tensor:
        """See `Device.host_tensor`."""
        return host_tensor(arena, lease, dtype, numel, offset_bytes)

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """See `Device.upload`."""
        check_copy(source, target)
        self._require_open()
        self._require_host(source, "source of an upload")
        fences = self._fences(target)
        # The stream that writes the target is the one that waits until it is free.
        writing = self._uploads if source.dtype == target.dtype else self._widening
        with self._upload_lock, torch.cuda.device(self._index), torch.no_grad():
            for fence in fences:
                self._wait(writing, fence)
            if writing is self._uploads:
                with torch.cuda.stream(writing):
                    target.copy_(source, non_blocking=True)
            else:
                self._staging["upload"].copy(
                    source, target, staged_dtype=source.dtype, fill=self._uploads, empty=writing
                )
            event = self._events.record(writing)
            if writing is not self._uploads:
                # Uploads end in the order they were begun, converted or not.
                self._uploads.wait_event(event.raw)
            return event

    def download(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """See `Device.download`."""
        check_copy(source, target)
        self._require_host(target, "target of a download")
        self._require_device(source)
        return self._download(source, target)

    def save(self, source: torch.Tensor, target: torch.Tensor) -> CudaEvent:
        """See `Device.save`. The device keeps a copy until it is on the host.

        Without the copy, a model that changes its activations in place would change the saved ones.
        """
        check_copy(source, target)
        self._require_host(target, "target of a download")
        self._require_device(source)
        while len(self._saves) >= _MAX_SAVES_IN_FLIGHT:
            self._saves.popleft().wait()
        with torch.cuda.device(self._index), torch.no_grad():
            saved = self._download(source.clone(), target)
        self._saves.append(saved)
        return saved

    def restore(self, source: torch.Tensor) -> torch.Tensor:
        """See `Device.restore`. The copy runs on the compute stream, which needs it next."""
        self._require_host(source, "source of an upload")
        with torch.cuda.device(self._index), torch.no_grad():
            if self._saves:
                # The last save is the last on its stream: all before it have ended, too.
                self._wait(torch.cuda.current_stream(self._index), self._saves[-1])
            restored = torch.empty_like(source, device=self.torch_device)
            return restored.copy_(source, non_blocking=True)

    def record_compute(self) -> Event:
        """See `Device.record_compute`."""
        return self._record_compute()

    def wait_on_compute(self, event: Event) -> None:
        """See `Device.wait_on_compute`."""
        self._wait(torch.cuda.current_stream(self._index), event)

    def close(self) -> None:
        """See `Device.close`."""
        if self._closed:
            return
        self._closed = True
        torch.cuda.synchronize(self._index)
        self._saves.clear()
        for arena in list(self._arenas):
            arena.close()
        self._staging.clear()
        self.budget.refund(2 * STAGING_NBYTES, "dtype conversion")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _allocate(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.device(self._index):
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
            # It may have been another tensor's until now: kernels still queued on this stream may use
            # it, and the copy streams do not wait for this stream.
            torch.cuda.synchronize(self._index)
        return memory

    def _give_back(self, arena: DeviceArena) -> None:
        # torch may hand the memory to the next tensor of this stream: other streams must be done with it.
        torch.cuda.synchronize(self._index)
        self._arenas.remove(arena)
        self.budget.refund(arena.nbytes, "device arena")

    def _download(self, source: torch.Tensor, target: torch.Tensor) -> CudaEvent:
        self._require_open()
        computed = self._record_compute()
        reading = self._downloads if source.dtype == target.dtype else self._narrowing
        with self._download_lock, torch.cuda.device(self._index), torch.no_grad():
            self._wait(reading, computed)
            if reading is self._downloads:
                with torch.cuda.stream(reading):
                    target.copy_(source, non_blocking=True)
            else:
                self._staging["download"].copy(
                    source, target, staged_dtype=target.dtype, fill=reading, empty=self._downloads
                )
            if self._locate(source) is None:
                # Memory of torch's allocator: not to be handed on before this stream has read it.
                source.record_stream(reading)
            return self._events.record(self._downloads)

    def _record_compute(self) -> CudaEvent:
        with torch.cuda.device(self._index):
            return self._events.record(torch.cuda.current_stream(self._index))

    def _wait(self, stream: torch.cuda.Stream, event: Event) -> None:
        if isinstance(event, CudaEvent):
            stream.wait_event(event.raw)
        else:
            event.wait()

    def _locate(self, tensor: torch.Tensor) -> tuple[DeviceArena, int, int] | None:
        for arena in list(self._arenas):
            place = arena.locate(tensor)
            if place is not None:
                return arena, *place
        return None

    def _fences(self, target: torch.Tensor) -> list[Event]:
        if not target.numel():
            return []
        place = self._locate(target)
        if place is None:
            raise ValueError("the target of an upload must lie in an arena of this device")
        arena, begin, end = place
        return arena.fences(begin, end)

    def _require_open(self) -> None:
        if self._closed:
            raise StateError(f"{self.torch_device} is closed; open it again")

    def _require_host(self, tensor: torch.Tensor, role: str) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(f"the {role} must be host memory; this tensor is on {tensor.device}")

    def _require_device(self, source: torch.Tensor) -> None:
        if source.device != self.torch_device:
            raise ValueError(f"the source of a download must be on {self.torch_device}, not {source.device}")

    def _register(self, arena: Arena) -> str | None:
        """Pin the arena's memory; return None, or why the driver refused."""
        with torch.cuda.device(self._index):
            cudart = _cudart()
            result = cudart.cudaHostRegister(arena.address, arena.nbytes, _PORTABLE)
            if int(result) == 0:
                return None
            # The refusal stays the thread's last error, and the next kernel launch would be blamed for it.
            # torch binds no cudaGetLastError; its check after a launch reports and clears it.
            try:
                torch.ones(1, device=self.torch_device)
            except RuntimeError as error:
                _log.debug("cleared the pending CUDA error: %s", error)
            return str(cudart.cudaGetErrorString(result))

    def _unregister(self, address: int) -> None:
        with torch.cuda.device(self._index):
            torch.cuda.synchronize(self._index)
            torch.cuda.check_error(_cudart().cudaHostUnregister(address))


def _cudart() -> Any:
    # torch leaves this function, and the module it returns, untyped.
    load: Callable[[], Any] = torch.cuda.cudart
    return load()


def _require_free_memory(device: torch.device, nbytes: int) -> None:
    free, total = torch.cuda.mem_get_info(device)
    # What torch's allocator holds unused is ours to take as well.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if nbytes > free + cached:
        raise CapacityError(
            f"device_memory is {format_bytes(nbytes)} ({nbytes:,} bytes) but {device} has "
            f"{format_bytes(free + cached)} ({free + cached:,} bytes) of {format_bytes(total)} free; lower "
            f"device_memory, or end what else runs on the GPU (see nvidia-smi)"
        )
