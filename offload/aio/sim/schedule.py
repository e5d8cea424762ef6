"""Simulated time: the segments that a simulated disk works on, and when each completes.

Invariants: time goes forward only when somebody lets it; a segment completes at its due time, in the
order of due times; one that is stuck has none until it is released, or is due after `stuck_s`.

Thread rule: none of its own; the disk's lock covers it. Nothing here sleeps or reads a clock.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from offload.aio.engine import Op
from offload.aio.sim.content import SimContent
from offload.aio.sim.faults import Fault

__all__ = ["Flight", "Schedule"]

# A fast NVMe drive's 20 to 200 us; one operation in 16 takes a hundred times as long, as one that waits
# for the drive's housekeeping does, so that others overtake it by far.
_DELAY_S = (20e-6, 200e-6)
_SLOW_EVERY = 16
_SLOW_FACTOR = 100


@dataclass(eq=False, slots=True)
class Flight:
    """A segment that the disk works on.

    Attributes:
        op: what it does.
        content: the file's.
        path: the file, for messages.
        offset: where in the file.
        memory: the bytes, the request's own.
        fault: what is going to happen to it.
        on_end: called with the bytes moved or the negative errno.
    """

    op: Op
    content: SimContent
    path: str
    offset: int
    memory: memoryview
    fault: Fault | None
    on_end: Callable[[int], None]


class Schedule:
    """What is in flight, ordered by when it completes."""

    def __init__(self, rng: random.Random, stuck_s: float = math.inf) -> None:
        self._rng = rng
        self._stuck_s = stuck_s
        self._due: list[tuple[float, int, Flight]] = []
        self._stuck: list[Flight] = []
        self._num_started = 0
        self.now_s = 0.0

    @property
    def flights(self) -> list[Flight]:
        """Everything in flight, the stuck ones last."""
        return [flight for _, _, flight in sorted(self._due, key=lambda one: one[:2])] + self._stuck

    def start(self, flight: Flight) -> None:
        """Let a segment complete after a delay of its own, or never when it is stuck."""
        delay_s = self.delay_s()
        if flight.fault is not None and flight.fault.kind == "stuck":
            if math.isinf(self._stuck_s):
                self._stuck.append(flight)
                return
            delay_s = self._stuck_s
        self._num_started += 1
        heapq.heappush(self._due, (self.now_s + delay_s, self._num_started, flight))

    def delay_s(self) -> float:
        """Draw how long an operation takes."""
        slow = _SLOW_FACTOR if self._rng.randrange(_SLOW_EVERY) == 0 else 1
        return self._rng.uniform(*_DELAY_S) * slow

    def next(self, until_s: float = math.inf) -> Flight | None:
        """Go forward to the next completion and return what completes; None if there is none in time."""
        if self._due and self._due[0][0] <= until_s:
            due_s, _, flight = heapq.heappop(self._due)
            self.now_s = max(self.now_s, due_s)
            return flight
        if until_s < math.inf:
            self.now_s = max(self.now_s, until_s)
        return None

    def release(self) -> None:
        """Let what is stuck complete after all."""
        stuck, self._stuck = self._stuck, []
        for flight in stuck:
            flight.fault = None
            self.start(flight)

    def abandon(self) -> list[Flight]:
        """Return everything in flight, which completes by itself from now on."""
        flights = self.flights
        self._due, self._stuck = [], []
        return flights
