"""How fast bytes go between host and GPU: page-locked both ways, at once, and from ordinary memory.

Page-locked copies are timed by events on the GPU's own streams; a copy from ordinary memory is work of
the processor too, so the host's clock times it between two points where the GPU is idle.

torch is imported when this is called, and not before: drives are measured where it is not installed.
Thread rule: the caller's thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import CapacityError
from ..machine import DeviceSpeed
from ..sizes import MIB, format_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["device_speed"]

# Beside copies of this size the cost of starting one is nothing.
_COPY_NBYTES = 256 * MIB


def device_speed(index: int = 0, *, copy_nbytes: int = _COPY_NBYTES, rounds: int = 5) -> DeviceSpeed | None:
    """Measure a GPU's link; None without torch or a CUDA device.

    Args:
        index: of the GPU, as torch counts.
        copy_nbytes: size of each copy; twice that is taken on the GPU and three times on the host.
        rounds: of which the median counts, after one that does not.

    Raises:
        CapacityError: the GPU or the host lacks the memory, or the driver refuses.

    Source: torch.cuda.Event and torch.cuda.Stream of the PyTorch documentation.
    """
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    try:
        with torch.cuda.device(index):
            return _measure(torch, index, copy_nbytes, rounds)
    # torch has no narrower class for what the driver refuses; OutOfMemoryError is one of them.
    except RuntimeError as error:
        raise CapacityError(
            f"copies of {format_bytes(copy_nbytes)} to GPU {index} cannot be measured: "
            f"{str(error).splitlines()[0]}; free memory on the GPU, or raise the limit of locked memory "
            "(ulimit -l)"
        ) from error


def _measure(torch: Any, index: int, nbytes: int, rounds: int) -> DeviceSpeed:
    gpu = torch.device("cuda", index)
    # Ones: memory that was never written is one page of zeros, over and over.
    pinned = [torch.ones(nbytes, dtype=torch.uint8).pin_memory() for _ in range(2)]
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    on_gpu = [torch.ones(nbytes, dtype=torch.uint8, device=gpu) for _ in range(2)]
    streams = [torch.cuda.Stream(gpu) for _ in range(2)]

    def up(stream: int) -> None:
        with torch.cuda.stream(streams[stream]):
            on_gpu[0].copy_(pinned[0], non_blocking=True)

    def down(stream: int) -> None:
        with torch.cuda.stream(streams[stream]):
            pinned[1].copy_(on_gpu[1], non_blocking=True)

    def by_events(*work: Callable[[int], None]) -> float:
        """Return the seconds from the common start to the end of the last stream's work."""
        torch.cuda.synchronize(gpu)
        begin = torch.cuda.Event(enable_timing=True)
        ends = [torch.cuda.Event(enable_timing=True) for _ in work]
        begin.record(streams[0])
        for number, (copy, end) in enumerate(zip(work, ends, strict=True)):
            if number:
                streams[number].wait_event(begin)
            copy(number)
            end.record(streams[number])
        torch.cuda.synchronize(gpu)
        # elapsed_time is in milliseconds.
        return max(float(begin.elapsed_time(end)) for end in ends) / 1e3

    def by_clock(target: torch.Tensor, source: torch.Tensor) -> float:
        torch.cuda.synchronize(gpu)
        begin_s = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(gpu)
        return time.perf_counter() - begin_s

    def rate(moved_nbytes: int, timed: Callable[[], float]) -> float:
        timed()
        return moved_nbytes / statistics.median(timed() for _ in range(rounds))

    properties = torch.cuda.get_device_properties(gpu)
    return DeviceSpeed(
        name=properties.name,
        memory_nbytes=properties.total_memory,
        pinned_to_device_bytes_per_s=rate(nbytes, lambda: by_events(up)),
        device_to_pinned_bytes_per_s=rate(nbytes, lambda: by_events(down)),
        both_ways_bytes_per_s=rate(2 * nbytes, lambda: by_events(up, down)),
        pageable_to_device_bytes_per_s=rate(nbytes, lambda: by_clock(on_gpu[0], pageable)),
        device_to_pageable_bytes_per_s=rate(nbytes, lambda: by_clock(pageable, on_gpu[1])),
    )
