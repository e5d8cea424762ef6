"""A GPU made of queues: enough of `torch.cuda` to run the CUDA device on the CPU, in every order.

Streams hold work; nothing runs until someone waits, and then any stream whose next piece may run is
picked at random (seeded). So one seed runs copies at once and compute late, another the other way
round, and a missing wait shows as wrong bytes under some seed. What it does not show: what a driver
accepts, how fast anything is, and torch's own allocator.

Events follow the CUDA runtime API: a wait is for what the event was last recorded with at the time of
the call, and an event that was never recorded counts as passed.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from offload.device import CudaDevice, cuda, cuda_events, cuda_staging

GPU_NBYTES = 1 << 30

# Work that belongs to the current stream. Everything else (views, empty tensors) is done at once.
_IN_PLACE = {"copy_", "fill_", "zero_", "add_"}


class Stream:
    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu = gpu
        self.queue: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()
        gpu.streams.append(self)

    def enqueue(self, work: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        self.queue.append((ready, work))

    def wait_event(self, event: Event) -> None:
        wanted = event.recorded
        self.enqueue(lambda: None, lambda: wanted in event.passed)


class Event:
    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu = gpu
        self.recorded = 0
        # Each recording passes on its own: one made later, on another stream, may pass first.
        self.passed = {0}
        gpu.num_events += 1

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        mark = self.recorded
        stream.enqueue(lambda: self.passed.add(mark))

    def query(self) -> bool:
        self.gpu.step()
        return self.recorded in self.passed

    def synchronize(self) -> None:
        wanted = self.recorded
        while wanted not in self.passed:
            assert self.gpu.step(), "deadlock: an event is waited for that no stream will reach"


class _OnStream(TorchFunctionMode):
    """Puts the work of its block on a stream instead of doing it."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in _IN_PLACE:
            self.stream.enqueue(lambda: func(*args, **kwargs))
            return args[0]
        if func.__name__ == "clone":
            copy = torch.empty_like(args[0])
            self.stream.enqueue(lambda: copy.copy_(args[0]))
            return copy
        return func(*args, **kwargs)


class FakeCuda:
    """What stands in for `torch.cuda`."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.streams: list[Stream] = []
        self.num_events = 0
        self.recorded_streams: list[Stream] = []
        self.compute_stream = Stream(self)
        self.free_nbytes = GPU_NBYTES
        self.cached_nbytes = 0
        self.registered: dict[int, int] = {}
        self.refuse_to_pin = False
        self.Stream = lambda _device: Stream(self)
        self.Event = lambda blocking=False: Event(self)

    def step(self) -> bool:
        """Do one piece of work of some stream; return False when none may run."""
        # Run, not queued again by the block that whoever waits is in.
        with self.lock, torch.no_grad(), torch._C.DisableTorchFunction():
            ready = [stream for stream in self.streams if stream.queue and stream.queue[0][0]()]
            if not ready:
                return False
            self.random.choice(ready).queue.popleft()[1]()
            return True

    def synchronize(self, _device: object = None) -> None:
        while self.step():
            pass
        assert not any(stream.queue for stream in self.streams), "deadlock: streams wait for each other"

    def compute(self) -> TorchFunctionMode:
        """Context in which tensor work goes to the compute stream."""
        return _OnStream(self.compute_stream)

    def stream(self, stream: Stream) -> TorchFunctionMode:
        return _OnStream(stream)

    def current_stream(self, _device: object = None) -> Stream:
        return self.compute_stream

    def device(self, _index: int) -> nullcontext[None]:
        return nullcontext()

    def mem_get_info(self, _device: object) -> tuple[int, int]:
        return self.free_nbytes, GPU_NBYTES

    def memory_reserved(self, _device: object) -> int:
        return self.cached_nbytes

    def memory_allocated(self, _device: object) -> int:
        return 0

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if self.refuse_to_pin:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def cudaGetErrorString(self, result: int) -> str:
        return f"error {result}"

    def check_error(self, result: int) -> None:
        assert result == 0


class _FakeTorch:
    """The torch module, with the GPU replaced and its tensors in host memory."""

    def __init__(self, gpu: FakeCuda) -> None:
        self.cuda = gpu

    def device(self, *_: object) -> torch.device:
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def fake_cuda_device(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, *, device_memory: int
) -> Iterator[CudaDevice]:
    """A CudaDevice whose GPU is `gpu`."""
    for module in (cuda, cuda_events, cuda_staging):
        monkeypatch.setattr(module, "torch", _FakeTorch(gpu))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda _tensor, stream: gpu.recorded_streams.append(stream)
    )
    monkeypatch.setattr(cuda_staging, "_CHUNK_NBYTES", 4096)
    monkeypatch.setattr(cuda, "STAGING_NBYTES", 8192)
    with CudaDevice(0, device_memory=device_memory) as device:
        yield device
