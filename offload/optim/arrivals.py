"""What is done with gradients as they arrive in host memory: measured, and sent on if they go to disk.

Owns one thread, and the global norm of the step in progress. A gradient passes through host memory once:
its squared norm is taken there, and what goes to disk is written from the same slot, so nothing is read
again for the norm. The thread is not the update thread: the end of a step waits for the last norm and not
for the updates queued before it, and a slot of the ring comes free whatever an update waits for.

Invariant: a gradient's norm is noted after its write was asked for, so that whoever waited for the norm
of all gradients may read any of them.

Thread rule: all public methods by the thread that runs the model, `Measurement.wait` by any. An error of
the thread is given to `on_error` once, and raised by `global_norm` and by `Measurement.wait`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..buffers import Arena
from ..codec import view_elements
from ..specs import TensorSpec
from ..tiers.disk_gradients import DiskGradients
from ..tiers.gradients import FinishedGradient
from ..trace import Tracer
from .kernel import squared_norm
from .norms import GlobalNorm, GradientNorms

__all__ = ["Arrivals", "Measurement"]

# What the thread turns into the runtime's error: all. One that got past would end it, and the norm would be
# waited for for ever.
_FAILURES = Exception


class Measurement:
    """Whether one gradient is finite, once it is known."""

    def __init__(self) -> None:
        self._known = threading.Event()
        self._is_finite = False
        self._error: BaseException | None = None

    def wait(self) -> bool:
        """Wait until the gradient has arrived and was measured; return whether it is finite.

        Raises:
            OffloadError: it was not measured, because the thread failed.
        """
        self._known.wait()
        if self._error is not None:
            raise self._error
        return self._is_finite

    def settle(self) -> None:
        """Wait until nobody reads the gradient for it any more, whatever came of it."""
        self._known.wait()

    def put(self, *, is_finite: bool) -> None:
        """Note the answer."""
        self._is_finite = is_finite
        self._known.set()

    def fail(self, error: BaseException) -> None:
        """Note that there will be none."""
        self._error = error
        self._known.set()


@dataclass(frozen=True)
class _Arrival:
    owner: str
    gradient: FinishedGradient
    to_disk: bool
    measurement: Measurement


class Arrivals:
    """See the module."""

    def __init__(
        self,
        *,
        tensors: Mapping[str, Sequence[TensorSpec]],
        host: Arena,
        disk: DiskGradients | None,
        num_threads: int,
        on_error: Callable[[BaseException], None],
        trace: Tracer,
    ) -> None:
        """
        Args:
            tensors: the trainable ones by owner; each is measured alone.
        """
        self._tensors = tensors
        self._host = host
        self._disk = disk
        self._num_threads = num_threads
        self._on_error = on_error
        self._trace = trace
        self._norms = GradientNorms()
        self._arrivals: queue.SimpleQueue[_Arrival | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="offload-arrivals", daemon=True)
        self._thread.start()

    def take(self, owner: str, gradient: FinishedGradient) -> Measurement:
        """Queue a gradient: measure it, and write it if it goes to disk.

        One measured again replaces the one before. The lease of one that goes to disk is taken over.
        """
        self._norms.expect()
        to_disk = self._disk is not None and owner in self._disk.owners
        arrival = _Arrival(owner, gradient, to_disk, Measurement())
        self._arrivals.put(arrival)
        return arrival.measurement

    def global_norm(self) -> GlobalNorm:
        """Wait until the gradients of this step were measured and return their norm.

        Raises:
            OffloadError: the thread's error, if it failed.
        """
        norm = self._norms.total()
        if self._error is not None:
            raise self._error
        return norm

    def forget_norms(self) -> None:
        """Begin the next step's global norm."""
        self._norms.clear()

    def close(self) -> None:
        """Finish the queue and stop the thread. The pools must outlive this call."""
        self._arrivals.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (arrival := self._arrivals.get()) is not None:
            if self._error is not None:
                self._drop(arrival, self._error)
                continue
            try:
                self._handle(arrival)
            except _FAILURES as error:
                self._fail(arrival, error)

    def _handle(self, arrival: _Arrival) -> None:
        try:
            squared, is_finite = self._measure(arrival.owner, arrival.gradient)
        except BaseException:
            if arrival.to_disk:
                arrival.gradient.host.release()
            raise
        if arrival.to_disk:
            assert self._disk is not None
            self._disk.write(arrival.owner, arrival.gradient.host)
        arrival.measurement.put(is_finite=is_finite)
        self._norms.put(arrival.owner, squared, is_finite=is_finite)

    def _measure(self, owner: str, gradient: FinishedGradient) -> tuple[tuple[float, ...], bool]:
        began_s = time.perf_counter()
        gradient.arrived.wait()
        waited_s = time.perf_counter()
        if waited_s - began_s > 1e-4:
            self._trace.add("stall", "wait for a gradient to arrive", began_s, waited_s)
        memory = self._host.view(gradient.host, 0, gradient.numel * gradient.dtype.itemsize)
        flat = view_elements(memory, gradient.dtype, gradient.numel)
        with self._trace.span(owner, "norm", elements=gradient.numel):
            measured = [
                squared_norm(flat[spec.offset : spec.end], num_threads=self._num_threads)
                for spec in self._tensors[owner]
            ]
        return tuple(squared for squared, _ in measured), all(is_finite for _, is_finite in measured)

    def _fail(self, arrival: _Arrival, error: BaseException) -> None:
        # Before whoever waits for the norm, or for a slot, goes on.
        self._error = error
        if self._disk is not None:
            self._disk.fail(error)
        arrival.measurement.fail(error)
        self._norms.miss()
        self._on_error(error)

    def _drop(self, arrival: _Arrival, error: BaseException) -> None:
        arrival.measurement.fail(error)
        self._norms.miss()
        if arrival.to_disk:
            # The copy into it may not have ended.
            arrival.gradient.arrived.wait()
            arrival.gradient.host.release()
