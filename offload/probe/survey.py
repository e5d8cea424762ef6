"""Everything that is measured of drives: files made, each drive alone, all together, files verified.

Owns the files and the memory for the transfers, and gives both back however it ends.

Thread rule: the caller's thread.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import get_args

from ..aio import Engine, EngineName, open_engine, probe_engines
from ..aio.select import ENGINE_VARIABLE
from ..errors import PlanError
from ..machine import IoSetting
from ..sizes import MIB, align_down, format_bytes
from . import host
from .choice import settings_of
from .content import PERIOD_NBYTES
from .drives import DriveRunner, transfer_memory
from .meter import Meter
from .notes import Traffic, busy_notes, drive_notes, shared_notes
from .options import MIN_FILE_NBYTES, BenchOptions
from .results import DriveFacts, Pattern, SustainedRun
from .scratch import ScratchFile, check_directories
from .shape import plan_requests
from .sustained import write_for_long
from .sweep import GroupResult, measure_group, planned_s

__all__ = ["Survey", "survey_drives", "survey_planned_s"]

# Expected of filling and verifying, to tell how far it is; a drive of ten years ago does as much.
_EXPECTED_BYTES_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found of the drives.

    Attributes:
        facts: of each drive.
        alone: of each drive.
        together: of all at once; None with a single drive.
        sustained: long writes.
        notes: what a reader must know.
    """

    facts: tuple[DriveFacts, ...]
    alone: tuple[GroupResult, ...]
    together: GroupResult | None
    sustained: tuple[SustainedRun, ...]
    notes: tuple[str, ...]


def survey_planned_s(num_drives: int, options: BenchOptions) -> float:
    """Return about how long `survey_drives` takes."""
    num_settings = len(settings_of(options))
    one_s = 2 * options.size_nbytes / _EXPECTED_BYTES_PER_S + planned_s(options, num_settings, 1)
    if options.sustained_s is not None:
        one_s += options.sustained_s
    together_s = planned_s(options, num_settings, num_drives) if num_drives > 1 else 0.0
    return num_drives * one_s + together_s


def survey_drives(directories: Sequence[str], options: BenchOptions, meter: Meter) -> Survey:
    """Measure the drives that hold `directories`; see `offload.probe.run.run_bench`.

    Args:
        directories: absolute.
        options: what to measure.
        meter: told what begins.
    """
    nbytes = align_down(options.size_nbytes, MIB)
    free_nbytes = check_directories(directories, nbytes)
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(options.engine, direct=options.direct))
        name = _name_of(engine)
        settings, notes = _settings(options, name)
        memory = transfer_memory(_memory_nbytes(options, settings, nbytes, len(directories)))
        before = [_drive_of(directory) for directory in directories]
        files = []
        for index, directory in enumerate(directories):
            files.append(stack.enter_context(ScratchFile(engine, directory, nbytes, seed=index + 1)))
        for file in files:
            meter.begin(nbytes / _EXPECTED_BYTES_PER_S, f"{file.directory}: writing the file")
            file.fill(memory, meter.within)

        runner = DriveRunner(files, memory, engine=name, direct=options.direct)
        alone = [
            _group(runner, (index,), options, settings, meter, notes, directory)
            for index, directory in enumerate(directories)
        ]
        together = None
        if len(files) > 1:
            everyone = tuple(range(len(files)))
            together = _group(runner, everyone, options, settings, meter, notes, "all together")
        sustained = _sustained(runner, alone, options, settings, meter)
        for file in files:
            meter.begin(nbytes / _EXPECTED_BYTES_PER_S, f"{file.directory}: reading back and comparing")
            file.verify(memory, meter.within)

        traffic = _traffic(files, before)
        reason = _reason(name, options)
        facts = [_facts(file, name, reason, free) for file, free in zip(files, free_nbytes, strict=True)]
    places = [one[0] if one else fact.device for one, fact in zip(before, facts, strict=True)]
    notes += shared_notes(directories, places)
    for fact, drive in zip(facts, before, strict=True):
        notes += drive_notes(fact, options, drive[0] if drive else None)
    notes += busy_notes(traffic)
    return Survey(tuple(facts), tuple(alone), together, tuple(sustained), tuple(notes))


def _settings(options: BenchOptions, name: EngineName) -> tuple[tuple[IoSetting, ...], list[str]]:
    """Return the settings to try, none deeper than the engine goes."""
    wanted = settings_of(options)
    deepest = max(setting.queue_depth for setting in wanted)
    with open_engine(name, queue_depth=deepest, direct=options.direct) as engine:
        depth = engine.queue_depth
    if depth >= deepest:
        return wanted, []
    return settings_of(options, depth), [
        f"the engine {name} has {depth} operations in flight at most: larger depths were left out"
    ]


