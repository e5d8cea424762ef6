"""What is said of a bench, in words and figures, before it takes a form: terminal, Markdown or page.

Every form shows the same sections in the same order: each drive with its facts and its sweep, all drives
together, long runs, the host and its device, notes, and what to paste. So none of them can leave out a
warning that another one has.

Pure; nothing here prints. Bandwidths are medians in GB/s with the range of the samples, memory is in GiB.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..machine import DriveSpeed, IoSetting, Machine, SharedSpeed
from ..probe.results import BenchResult, Cell, DriveFacts, SustainedRun
from ..sizes import GIB, KIB, MIB, format_bytes, format_rate, format_time

__all__ = [
    "Section",
    "Table",
    "bandwidth_cells",
    "best_setting",
    "cells_of",
    "drive_groups",
    "format_block",
    "format_latency",
    "format_range",
    "format_setting",
    "group_title",
    "latency_cells",
    "sections_of",
    "speed_of",
]


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in rows.

    Attributes:
        columns: headings, with their units. The first column holds words, the others figures.
        rows: cells, as many as there are columns.
        marked: indices of the rows that stand out: those with the best setting.
        mark: the word beside them.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    mark: str = "best"


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the report.

    Attributes:
        title: its heading.
        facts: (label, value) pairs.
        tables: figures.
        lines: sentences.
        code: text to copy as it stands; empty when there is none.
        language: of `code`.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    lines: tuple[str, ...] = ()
    code: str = ""
    language: str = ""


def sections_of(result: BenchResult) -> tuple[Section, ...]:
    """Return all that is to be said of `result`, in reading order."""
    sections = [_group_section(result, group) for group in drive_groups(result)]
    sections += [_sustained_section(result, run) for run in result.sustained]
    sections.append(_machine_section(result.machine))
    if result.notes:
        sections.append(Section("Notes", lines=result.notes))
    sections.append(_hint_section(result))
    return tuple(sections)


def drive_groups(result: BenchResult) -> tuple[tuple[int, ...], ...]:
    """Return which drives were measured together: each alone in the order given, then more at once."""
    alone = [(index,) for index in range(len(result.drives))]
    more = {cell.workload.drives for cell in result.cells if len(cell.workload.drives) > 1}
    return (*alone, *sorted(more))


def cells_of(result: BenchResult, group: tuple[int, ...]) -> tuple[Cell, ...]:
    """Return the cells of one group by pattern, block size and depth."""
    order = ("read", "write", "mixed")
    cells = [cell for cell in result.cells if cell.workload.drives == group]
    return tuple(
        sorted(
            cells,
            key=lambda cell: (
                order.index(cell.workload.pattern),
                cell.workload.setting.segment_nbytes,
                cell.workload.setting.queue_depth,
            ),
        )
    )


def best_setting(result: BenchResult, group: tuple[int, ...]) -> IoSetting | None:
    """Return the setting that was chosen for a group; None when none was."""
    speed = speed_of(result, group)
    return None if speed is None else speed.setting


def speed_of(result: BenchResult, group: tuple[int, ...]) -> DriveSpeed | SharedSpeed | None:
    """Return what is kept of a group; None when nothing is."""
    if len(group) > 1:
        return result.machine.together
    path = result.drives[group[0]].path
    return next((drive for drive in result.machine.drives if drive.path == path), None)


def bandwidth_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells that say how many bytes a second; latencies are timed one block at a time."""
    return [cell for cell in cells if cell.workload.mode == "bandwidth" and cell.samples]


