"""Measures all settings of one set of drives, and finds the best.

All cells take one sample each, then all take another, so that what disturbs a drive for a while (another
program, its own housekeeping, heat) disturbs all alike. What is only worth measuring at the best setting
comes after: reads and writes at once (unless every setting was to be measured so), and latencies.

Thread rule: the caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..machine import IoSetting
from ..sizes import format_bytes
from .choice import best_setting
from .content import BLOCK_NBYTES
from .drives import DriveRunner
from .latency import can_time_operations, time_operations
from .options import BenchOptions
from .results import Cell, LatencySummary, Pattern, Sample, Workload

__all__ = ["GroupResult", "measure_group", "planned_s"]

# The page, alone: what a drive takes for the least it can do.
_SINGLE = IoSetting(segment_nbytes=BLOCK_NBYTES, queue_depth=1)

# Of each sample: opening the engine, filling buffers, comparing.
_AROUND_S = 0.06


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What was measured of one set of drives.

    Attributes:
        cells: one for each workload.
        best: the setting to keep; None when no setting could be measured.
        left_out: settings that need more memory or larger files.
    """

    cells: tuple[Cell, ...]
    best: IoSetting | None
    left_out: tuple[IoSetting, ...]


def planned_s(options: BenchOptions, num_settings: int, num_drives: int) -> float:
    """Return about how long a group takes."""
    num_cells = num_settings * len(_first_patterns(options)) + len(_later_patterns(options))
    if options.latency and num_drives == 1:
        num_cells += 2 * len(_latency_patterns(options))
    warm_up = len(_first_patterns(options))
    return (num_cells * options.rounds + warm_up) * (options.sample_s + _AROUND_S)


def measure_group(
    runner: DriveRunner,
    drives: tuple[int, ...],
    options: BenchOptions,
    settings: Sequence[IoSetting],
    told: Callable[[float, str], None],
) -> GroupResult:
    """Measure one drive, or several at the same time.

    Args:
        runner: has the files.
        drives: indices of the drives.
        options: what to measure.
        settings: to try.
        told: called before each sample with the seconds it will take and what it is.
    """

    def say(workload: Workload, what: str = "") -> None:
        setting = workload.setting
        block = format_bytes(setting.segment_nbytes)
        told(options.sample_s + _AROUND_S, f"{what or workload.pattern} {block} x {setting.queue_depth}")

    workloads = [
        Workload(pattern=pattern, setting=setting, drives=drives)
        for pattern in _first_patterns(options)
        for setting in settings
    ]
    possible = [workload for workload in workloads if runner.plan(workload) is not None]
    left_out = dict.fromkeys(one.setting for one in workloads if one not in possible)
    samples: dict[Workload, list[Sample]] = {workload: [] for workload in possible}
    for pattern in _first_patterns(options):
        # What sleeps wakes up, and what is allocated late is there.
        for workload in [one for one in possible if one.pattern == pattern][:1]:
            say(workload, "warm-up")
            runner.run(workload, min_s=options.sample_s)
    _take_turns(runner, samples, options, say)
    best = best_setting([Cell(workload=one, samples=tuple(taken)) for one, taken in samples.items()])
    if best is None:
        return GroupResult((), None, tuple(left_out))

    later = [Workload(pattern=pattern, setting=best, drives=drives) for pattern in _later_patterns(options)]
    at_best: dict[Workload, list[Sample]] = {one: [] for one in later if runner.plan(one) is not None}
    _take_turns(runner, at_best, options, say)
    samples |= at_best

    latencies: dict[Workload, list[float]] = {}
    if options.latency and len(drives) == 1:
        timed = [
            Workload(pattern=pattern, setting=setting, drives=drives, mode="latency")
            for setting in dict.fromkeys((_SINGLE, best))
            for pattern in _latency_patterns(options)
        ]
        latencies = {one: [] for one in timed if can_time_operations(runner, one)}
        for turn in range(options.rounds):
            for workload, seconds in latencies.items():
                say(workload, f"latency {workload.pattern}")
                sample, more = time_operations(runner, workload, min_s=options.sample_s, seed=turn)
                seconds.extend(more)
                if workload.setting == _SINGLE:
                    samples.setdefault(workload, []).append(sample)
    return GroupResult(_cells(samples, latencies), best, tuple(left_out))


def _take_turns(
    runner: DriveRunner,
    samples: dict[Workload, list[Sample]],
    options: BenchOptions,
    say: Callable[[Workload], None],
) -> None:
    for _ in range(options.rounds):
        for workload, taken in samples.items():
            say(workload)
            taken.append(runner.run(workload, min_s=options.sample_s))


def _cells(samples: dict[Workload, list[Sample]], latencies: dict[Workload, list[float]]) -> tuple[Cell, ...]:
    """Put the latencies of a setting beside its bandwidths."""
    by_setting = {(one.pattern, one.setting): seconds for one, seconds in latencies.items()}
    cells = []
    for workload, taken in samples.items():
        seconds = by_setting.get((workload.pattern, workload.setting))
        latency = LatencySummary.of(seconds) if seconds else None
        cells.append(Cell(workload=workload, samples=tuple(taken), latency=latency))
    return tuple(cells)


def _first_patterns(options: BenchOptions) -> tuple[Pattern, ...]:
    """Return what is measured at every setting."""
    every = options.full or options.block_nbytes is not None or options.depths is not None
    patterns = tuple(pattern for pattern in ("read", "write", "mixed") if pattern in options.patterns)
    return patterns if every or patterns == ("mixed",) else tuple(p for p in patterns if p != "mixed")


def _later_patterns(options: BenchOptions) -> tuple[Pattern, ...]:
    """Return what is measured at the best setting only."""
    first = _first_patterns(options)
    return tuple(dict.fromkeys(pattern for pattern in options.patterns if pattern not in first))


def _latency_patterns(options: BenchOptions) -> tuple[Pattern, ...]:
    """Return what single operations do; half and half says little about either."""
    return tuple(pattern for pattern in _first_patterns(options) if pattern != "mixed") or ("mixed",)