def _memory_nbytes(
    options: BenchOptions, settings: Sequence[IoSetting], file_nbytes: int, num_drives: int
) -> int:
    """Return the memory that the most demanding of the settings needs, within the bound."""
    needed = [MIN_FILE_NBYTES]
    for setting in settings:
        if options.latency:
            needed.append(setting.queue_depth * max(setting.segment_nbytes, PERIOD_NBYTES))
        patterns: tuple[Pattern, ...] = (*options.patterns, "write")  # a long run writes
        for pattern in patterns:
            for num in {1, num_drives}:
                share = align_down(options.buffer_nbytes // num, PERIOD_NBYTES)
                requests = plan_requests(setting, pattern, file_nbytes=file_nbytes, buffer_nbytes=share)
                if requests is not None:
                    needed.append(num * requests.buffer_nbytes)
    return min(max(needed), align_down(options.buffer_nbytes, PERIOD_NBYTES))


def _group(
    runner: DriveRunner,
    drives: tuple[int, ...],
    options: BenchOptions,
    settings: Sequence[IoSetting],
    meter: Meter,
    notes: list[str],
    title: str,
) -> GroupResult:
    def told(seconds: float, text: str) -> None:
        meter.begin(seconds, f"{title}: {text}")

    result = measure_group(runner, drives, options, settings, told)
    if result.best is None and len(drives) == 1:
        raise PlanError(
            f"{title}: no setting can be measured with a file of {format_bytes(runner.files[0].nbytes)} and "
            f"{format_bytes(options.buffer_nbytes)} of buffers; use a larger --size, or smaller "
            "blocks and depths"
        )
    if result.left_out:
        left_out = ", ".join(
            f"{format_bytes(one.segment_nbytes)} x {one.queue_depth}" for one in result.left_out
        )
        notes.append(f"{title}: left out, too much in flight for the file or the buffers: {left_out}")
    return result


def _sustained(
    runner: DriveRunner,
    alone: Sequence[GroupResult],
    options: BenchOptions,
    settings: Sequence[IoSetting],
    meter: Meter,
) -> list[SustainedRun]:
    if options.sustained_s is None:
        return []
    runs = []
    for index, group in enumerate(alone):
        meter.begin(options.sustained_s, f"{runner.files[index].directory}: writing for long")
        setting = group.best or settings[0]
        runs.append(
            write_for_long(
                runner,
                index,
                setting,
                min_s=options.sustained_s,
                slice_s=min(1.0, options.sustained_s),
                told=meter.within,
            )
        )
    return runs


def _facts(file: ScratchFile, engine: EngineName, reason: str, free_nbytes: int) -> DriveFacts:
    mount = host.mount_of(file.directory)
    return DriveFacts(
        path=file.directory,
        device=file.device,
        source=mount.source,
        file_system=mount.file_system,
        engine=engine,
        engine_reason=reason,
        direct=file.file.direct,
        file_nbytes=file.nbytes,
        free_nbytes=free_nbytes,
        verified_nbytes=file.verified_nbytes,
    )


def _name_of(engine: Engine) -> EngineName:
    names: tuple[EngineName, ...] = get_args(EngineName)
    return next(name for name in names if name == engine.name)


def _reason(name: EngineName, options: BenchOptions) -> str:
    """Return why this engine; empty when it is the first choice."""
    if options.engine is not None:
        return "asked for"
    if os.environ.get(ENGINE_VARIABLE):
        return f"named by {ENGINE_VARIABLE}"
    refused = []
    for probe in probe_engines():
        if probe.name == name:
            break
        refused.append(f"{probe.name}: {probe.reason}")
    return "; ".join(refused)


def _drive_of(directory: str) -> tuple[str, int] | None:
    """Return the name of the whole drive and the bytes it has moved so far."""
    device_id = os.stat(directory).st_dev
    found = host.device_nbytes(f"{os.major(device_id)}:{os.minor(device_id)}")
    return None if found is None else (found[0], found[1] + found[2])


def _traffic(files: Sequence[ScratchFile], before: Sequence[tuple[str, int] | None]) -> list[Traffic]:
    """Return what each whole drive moved since, beside what we did. Cached transfers cannot be told apart."""
    own: dict[str, int] = defaultdict(int)
    drive: dict[str, int] = {}
    cached = set()
    for file, then in zip(files, before, strict=True):
        now = _drive_of(file.directory)
        if then is None or now is None or then[0] != now[0]:
            continue
        own[now[0]] += file.read_nbytes + file.written_nbytes
        drive[now[0]] = max(drive.get(now[0], 0), now[1] - then[1])
        if not file.file.direct:
            cached.add(now[0])
    return [
        Traffic(name=name, drive_nbytes=moved, own_nbytes=own[name])
        for name, moved in drive.items()
        if name not in cached
    ]
