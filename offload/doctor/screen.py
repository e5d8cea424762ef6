"""Facts and findings on one screen: what the machine is, then what is wrong, the worst first.

The facts become sections as those of a bench do, so a pipe gets plain text that can be pasted into a bug
report. Nothing is looked up here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..report.sections import Section
from ..report.terminal import print_sections, printable
from ..sizes import format_bytes
from .check_gpu import describe_link
from .facts import BlockDevice, DirectoryFacts, EngineFacts, Facts, Gpu, GpuFacts, HostFacts, SoftwareFacts
from .finding import Finding, Severity

__all__ = ["print_screen", "screen_sections", "summary"]

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}
_LABEL_WIDTH = max(len(severity.value) for severity in Severity)

# The rest of what is mounted how matters to nobody.
_SHOWN_OPTIONS = {
    "ro", "noatime", "relatime", "discard", "nobarrier", "barrier=0", "data=writeback", "data=journal",
    "sync", "dirsync", "volatile",
}  # fmt: skip


def print_screen(facts: Facts, findings: Sequence[Finding], stream: TextIO | None = None) -> None:
    """Print both to `stream`, standard output when None; in colour and wrapped on a terminal."""
    stream = sys.stdout if stream is None else stream
    print_sections(screen_sections(facts), stream)
    if not stream.isatty():
        stream.write("\n" + "".join(f"{line}\n" for line in _finding_lines(findings)))
        stream.write(f"{summary(findings)}\n")
        return
    console = Console(file=stream, highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in findings:
        style = _STYLES[finding.severity]
        grid.add_row(
            f"[{style}]{finding.severity.value}[/]", escape(printable(f"{finding.about}: {finding.problem}"))
        )
        grid.add_row("", f"[cyan]{escape(printable(finding.fix))}[/cyan]")
    console.print(grid)
    console.print(f"\n[bold]{escape(summary(findings))}[/bold]")


def summary(findings: Sequence[Finding]) -> str:
    """Return one line: how many there are of each.

    >>> summary([])
    'nothing is wrong'
    """
    counts = {severity: sum(one.severity is severity for one in findings) for severity in Severity}
    words = [
        f"{count} {severity.value}{'s' if count > 1 else ''}" for severity, count in counts.items() if count
    ]
    if not words:
        return "nothing is wrong"
    if counts[Severity.ERROR]:
        return f"{', '.join(words)}: what is an error will not work"
    return f"{', '.join(words)}: it will work" + (", but not at its best" if counts[Severity.WARNING] else "")


def screen_sections(facts: Facts) -> tuple[Section, ...]:
    """Return the facts, in reading order."""
    host, software = facts.host, facts.software
    places = [text for text in (host.container, "virtual machine" if host.virtual else "") if text]
    title = f"offload {software.offload or '(not installed)'}, {facts.taken_at}"
    system = ", ".join([host.distribution or host.system, f"{host.system} {host.kernel}", host.architecture])
    lines = [
        ("system", ", ".join([system, *places])),
        ("python", software.python),
        ("packages", _packages(software)),
        ("torch", _torch(software)),
        ("extensions", _extensions(software)),
        ("processor", _processor(host)),
        ("memory", _memory(host)),
        ("limits", _limits(host)),
        *(("gpu", line) for line in _gpu_lines(facts.gpu)),
        ("engine", _engine(facts.engine)),
        ("measured", facts.measured.measured_at or "nothing yet, by offload bench"),
    ]
    return (Section(title, facts=tuple(lines)), *(_directory(one) for one in facts.directories))


def _finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield printable(
            f"{finding.severity.value + ':':<{_LABEL_WIDTH + 1}} {finding.about}: {finding.problem}"
        )
        yield printable(f"{'':<{_LABEL_WIDTH + 1}} fix: {finding.fix}")
    if findings:
        yield ""


def _packages(software: SoftwareFacts) -> str:
    return ", ".join(f"{one.name} {one.version or '-'}" for one in software.packages if one.name != "torch")


def _torch(software: SoftwareFacts) -> str:
    torch = software.torch
    version = torch.version or next(
        (one.version for one in software.packages if one.name == "torch" and one.version), "-"
    )
    if torch.problem:
        return f"{version} ({torch.problem})"
    built = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "no CUDA"
    return f"{version}, {built}, {torch.num_gpus} GPUs usable"


def _extensions(software: SoftwareFacts) -> str:
    return ", ".join(
        f"{one.name} unusable" if one.problem else f"{one.name} ({one.isas[0]})"
        for one in software.extensions
    )


def _processor(host: HostFacts) -> str:
    cores = f"{host.num_cores} cores"
    if host.num_cores != host.num_cpus:
        cores = f"{host.num_cores} of {host.num_cpus} cores"
    governor = f", governor {host.governor} ({host.governor_driver})" if host.governor else ""
    return f"{host.cpu}, {cores}{governor}"


def _memory(host: HostFacts) -> str:
    parts = [format_bytes(host.limit_nbytes)]
    if host.limit_nbytes != host.memory_nbytes:
        parts[0] += f" of {format_bytes(host.memory_nbytes)} (control group)"
    parts.append(f"{format_bytes(host.available_nbytes)} available")
    if host.swap_nbytes:
        parts.append(f"swap {format_bytes(host.swap_used_nbytes)} of {format_bytes(host.swap_nbytes)}")
    else:
        parts.append("no swap")
    parts.append(f"huge pages: {host.huge_pages or 'none'}")
    return ", ".join(parts)


def _limits(host: HostFacts) -> str:
    limits = host.limits
    sizes = {
        "locked memory": limits.memlock_nbytes,
        "virtual memory": limits.address_space_nbytes,
        "file size": limits.file_nbytes,
    }
    words = [f"{name} {'unlimited' if size is None else format_bytes(size)}" for name, size in sizes.items()]
    return ", ".join([*words, f"open files {limits.open_files if limits.open_files else 'unlimited'}"])


def _gpu_lines(gpu: GpuFacts) -> Iterator[str]:
    driver = f"driver {gpu.driver}" if gpu.driver else "no NVIDIA driver"
    if not gpu.gpus:
        yield f"none found, {driver}"
    for one in gpu.gpus:
        yield f"{_gpu(one)}, {driver}"


def _gpu(gpu: Gpu) -> str:
    parts = [gpu.name]
    if gpu.memory_nbytes is not None:
        used = f", {format_bytes(gpu.used_nbytes)} in use" if gpu.used_nbytes is not None else ""
        parts.append(f"{format_bytes(gpu.memory_nbytes)}{used}")
    if gpu.link is not None:
        parts.append(describe_link(gpu.link))
    if gpu.performance_state is not None:
        parts.append(f"P{gpu.performance_state}")
    return ", ".join(parts)


def _engine(engine: EngineFacts) -> str:
    asked = " (OFFLOAD_IO_ENGINE)" if engine.asked else ""
    reasons = "".join(f"; not {name}: {why}" for name, why in engine.refused)
    return f"{engine.chosen or 'none'}{asked}{reasons}"


def _directory(directory: DirectoryFacts) -> Section:
    title = f"{directory.path} ({directory.origin})"
    if directory.problem:
        return Section(title, facts=(("problem", directory.problem),))
    mount = directory.mount
    options = [option for option in mount.options if option in _SHOWN_OPTIONS]
    direct = {True: "O_DIRECT works", False: "no O_DIRECT", None: "O_DIRECT not tried"}[directory.direct]
    if directory.write_problem:
        direct = f"cannot be written to: {directory.write_problem}"
    room = f"{format_bytes(directory.free_nbytes)} of {format_bytes(directory.total_nbytes)} free"
    lines = [
        ("file system", ", ".join([f"{mount.file_system} on {mount.source}", *options])),
        ("room", f"{room}, {direct}"),
    ]
    if directory.device is not None:
        lines.append(("drive", _device(directory.device)))
    return Section(title, facts=tuple(lines))


def _device(device: BlockDevice) -> str:
    parts = [device.name + (f" on {' + '.join(device.parts)}" if device.parts else "")]
    parts += [text for text in (device.model, device.bus) if text]
    if device.encrypted:
        parts.append("encrypted")
    if device.rotational:
        parts.append("rotational")
    if device.write_cache:
        parts.append({"write back": "volatile write cache"}.get(device.write_cache, device.write_cache))
    if device.scheduler:
        parts.append(f"scheduler {device.scheduler}")
    if device.link is not None:
        parts.append(describe_link(device.link))
    return ", ".join(parts)
