"""`run_bench`: everything one `offload bench` measures, in order.

Thread rule: one thread calls it; it starts others and ends them before it returns or raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import psutil

from ..aio import native
from ..errors import CapacityError, ConfigError
from ..machine import DeviceSpeed, DriveSpeed, Machine, SharedSpeed, file_system_id
from ..sizes import MIB
from . import host
from .copies import device_speed
from .memory import checksum_bytes_per_s, copy_bytes_per_s
from .meter import Meter
from .notes import slow_notes
from .options import BenchOptions
from .results import BenchResult, Cell, Pattern
from .survey import Survey, survey_drives, survey_planned_s
from .sweep import GroupResult

__all__ = ["BenchOptions", "Progress", "run_bench"]

# Called with the fraction done, 0 to 1 and never less than before, and what is being done now.
Progress = Callable[[float, str], None]

# Expected, to tell how far it is.
_MEMORY_S = 2.0
_DEVICE_S = 3.0

# Of what is free now: a measurement must not push others out of memory.
_MEMORY_SHARE = 4


def run_bench(
    directories: Sequence[str], options: BenchOptions, progress: Progress | None = None
) -> BenchResult:
    """Measure the drives that hold `directories`, then host memory and the GPU's link.

    In each directory one file is made and unlinked at once, so nothing is left behind however the
    process ends. With several directories each drive is measured alone, then all at once.

    Args:
        directories: one a drive, at least one, none twice; they must exist.
        options: what to measure.
        progress: told before each part what it is; called from the calling thread.

    Returns:
        All samples, and in `machine` the short form to keep. A drive whose reads or writes were left out
        is not in it.

    Raises:
        StorageError: a directory is missing, is none, or cannot be written to; or a transfer failed.
        DiskFullError: the file would not leave enough free; the message names a size that fits.
        CorruptionError: bytes read are not the bytes written.
        ConfigError: no directory, or one twice.
        PlanError: the engine that was named cannot be had here, or nothing fits the size.
        KeyboardInterrupt: as it came; nothing is left behind.
    """
    paths = [os.path.abspath(directory) for directory in directories]
    if not paths:
        raise ConfigError("no directory to measure; name one on each drive")
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ConfigError(f"a directory is named twice: {', '.join(paths)}; name each drive once")
    total_s = survey_planned_s(len(paths), options)
    total_s += _MEMORY_S * options.memory + _DEVICE_S * options.device
    meter = Meter(progress, total_s)

    survey = survey_drives(paths, options, meter)
    notes = [*survey.notes, *_slow_notes(survey)]
    memory_bytes_per_s = checksum_rate = None
    device: DeviceSpeed | None = None
    if options.memory:
        meter.begin(_MEMORY_S, "host memory")
        memory_bytes_per_s = _memory(notes)
        # The plain one moves some MB/s, and nobody needs to know how many exactly.
        checksum_rate = checksum_bytes_per_s(MIB if native.missing_reason else 64 * MIB)
    if options.device:
        meter.begin(_DEVICE_S, "copies to and from the GPU")
        device = _device(notes)
    machine = Machine(
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=host.cpu_name(),
        num_cores=host.num_cores(),
        memory_nbytes=host.memory_nbytes(),
        drives=_drive_speeds(survey, notes),
        together=_together(survey),
        memory_bytes_per_s=memory_bytes_per_s,
        crc32c_bytes_per_s=checksum_rate,
        device=device,
    )
    meter.end()
    groups = [*survey.alone, *([survey.together] if survey.together else [])]
    return BenchResult(
        drives=survey.facts,
        cells=tuple(cell for group in groups for cell in group.cells),
        sustained=survey.sustained,
        machine=machine,
        notes=tuple(notes),
    )


def _cell(group: GroupResult, pattern: Pattern) -> Cell | None:
    """Return a pattern's cell at the best setting."""
    for cell in group.cells:
        work = cell.workload
        if work.mode == "bandwidth" and work.pattern == pattern and work.setting == group.best:
            return cell
    return None


def _drive_speeds(survey: Survey, notes: list[str]) -> tuple[DriveSpeed, ...]:
    speeds = []
    for facts, group in zip(survey.facts, survey.alone, strict=True):
        read, write, mixed = (_cell(group, pattern) for pattern in ("read", "write", "mixed"))
        if group.best is None or read is None or write is None:
            continue
        speeds.append(
            DriveSpeed(
                path=facts.path,
                device=file_system_id(facts.path),
                file_system=facts.file_system,
                engine=facts.engine,
                direct=facts.direct,
                setting=group.best,
                read_bytes_per_s=read.bytes_per_s,
                write_bytes_per_s=write.bytes_per_s,
                mixed_bytes_per_s=None if mixed is None else mixed.bytes_per_s,
                cpu_s_per_gb=read.cpu_s_per_gb,
            )
        )
    if len(speeds) < len(survey.facts):
        notes.append("no setting is kept of drives: that takes both reads and writes")
    return tuple(speeds)


def _together(survey: Survey) -> SharedSpeed | None:
    group = survey.together
    if group is None or group.best is None:
        return None
    read, write = _cell(group, "read"), _cell(group, "write")
    if read is None or write is None:
        return None
    return SharedSpeed(
        setting=group.best, read_bytes_per_s=read.bytes_per_s, write_bytes_per_s=write.bytes_per_s
    )


def _slow_notes(survey: Survey) -> list[str]:
    notes = []
    for pattern in ("read", "write"):
        cells = [_cell(group, pattern) for group in survey.alone]
        rates = [cell.bytes_per_s for cell in cells if cell is not None]
        if len(rates) == len(survey.facts):
            notes += slow_notes(survey.facts, rates, pattern)
    return notes


def _memory(notes: list[str]) -> float | None:
    """Measure host memory with as many threads as there is memory for."""
    room = min(psutil.virtual_memory().available, host.memory_nbytes()) // _MEMORY_SHARE
    threads = min(host.num_cores(), room // (2 * 64 * MIB))
    if threads < 1:
        notes.append("host memory was not measured: less than 512 MiB of it are free")
        return None
    try:
        return copy_bytes_per_s(threads)
    except CapacityError as error:
        notes.append(f"host memory was not measured: {error}")
        return None


def _device(notes: list[str]) -> DeviceSpeed | None:
    try:
        speed = device_speed()
    except CapacityError as error:
        notes.append(f"the GPU was not measured: {error}")
        return None
    if speed is None:
        notes.append("no CUDA device: copies to and from a GPU were not measured")
    return speed
