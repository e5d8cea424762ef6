"""Measures parked gradients as they arrive in host memory, and sends those on that go to disk.

Owns one thread. A gradient passes through host memory once: its squared norm is taken there, and the same
slot is then written from, so nothing is read again for the norm. The thread is not the update thread: a
slot of the ring must come free whatever an update waits for.

Invariant: a gradient's norm is noted after its write was asked for, so that whoever waited for the norm
of all gradients may read any of them.

Thread rule: all public methods by the thread that runs the model. An error of the thread is given to
`on_error` once, and raised by `check`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..buffers import Arena
from ..codec import view_elements
from ..disk_gradients import DiskGradients
from ..gradients import FinishedGradient
from ..trace import Tracer
from .kernel import squared_norm
from .norms import GradientNorms

__all__ = ["GradientMeter", "Parker"]

# What the thread turns into the runtime's error: all. One that got past would end it, and the norm would be
# waited for for ever.
_FAILURES = Exception


@dataclass(frozen=True)
class GradientMeter:
    """Takes the squared norm of a gradient in host memory, once it has arrived.

    Attributes:
        host: the arena of its lease.
        norms: where it is noted.
        num_threads: of the kernel.
        trace: shows it, and the wait for the copy.
    """

    host: Arena
    norms: GradientNorms
    num_threads: int
    trace: Tracer

    def squared_norm(self, owner: str, gradient: FinishedGradient) -> tuple[float, bool]:
        """Wait for the gradient; return its squared norm and whether it is finite."""
        began_s = time.perf_counter()
        gradient.arrived.wait()
        waited_s = time.perf_counter()
        if waited_s - began_s > 1e-4:
            self.trace.add("stall", "update waits for a gradient", began_s, waited_s)
        memory = self.host.view(gradient.host, 0, gradient.numel * gradient.dtype.itemsize)
        flat = view_elements(memory, gradient.dtype, gradient.numel)
        with self.trace.span(owner, "norm", elements=gradient.numel):
            return squared_norm(flat, num_threads=self.num_threads)


@dataclass(frozen=True)
class _Arrival:
    owner: str
    gradient: FinishedGradient
    to_disk: bool


class Parker:
    """See the module."""

    def __init__(
        self, *, meter: GradientMeter, disk: DiskGradients | None, on_error: Callable[[BaseException], None]
    ) -> None:
        self._meter = meter
        self._disk = disk
        self._on_error = on_error
        self._arrivals: queue.SimpleQueue[_Arrival | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="offload-park", daemon=True)
        self._thread.start()

    def park(self, owner: str, gradient: FinishedGradient) -> None:
        """Queue a gradient: measure it, and write it if it goes to disk.

        One measured again replaces the one before. The lease of one that goes to disk is taken over.
        """
        self._meter.norms.expect()
        to_disk = self._disk is not None and owner in self._disk.owners
        self._arrivals.put(_Arrival(owner, gradient, to_disk))

    def check(self) -> None:
        """Raise the thread's error, if it failed.

        Raises:
            OffloadError: a gradient could not be written.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Finish the queue and stop the thread. The pools must outlive this call."""
        self._arrivals.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (arrival := self._arrivals.get()) is not None:
            if self._error is not None:
                self._drop(arrival)
                continue
            try:
                self._handle(arrival)
            except _FAILURES as error:
                self._fail(error)

    def _handle(self, arrival: _Arrival) -> None:
        squared, is_finite = self._meter.squared_norm(arrival.owner, arrival.gradient)
        if arrival.to_disk:
            assert self._disk is not None
            self._disk.write(arrival.owner, arrival.gradient.host)
        self._meter.norms.put(arrival.owner, squared, is_finite=is_finite)

    def _fail(self, error: BaseException) -> None:
        # Before whoever waits for the norm, or for a slot, goes on.
        self._error = error
        if self._disk is not None:
            self._disk.fail(error)
        self._meter.norms.miss()
        self._on_error(error)

    def _drop(self, arrival: _Arrival) -> None:
        self._meter.norms.miss()
        # The copy into it may not have ended.
        arrival.gradient.arrived.wait()
        if arrival.to_disk:
            arrival.gradient.host.release()
