"""How long other Python threads are held off while I/O calls are made: a ticker and the gaps it sees.

A second thread reads the clock over and over, and notes how long it was between two readings. With the
main thread idle that is what the machine and the interpreter do by themselves; with the main thread
in a burst of calls, what is above that is due to the calls.

Thread rule: the caller's thread, and one of its own for as long as a measurement lasts. The switch
interval of the process is changed meanwhile and put back.
"""

from __future__ import annotations

import mmap
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from offload.aio import Engine, Op, Request
from offload.sizes import GIB, MIB

__all__ = ["GilGaps", "measure_burst", "measure_gaps"]

# The default is 5 ms: a thread that waits for the interpreter would ask for it no sooner than the bar.
SWITCH_INTERVAL_S = 0.0005


class GilGaps(NamedTuple):
    """The longest time between two ticks, with the main thread idle and while it worked."""

    idle_s: float
    working_s: float
    duration_s: float  # of the work
    num_ticks: int  # during the work


def measure_gaps(work: Callable[[], object]) -> GilGaps:
    """Measure the gaps while the caller's thread does `work`, and as long while it does nothing."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        with _Ticker() as working:
            began_s = time.perf_counter()
            work()
            duration_s = time.perf_counter() - began_s
        with _Ticker() as idle:
            time.sleep(duration_s)
    finally:
        sys.setswitchinterval(before_s)
    return GilGaps(idle.longest_s, working.longest_s, duration_s, working.num_ticks)


def measure_burst(
    engine: Engine, path: Path, *, total_nbytes: int = GIB, request_nbytes: int = MIB, num_in_flight: int = 64
) -> GilGaps:
    """Measure the gaps while `total_nbytes` are written to a new file and read back.

    Each request is submitted as soon as the oldest has been waited for. The file is removed.

    Args:
        engine: any; 1 GiB in requests of 1 MiB is 2,048 submits and as many waits.
        path: where there is no file yet.
    """
    buffers = [mmap.mmap(-1, request_nbytes) for _ in range(num_in_flight)]
    try:
        with engine.open(str(path), "x+") as file:
            file.allocate(total_nbytes)

            def work() -> None:
                ops: tuple[Op, Op] = ("write", "read")
                for op in ops:
                    requests: deque[Request] = deque()
                    for number, offset in enumerate(range(0, total_nbytes, request_nbytes)):
                        if len(requests) == num_in_flight:
                            requests.popleft().wait()
                        buffer = buffers[number % num_in_flight]
                        requests.append(engine.submit(op, file, buffer, offset))
                    for request in requests:
                        request.wait()

            return measure_gaps(work)
    finally:
        path.unlink(missing_ok=True)


class _Ticker:
    """Reads the clock on a thread of its own, from entry to exit."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.num_ticks = 0
        self._ends = False
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="ticker")

    def __enter__(self) -> _Ticker:
        self._thread.start()
        self._began.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends = True
        self._thread.join()

    def _tick(self) -> None:
        longest_s, num_ticks = 0.0, 0
        self._began.set()
        before_s = time.perf_counter()
        while not self._ends:
            now_s = time.perf_counter()
            if now_s - before_s > longest_s:
                longest_s = now_s - before_s
            before_s = now_s
            num_ticks += 1
        self.longest_s, self.num_ticks = longest_s, num_ticks
