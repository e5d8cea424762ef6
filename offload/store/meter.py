"""What a drive of a run has moved, and for how long it was at work: what tells a slow drive from the others.

A drive is busy while a request of ours is in flight on it, so with chunks dealt in proportion to the drives'
speeds all are busy for equally long, and one that is slower than its part is busy for longer.

Bytes count when they are asked for, time when a request has ended. Thread rule: every method may be called
from any thread.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

from ..aio.engine import Op
from ..trace.intervals import Intervals

__all__ = ["DriveLoad", "DriveMeter"]


@dataclass(frozen=True, slots=True)
class DriveLoad:
    """What a drive has done since its meter was made or reset.

    Attributes:
        directory: the directory on the drive, as the run's opening was told it.
        share: the drive's part of the run's chunks, from 0 to 1.
        read_nbytes: asked from it.
        written_nbytes: given to it, manifests aside.
        busy_s: seconds in which a request was in flight.
    """

    directory: str
    share: float
    read_nbytes: int
    written_nbytes: int
    busy_s: float

    @property
    def bytes_per_s(self) -> float:
        """Bytes read and written for each second at work; 0 for a drive that was not asked."""
        return (self.read_nbytes + self.written_nbytes) / self.busy_s if self.busy_s else 0.0


class DriveMeter:
    """Counts one drive's transfers.

    Args:
        directory: the directory on the drive.
        share: the drive's part of the run's chunks.
    """

    def __init__(self, directory: str, share: float) -> None:
        self._directory = directory
        self._share = share
        self._lock = threading.Lock()
        self._nbytes: dict[Op, int] = {"read": 0, "write": 0}
        self._busy = Intervals(-math.inf)

    def count(self, op: Op, nbytes: int) -> None:
        """Note that a transfer was asked for."""
        with self._lock:
            self._nbytes[op] += nbytes

    def note_busy(self, begun_s: float, ended_s: float) -> None:
        """Note that a request was in flight, in `time.perf_counter()` seconds; twice is once."""
        with self._lock:
            self._busy.add(begun_s, ended_s)

    def load(self) -> DriveLoad:
        """Return the totals."""
        with self._lock:
            return DriveLoad(
                self._directory,
                self._share,
                self._nbytes["read"],
                self._nbytes["write"],
                self._busy.total_s(),
            )

    def reset(self) -> None:
        """Start over; of a request in flight, the time from now on counts."""
        with self._lock:
            self._nbytes = {"read": 0, "write": 0}
            self._busy = Intervals(time.perf_counter())