def latency_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Return one cell with latencies for each pattern and setting, the smallest blocks first."""
    found: dict[tuple[str, IoSetting], Cell] = {}
    for cell in cells:
        if cell.latency is not None:
            found.setdefault((cell.workload.pattern, cell.workload.setting), cell)
    return list(found.values())


def group_title(result: BenchResult, group: tuple[int, ...]) -> str:
    """Return what a group is called: the path of a drive, or how many there are."""
    if len(group) == 1:
        return result.drives[group[0]].path
    return f"{len(group)} drives at once"


def format_block(nbytes: int) -> str:
    """Return a block size exactly, so that it can be given to an option again.

    >>> format_block(1 << 20), format_block(3 << 19), format_block(4097)
    ('1 MiB', '1536 KiB', '4097 B')
    """
    for unit_nbytes, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes and nbytes % unit_nbytes == 0:
            return f"{nbytes // unit_nbytes} {unit}"
    return f"{nbytes} B"


def format_setting(setting: IoSetting) -> str:
    """Return a setting in words."""
    return f"blocks of {format_block(setting.segment_nbytes)}, {setting.queue_depth} in flight"


def format_latency(seconds: float) -> str:
    """Return a latency with three digits.

    >>> format_latency(0.0000853), format_latency(0.00213), format_latency(1.5)
    ('85.3 us', '2.13 ms', '1.5 s')
    """
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"


def format_range(cell: Cell) -> str:
    """Return the slowest and the fastest sample of a cell in GB/s."""
    rates = [sample.bytes_per_s / 1e9 for sample in cell.samples]
    return f"[{min(rates):.2f}..{max(rates):.2f}]"


def _group_section(result: BenchResult, group: tuple[int, ...]) -> Section:
    speed = speed_of(result, group)
    best = best_setting(result, group)
    cells = cells_of(result, group)
    tables = [_bandwidth_table(cells, best), _latency_table(cells, best)]
    facts = _drive_facts(result.drives[group[0]]) if len(group) == 1 else ()
    if speed is not None:
        facts = (*facts, ("best setting", _best_text(speed)))
    return Section(group_title(result, group), facts, tuple(table for table in tables if table.rows))


def _drive_facts(drive: DriveFacts) -> tuple[tuple[str, str], ...]:
    reason = f" ({drive.engine_reason})" if drive.engine_reason else ""
    cold, dropped = "cold: O_DIRECT bypasses the page cache", "page cache dropped before each read"
    cache = "never cold: the file system is memory" if drive.in_memory else cold if drive.direct else dropped
    return (
        ("drive", f"{drive.source}, {drive.file_system}, device {drive.device}"),
        ("engine", f"{drive.engine}{reason}"),
        ("O_DIRECT", "yes" if drive.direct else "no"),
        ("cache", cache),
        ("writes", "synced: the flush (fdatasync) counts in GB/s, not in latencies"),
        ("test file", f"{format_bytes(drive.file_nbytes)}, removed; {format_bytes(drive.free_nbytes)} free"),
        ("verified", f"{format_bytes(drive.verified_nbytes)} read back and compared"),
    )


def _best_text(speed: DriveSpeed | SharedSpeed) -> str:
    read, write = format_rate(speed.read_bytes_per_s), format_rate(speed.write_bytes_per_s)
    return f"{format_setting(speed.setting)}: read {read}, write {write}"


def _bandwidth_table(cells: Iterable[Cell], best: IoSetting | None) -> Table:
    timed = bandwidth_cells(cells)
    return Table(
        ("pattern", "block", "depth", "GB/s", "min..max", "CPU s/GB", "samples"),
        tuple(
            (
                *_workload_text(cell),
                f"{cell.bytes_per_s / 1e9:.2f}",
                format_range(cell),
                f"{cell.cpu_s_per_gb:.3f}",
                str(len(cell.samples)),
            )
            for cell in timed
        ),
        _marked(timed, best),
    )


def _latency_table(cells: Iterable[Cell], best: IoSetting | None) -> Table:
    rows = []
    timed = latency_cells(cells)
    for cell in timed:
        assert cell.latency is not None
        latency = cell.latency
        figures = (latency.p50_s, latency.p99_s, latency.p999_s, latency.max_s)
        rows.append((*_workload_text(cell), *map(format_latency, figures), f"{latency.num_operations:,}"))
    columns = ("pattern", "block", "depth", "p50", "p99", "p99.9", "max", "operations")
    return Table(columns, tuple(rows), _marked(timed, best))


def _workload_text(cell: Cell) -> tuple[str, str, str]:
    setting = cell.workload.setting
    return (cell.workload.pattern, format_block(setting.segment_nbytes), str(setting.queue_depth))


def _marked(cells: Sequence[Cell], best: IoSetting | None) -> frozenset[int]:
    return frozenset(index for index, cell in enumerate(cells) if cell.workload.setting == best)


def _sustained_section(result: BenchResult, run: SustainedRun) -> Section:
    path = result.drives[run.drive].path
    written = sum(point.nbytes for point in run.points)
    seconds = run.points[-1].at_s if run.points else 0.0
    if run.drop_at_nbytes is None:
        drop = "none: it stayed above 0.7 of the first tenth"
    else:
        drop = (
            f"after {run.drop_at_nbytes / 1e9:.1f} GB it fell below 0.7 of the first tenth, and stayed there"
        )
    return Section(
        f"Sustained writing to {path}",
        (
            ("written", f"{written / 1e9:.1f} GB in {format_time(seconds)}"),
            ("first tenth", format_rate(run.first_bytes_per_s)),
            ("last tenth", format_rate(run.last_bytes_per_s)),
            ("drop", drop),
        ),
    )


def _machine_section(machine: Machine) -> Section:
    facts = [
        ("CPU", f"{machine.cpu}, {machine.num_cores} usable"),
        ("memory", format_bytes(machine.memory_nbytes)),
    ]
    if machine.memory_bytes_per_s is not None:
        facts.append(("memory copy", f"{format_rate(machine.memory_bytes_per_s)}, all cores"))
    if machine.crc32c_bytes_per_s is not None:
        facts.append(("crc32c", f"{format_rate(machine.crc32c_bytes_per_s)}, one core"))
    if (device := machine.device) is not None:
        facts += [
            ("device", f"{device.name}, {format_bytes(device.memory_nbytes)}"),
            ("pinned to device", format_rate(device.pinned_to_device_bytes_per_s)),
            ("device to pinned", format_rate(device.device_to_pinned_bytes_per_s)),
            ("both ways at once", f"{format_rate(device.both_ways_bytes_per_s)} in sum"),
            ("pageable to device", format_rate(device.pageable_to_device_bytes_per_s)),
            ("device to pageable", format_rate(device.device_to_pageable_bytes_per_s)),
        ]
    return Section("Host", (*facts, ("measured", machine.measured_at)))


def _hint_section(result: BenchResult) -> Section:
    paths = [drive.path for drive in result.drives]
    group = drive_groups(result)[-1]
    best = best_setting(result, group)
    code = f"# config.yaml of offload finetune\ndisk: {json.dumps(paths, ensure_ascii=False)}\n"
    if best is not None:
        block = format_block(best.segment_nbytes).replace(" ", "")
        again = ["offload", "bench", *paths, "--block", block, "--depth", str(best.queue_depth)]
        code += (
            "# Python: the setting by hand; without it, the measured one is used\n"
            f"# offload.attach(model, disk={paths!r},"
            f' queue_depth={best.queue_depth}, segment_nbytes="{block}")\n'
            "# Shell: this setting again\n"
            f"# {shlex.join(again)}\n"
        )
    return Section("To paste", code=code, language="yaml")
