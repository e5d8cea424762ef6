"""A long write to one drive, slice by slice: what is left when its write cache is full.

Consumer drives take the first tens or hundreds of gigabytes into a fast part of their flash, and fall
to a fraction of that speed after. Each slice is a run of about a second, its flush included, so the
curve holds what a program that writes and syncs gets. The file is overwritten over and over.

Thread rule: the caller's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..machine import IoSetting
from .choice import sustained_run
from .drives import DriveRunner
from .results import SustainedPoint, SustainedRun, Workload

__all__ = ["write_for_long"]


def write_for_long(
    runner: DriveRunner,
    drive: int,
    setting: IoSetting,
    *,
    min_s: float,
    max_nbytes: int | None = None,
    slice_s: float = 1.0,
    told: Callable[[float], None] | None = None,
) -> SustainedRun:
    """Write to a drive until a time has passed or so many bytes are written, whichever is first.

    Args:
        runner: has the files and the memory.
        drive: index of the drive.
        setting: block size and operations in flight.
        min_s: for so long.
        max_nbytes: and no more than this, rounded up to a slice; None for no bound.
        slice_s: length of a slice; one point of the curve each.
        told: called with the fraction done.

    Raises:
        PlanError: the setting needs more memory or a larger file.
        StorageError: a transfer failed.
    """
    workload = Workload(pattern="write", setting=setting, drives=(drive,))
    points: list[SustainedPoint] = []
    written_nbytes = 0
    start_s = time.perf_counter()
    while True:
        sample = runner.run(workload, min_s=slice_s)
        at_s = time.perf_counter() - start_s
        written_nbytes += sample.nbytes
        points.append(SustainedPoint(at_s=at_s, nbytes=sample.nbytes, bytes_per_s=sample.bytes_per_s))
        done = at_s / min_s
        if max_nbytes is not None:
            done = max(done, written_nbytes / max_nbytes)
        if told is not None:
            told(min(done, 1.0))
        if done >= 1:
            return sustained_run(drive, points)
