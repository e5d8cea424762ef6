"""Which settings are tried, and which of them is kept. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ..machine import IoSetting
from ..sizes import KIB, MIB
from .options import BenchOptions
from .results import Cell, Pattern, SustainedPoint, SustainedRun

__all__ = ["best_setting", "in_flight_nbytes", "settings_of", "sustained_run"]

# What saturates most drives with the least in flight, and one on either side of it.
_QUICK = (
    (256 * KIB, 32),
    (MIB, 8),
    (MIB, 32),
    (4 * MIB, 8),
)
_FULL_BLOCKS = tuple(128 * KIB << step for step in range(7))
_FULL_DEPTHS = (1, 2, 4, 8, 16, 32)

# Samples of one cell differ by about as much; what is faster by less is not faster.
_TOLERANCE = 0.02

# Below this share of the first tenth of a long write, its bandwidth has dropped.
_DROPPED = 0.7


def settings_of(options: BenchOptions, max_depth: int | None = None) -> tuple[IoSetting, ...]:
    """Return the settings that the options ask for, none twice.

    Args:
        options: block sizes or depths given there replace the default ones; both lists are crossed.
        max_depth: as deep as the engine goes; deeper settings become this deep.
    """
    if options.full or options.block_nbytes or options.depths:
        quick_blocks, quick_depths = ((MIB,), (32,)) if not options.full else (_FULL_BLOCKS, _FULL_DEPTHS)
        pairs: Sequence[tuple[int, int]] = [
            (block, depth)
            for block in options.block_nbytes or quick_blocks
            for depth in options.depths or quick_depths
        ]
    else:
        pairs = _QUICK
    return tuple(
        dict.fromkeys(
            IoSetting(segment_nbytes=block, queue_depth=depth if max_depth is None else min(depth, max_depth))
            for block, depth in pairs
        )
    )


def in_flight_nbytes(setting: IoSetting) -> int:
    """Return the bytes in flight on each drive at a setting."""
    return setting.segment_nbytes * setting.queue_depth


def best_setting(cells: Sequence[Cell]) -> IoSetting | None:
    """Return the setting with the least in flight among those within 2 % of the best; None of no cell.

    A setting's worth is the geometric mean of its bandwidths, so that a drive's reads and writes count
    alike whichever is faster. Less in flight means less memory, and less to wait for when something
    urgent comes.

    Args:
        cells: bandwidths of one set of drives. `mixed` counts only where neither reads nor writes were
            measured; a setting that lacks a pattern that others have is left out.
    """
    speeds: dict[IoSetting, dict[Pattern, float]] = {}
    for cell in cells:
        speeds.setdefault(cell.workload.setting, {})[cell.workload.pattern] = cell.bytes_per_s
    patterns = {pattern for speed in speeds.values() for pattern in speed}
    wanted = patterns - {"mixed"} or patterns
    worth = {
        setting: _geometric_mean(speed, wanted) for setting, speed in speeds.items() if wanted <= speed.keys()
    }
    if not worth:
        return None
    enough = max(worth.values()) * (1 - _TOLERANCE)
    return min(
        (setting for setting, speed in worth.items() if speed >= enough),
        # Of equal bytes in flight the one with fewer operations: each costs the processor something.
        key=lambda setting: (in_flight_nbytes(setting), setting.queue_depth),
    )


def sustained_run(drive: int, points: Sequence[SustainedPoint]) -> SustainedRun:
    """Judge the curve of a long write.

    Args:
        drive: index of the drive.
        points: at least one, in order.
    """
    tenth = max(1, len(points) // 10)
    first = statistics.median([point.bytes_per_s for point in points[:tenth]])
    last = statistics.median([point.bytes_per_s for point in points[-tenth:]])
    # From the end: the points after which it never came back. A dip in between is no drop.
    stays_from = len(points)
    while stays_from > 0 and points[stays_from - 1].bytes_per_s < _DROPPED * first:
        stays_from -= 1
    # A single slow slice at the very end has not shown that it stays.
    dropped = len(points) - stays_from >= max(2, tenth)
    return SustainedRun(
        drive=drive,
        points=tuple(points),
        first_bytes_per_s=first,
        last_bytes_per_s=last,
        drop_at_nbytes=sum(point.nbytes for point in points[:stays_from]) if dropped else None,
    )


def _geometric_mean(speed: Mapping[Pattern, float], patterns: set[Pattern]) -> float:
    return math.prod(speed[pattern] for pattern in patterns) ** (1 / len(patterns))
