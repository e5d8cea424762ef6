"""CUDA events that are recycled: none is made per step once the run is warm.

Invariant: a torch event is recorded anew only when nobody holds the `CudaEvent` around it. Streams that
were told to wait for it keep what it stood for at the call (CUDA runtime API, cudaStreamWaitEvent: the
most recently captured state; later cudaEventRecord calls do not affect it).

Thread rule: every method may be called from any thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

__all__ = ["CudaEvent", "EventPool", "new_event"]


class CudaEvent:
    """A recorded CUDA event; goes back to its pool when the last reference is gone."""

    __slots__ = ("_free", "_passed", "raw")

    def __init__(self, raw: torch.cuda.Event, free: deque[torch.cuda.Event]) -> None:
        self.raw = raw
        self._free = free
        self._passed = False

    def wait(self) -> None:
        """Block until the work before it has ended; other threads run on."""
        if not self._passed:
            self.raw.synchronize()
            self._passed = True

    def done(self) -> bool:
        """Return whether the work before it has ended."""
        if not self._passed:
            query: Callable[[], bool] = self.raw.query
            self._passed = query()
        return self._passed

    def __del__(self) -> None:
        # deque.append is atomic, so this is safe in whatever thread the last reference went.
        self._free.append(self.raw)


class EventPool:
    """Records events, and keeps those that are free again."""

    def __init__(self) -> None:
        self._free: deque[torch.cuda.Event] = deque()

    @property
    def num_free(self) -> int:
        """How many events wait to be recorded again."""
        return len(self._free)

    def record(self, stream: torch.cuda.Stream) -> CudaEvent:
        """Return an event that passes when the work issued so far on `stream` has ended."""
        try:
            raw = self._free.pop()
        except IndexError:
            # blocking: a thread that waits sleeps instead of spinning; the cores have I/O and Adam to do.
            raw = new_event(blocking=True)
        raw.record(stream)
        return CudaEvent(raw, self._free)


def new_event(*, blocking: bool = False) -> torch.cuda.Event:
    """Return an event that was never recorded, and so counts as passed."""
    # torch leaves this constructor untyped.
    make: Callable[..., torch.cuda.Event] = torch.cuda.Event
    return make(blocking=blocking)
