"""How fast host memory is copied on all cores, and how fast one core sums a checksum.

Thread rule: the caller's thread; copies run on threads of their own, which end before it returns.
"""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..aio import crc32c
from ..errors import CapacityError
from ..sizes import MIB, format_bytes

__all__ = ["checksum_bytes_per_s", "copy_bytes_per_s"]

# Larger than the share of the last-level cache that a core of any server processor has.
_THREAD_NBYTES = 64 * MIB

# In one round, so that the threads' starts and ends weigh little.
_COPIES = 4


def copy_bytes_per_s(num_threads: int, *, thread_nbytes: int = _THREAD_NBYTES, rounds: int = 5) -> float:
    """Return the bytes per second that all threads together copy, counted once.

    Each thread has its own two buffers, touched by itself beforehand, so that on a machine with several
    memory nodes they lie near it. numpy gives up the GIL while it copies.

    Args:
        num_threads: one a core.
        thread_nbytes: size of the copy of each thread.
        rounds: of which the median counts.

    Raises:
        CapacityError: the host has no memory for the buffers.
    """
    begin = threading.Barrier(num_threads)
    times_s: list[list[tuple[float, float]]] = [[] for _ in range(num_threads)]

    def work(index: int) -> None:
        try:
            source = np.full(thread_nbytes, index % 251, dtype=np.uint8)
            target: NDArray[np.uint8] = np.zeros_like(source)
            target[:] = source
            for _ in range(rounds):
                begin.wait()
                start_s = time.perf_counter()
                for _ in range(_COPIES):
                    np.copyto(target, source)
                times_s[index].append((start_s, time.perf_counter()))
        except MemoryError as error:
            begin.abort()
            raise CapacityError(
                f"no memory for copies of {format_bytes(2 * thread_nbytes * num_threads)}; leave host "
                "memory out of the measurement"
            ) from error

    with ThreadPoolExecutor(num_threads, thread_name_prefix="offload-bench") as pool:
        futures = [pool.submit(work, index) for index in range(num_threads)]
        try:
            _collect([future.exception() for future in futures])
        finally:
            begin.abort()
    elapsed_s: list[float] = [
        max(end for _, end in turn) - min(start for start, _ in turn) for turn in zip(*times_s, strict=True)
    ]
    return _COPIES * thread_nbytes * num_threads / statistics.median(elapsed_s)


def checksum_bytes_per_s(nbytes: int = _THREAD_NBYTES, *, rounds: int = 5) -> float:
    """Return the bytes per second of a CRC-32C on one core.

    Args:
        nbytes: of memory to sum; more than the caches hold.
        rounds: of which the median counts, after one that does not.
    """
    data = np.arange(nbytes // 8, dtype=np.uint64).data
    crc32c(data)
    elapsed = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        crc32c(data)
        elapsed.append(time.perf_counter() - start_s)
    return data.nbytes / statistics.median(elapsed)


def _collect(errors: list[BaseException | None]) -> None:
    """Raise the error that made the others fail: a broken barrier is only what it left behind."""
    real = [error for error in errors if error is not None]
    for error in real:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if real:
        raise real[0]
