"""What this host is: processor, cores and memory this process may use, and what is mounted where.

Read from /proc and the control group's files; measures nothing. Where a file is missing or holds
something else, the answer is the next best one: these are facts to print, and nothing fails for them.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Mount", "cpu_name", "device_nbytes", "memory_nbytes", "mount_of", "num_cores"]

_SECTOR_NBYTES = 512  # the unit of /sys/dev/block/*/stat, whatever the drive's own sectors are
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """Where a directory is mounted from.

    Attributes:
        source: `/dev/nvme0n1p2`, `tmpfs`, `server:/export`.
        file_system: its type; `unknown` when that cannot be found.
        options: of the mount and of the file system, as the kernel lists them.
    """

    source: str
    file_system: str
    options: tuple[str, ...] = ()


def cpu_name(cpuinfo: str | None = None) -> str:
    """Return the processor's name.

    Args:
        cpuinfo: contents of /proc/cpuinfo; None reads it.
    """
    text = _read(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo
    # x86 says `model name`; arm64 has no such line, some boards have `Hardware` or `Model`.
    for key in ("model name", "Hardware", "Model"):
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def num_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may keep busy: its affinity, and its control group's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = affinity
    for folder in _groups(root, "cpu"):
        quota, period = _quota(folder)
        if quota > 0 and period > 0:
            cores = min(cores, max(1, -(-quota // period)))
    return cores


def memory_nbytes(root: Path = Path("/")) -> int:
    """Return the host's memory, or the limit of the control group when that is less."""
    limits = [psutil.virtual_memory().total]
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and int(text) > 0:
                limits.append(int(text))
    return min(limits)


def mount_of(path: str, mountinfo: str | None = None) -> Mount:
    """Return what is mounted where `path` lies.

    Args:
        path: an existing directory.
        mountinfo: contents of /proc/self/mountinfo; None reads it.

    Source: proc_pid_mountinfo(5).
    """
    text = _read(Path("/proc/self/mountinfo")) if mountinfo is None else mountinfo
    real = os.path.realpath(path)
    device_id = os.stat(real).st_dev
    device = f"{os.major(device_id)}:{os.minor(device_id)}"
    found: tuple[tuple[bool, int], Mount] | None = None
    for line in text.splitlines():
        fields, separator, tail = line.partition(" - ")
        left, right = fields.split(" "), tail.split(" ")
        if not separator or len(left) < 6 or len(right) < 3:
            continue
        point = _plain(left[4])
        if not (real == point or real.startswith(point.rstrip("/") + "/")):
            continue
        # The device decides; a btrfs subvolume has one of its own that is not listed here, and then
        # the longest mount point does. Of equals the last: it hides those before it.
        rank = (left[2] == device, len(point))
        if found is None or rank >= found[0]:
            options = tuple(dict.fromkeys([*left[5].split(","), *right[2].split(",")]))
            found = rank, Mount(source=_plain(right[1]), file_system=right[0], options=options)
    return found[1] if found else Mount(source="unknown", file_system="unknown")


def device_nbytes(device: str, root: Path = Path("/")) -> tuple[str, int, int] | None:
    """Return a whole drive's name and the bytes it has read and written since it was found.

    Args:
        device: `major:minor` of the drive, or of one of its partitions.
        root: where /sys lies.

    Returns:
        None where the kernel keeps no such count: tmpfs, network and some other file systems.

    Source: Documentation/block/stat.rst.
    """
    block = root / "sys/dev/block" / device
    try:
        folder = block.resolve(strict=True)
    except OSError:
        return None
    if (folder / "partition").exists():
        folder = folder.parent
    fields = _read(folder / "stat").split()
    if len(fields) < 7:
        return None
    return folder.name, int(fields[2]) * _SECTOR_NBYTES, int(fields[6]) * _SECTOR_NBYTES


def _groups(root: Path, controller: str) -> list[Path]:
    """Return the folders whose limits hold for this process, of either version of control groups."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        here = base / path.lstrip("/")
        # A limit holds for all below it. In a container the path may be the host's, and only the
        # top exists.
        folders += [folder for folder in (here, *here.parents) if folder.is_relative_to(base)]
    return folders


def _quota(folder: Path) -> tuple[int, int]:
    """Return microseconds of processor time and the period they are for; zeros when unlimited."""
    words = _read(folder / "cpu.max").split()
    if len(words) != 2:
        words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
    if not all(word.isdigit() for word in words):
        return 0, 0
    return int(words[0]), int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _plain(escaped: str) -> str:
    """Undo the kernel's `\\040` for a space."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), escaped)
