"""Which drive of a run held the others up, or gave less than was measured of it: in words, with the figures.

Chunks are dealt by speed, so all drives of a run are busy for equally long; one that is busy for longer is
slower than its part. Alone, or among others that are slow as well, a drive is compared with its measurement.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..machine import DriveSpeed
from ..sizes import format_time
from ..store import DriveLoad

__all__ = ["describe_slow_drives"]

# A run so short says nothing of a drive.
_LEAST_BUSY_S = 1.0

# Longer at work than the others by this much: more than chunks of a record make uneven.
_LAG = 1.25

# Of what was measured: single requests, which a run has where something else sets the pace, reach that.
_FRACTION = 0.5


def describe_slow_drives(loads: Sequence[DriveLoad], speeds: Mapping[str, DriveSpeed]) -> tuple[str, ...]:
    """Return a sentence for each drive that is slow; none for a run too short to tell.

    Args:
        loads: of the run's drives.
        speeds: what was measured, by directory.
    """
    if max((load.busy_s for load in loads), default=0.0) < _LEAST_BUSY_S:
        return ()
    said = []
    for load in loads:
        others = [other.busy_s for other in loads if other is not load]
        mean_s = sum(others) / len(others) if others else 0.0
        rate = f"{load.directory} is a slow drive: {load.bytes_per_s / 1e9:.2f} GB/s while at work"
        if others and load.busy_s > _LAG * mean_s:
            said.append(
                f"{rate}, {format_time(load.busy_s)} for its {load.share:.0%} of the bytes, where the others"
                f" were at work for {format_time(mean_s)}; measure the drives with 'offload bench', and a new"
                " run gives it less"
            )
        elif load.bytes_per_s < _FRACTION * (expected := _expected(load, speeds.get(load.directory))):
            said.append(
                f"{rate}, where 'offload bench' measured {expected / 1e9:.2f} GB/s for these reads and writes"
            )
    return tuple(said)


def _expected(load: DriveLoad, speed: DriveSpeed | None) -> float:
    """Return the bytes per second that a drive was measured to do of this mixture; 0 where it was not."""
    nbytes = load.read_nbytes + load.written_nbytes
    if speed is None or not nbytes:
        return 0.0
    return nbytes / (
        load.read_nbytes / speed.read_bytes_per_s + load.written_nbytes / speed.write_bytes_per_s
    )
