"""What is wrong with the directories of a run and the drives below them. Pure.

What is found of the working directory, which is looked at because nobody named one, is a note: nobody
said that a run will lie there.
"""

from __future__ import annotations

import shlex
import stat
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from ..probe.notes import NETWORK
from ..probe.results import IN_MEMORY
from ..sizes import GIB, format_bytes
from .check_gpu import describe_link
from .facts import BlockDevice, DirectoryFacts, Facts, MeasuredFacts
from .finding import Finding, Severity

__all__ = ["check_directories"]

# Less than this holds no state worth the name; below this share solid-state drives slow down.
_LEAST_FREE_NBYTES = GIB
_LEAST_FREE_SHARE = 0.1

# The clocks of kernels differ by a tick, those of servers by what matters to the age of a run.
_SKEW_S = 2.0

# Copy-on-write with checksums of its own: what a run does itself, done twice.
_COPYING = ("btrfs", "zfs", "bcachefs")

_UNFLUSHED = ("nobarrier", "barrier=0")


def check_directories(facts: Facts) -> Iterator[Finding]:
    """Yield what is wrong with each directory, and with all of them together."""
    for directory in facts.directories:
        for finding in _check(directory, facts):
            if directory.origin == "working directory":
                finding = replace(finding, severity=Severity.NOTE)
            yield finding
    yield from _check_shared(facts)
    yield from _check_measured(facts.measured)


def _check(directory: DirectoryFacts, facts: Facts) -> Iterator[Finding]:
    if directory.problem:
        yield _unusable(directory)
        return
    yield from _check_access(directory)
    yield from _check_file_system(directory)
    yield from _check_options(directory)
    yield from _check_room(directory)
    if directory.device is not None:
        yield from _check_device(directory, directory.device)
    known = directory.file_system_id in facts.measured.file_system_ids
    if directory.origin == "named" and not known and not directory.write_problem:
        yield _finding(
            directory,
            "not-measured",
            Severity.NOTE,
            "this drive was not measured: runs use the default setting, 1 MiB x 32",
            shlex.join(["offload", "bench", directory.path]),
        )


def _unusable(directory: DirectoryFacts) -> Finding:
    path = shlex.quote(directory.path)
    if directory.origin == "measured":
        fix = "mount its drive there; offload bench replaces what was measured"
    elif "No such file" in directory.problem:
        fix = f"check the spelling, mount its drive, or: mkdir -p {path}"
    elif "Not a directory" in directory.problem:
        fix = "name the directory that holds it"
    elif "no answer" in directory.problem:
        fix = "its drive or server hangs: look at the mount, and at sudo dmesg"
    else:
        fix = "name a directory that you may use, or change its owner"
    return _finding(
        directory,
        "directory-unusable",
        Severity.WARNING if directory.origin == "measured" else Severity.ERROR,
        directory.problem,
        fix,
    )


def _check_access(directory: DirectoryFacts) -> Iterator[Finding]:
    if directory.write_problem:
        read_only = "ro" in directory.mount.options
        yield _finding(
            directory,
            "cannot-write",
            Severity.ERROR,
            f"a file cannot be written, flushed and read back there: {directory.write_problem}",
            f"mount it for writing: sudo mount -o remount,rw {shlex.quote(directory.path)}"
            if read_only
            else "name a directory of your own on that drive",
        )
    if directory.mode & stat.S_IWOTH and not directory.mode & stat.S_ISVTX:
        yield _finding(
            directory,
            "writable-by-everyone",
            Severity.ERROR,
            f"everyone may write there (mode {directory.mode:o}): no run is made there",
            f"chmod o-w {shlex.quote(directory.path)}",
        )
    if abs(directory.clock_skew_s) > _SKEW_S:
        yield _finding(
            directory,
            "clock-skew",
            Severity.WARNING,
            f"its file system's clock is {abs(directory.clock_skew_s):.0f} s "
            f"{'ahead of' if directory.clock_skew_s > 0 else 'behind'} this machine's",
            "synchronise the clocks of both (chrony, systemd-timesyncd)",
        )


def _check_file_system(directory: DirectoryFacts) -> Iterator[Finding]:
    kind = directory.mount.file_system
    if kind in IN_MEMORY:
        yield _finding(
            directory,
            "in-memory",
            Severity.WARNING,
            f"{kind} is memory: it takes from what is to be saved, and a reboot loses the run",
            "name a directory on a drive",
        )
    elif kind in NETWORK:
        yield _finding(
            directory,
            "network",
            Severity.WARNING,
            f"{kind} is a network file system, which is slow and not meant to hold a run",
            "name a directory on a drive of this machine",
        )
    elif kind == "overlay":
        yield _finding(
            directory,
            "overlay",
            Severity.WARNING,
            "overlay is a container's own layer: it is slower than the drive and goes with the container",
            "mount the drive into the container: docker run -v /mnt/nvme0:/mnt/nvme0",
        )
    elif kind.startswith("fuse"):
        yield _finding(
            directory,
            "fuse",
            Severity.WARNING,
            f"{kind} passes every transfer through another process",
            "name a directory on ext4 or XFS",
        )
    elif kind in _COPYING:
        yield _finding(
            directory,
            "copy-on-write",
            Severity.NOTE,
            f"{kind} copies on write and sums its own checksums, as a run does itself: that costs bandwidth",
            "chattr +C on an empty directory (btrfs), or ext4 or XFS",
        )
    if directory.direct is False and kind not in IN_MEMORY:
        yield _finding(
            directory,
            "o-direct-refused",
            Severity.WARNING,
            f"{kind} refuses O_DIRECT: transfers go through the page cache, at the cost of CPU time",
            "name a directory on ext4 or XFS",
        )


def _check_options(directory: DirectoryFacts) -> Iterator[Finding]:
    options = set(directory.mount.options)
    path = shlex.quote(directory.path)
    unflushed = [option for option in _UNFLUSHED if option in options]
    if unflushed:
        device = directory.device
        cache = " in its volatile write cache" if device and device.write_cache == "write back" else ""
        yield _finding(
            directory,
            "no-barriers",
            Severity.WARNING,
            f"mounted with {unflushed[0]}: a commit may still be{cache or ' in the drive'} when power fails",
            f"take {unflushed[0]} out of /etc/fstab, then: sudo mount -o remount {path}",
        )
    if "volatile" in options:
        yield _finding(
            directory,
            "no-barriers",
            Severity.WARNING,
            "mounted with volatile: syncs do nothing, and a crash may lose commits",
            "mount the drive itself there",
        )
    for option in ("sync", "dirsync"):
        if option in options:
            yield _finding(
                directory,
                "mounted-sync",
                Severity.WARNING,
                f"mounted with {option}: every write waits for the drive",
                f"sudo mount -o remount,async {path}, and take it out of /etc/fstab",
            )
    if "data=writeback" in options:
        yield _finding(
            directory,
            "data-writeback",
            Severity.NOTE,
            "mounted with data=writeback: commits are flushed all the same, but other files may hold old "
            "blocks after a power failure",
            "data=ordered in /etc/fstab, which is the default",
        )
    if "discard" in options:
        yield _finding(
            directory,
            "discard",
            Severity.NOTE,
            "mounted with discard: removing a run, or a snapshot, waits for the drive",
            f"sudo mount -o remount,nodiscard {path}, with fstrim.timer instead",
        )


def _check_room(directory: DirectoryFacts) -> Iterator[Finding]:
    if directory.total_nbytes == 0:
        return  # some network file systems do not tell
    room = f"{format_bytes(directory.free_nbytes)} of {format_bytes(directory.total_nbytes)} are free"
    fix = "free some space, or name another drive; offload clean shows what old runs hold"
    if directory.free_nbytes < _LEAST_FREE_NBYTES:
        yield _finding(directory, "full", Severity.WARNING, f"{room}: hardly a model fits", fix)
    elif directory.free_nbytes < _LEAST_FREE_SHARE * directory.total_nbytes:
        yield _finding(
            directory,
            "nearly-full",
            Severity.WARNING,
            f"{room}: solid-state drives write slower when they are nearly full",
            fix,
        )


def _check_device(directory: DirectoryFacts, device: BlockDevice) -> Iterator[Finding]:
    virtual = device.bus == "virtio" or device.name.startswith("xvd")
    if device.name.startswith(("loop", "zram", "ram")):
        yield _finding(
            directory,
            "no-drive",
            Severity.WARNING,
            f"{device.name} is no drive but a file or memory",
            "name a directory on a drive",
        )
    elif device.bus == "usb":
        yield _finding(
            directory,
            "usb",
            Severity.WARNING,
            f"{device.name} is attached by USB, which is slow and comes loose",
            "use a drive inside the machine",
        )
    elif device.rotational and not virtual:
        yield _finding(
            directory,
            "rotational",
            Severity.WARNING,
            f"{device.name} is a spinning disk: a step takes ten times as long as from NVMe",
            "name a directory on an NVMe drive",
        )
    if device.encrypted:
        yield _finding(
            directory,
            "encrypted",
            Severity.NOTE,
            f"{device.name} is encrypted (dm-crypt), which takes CPU time for every byte",
            "cryptsetup refresh, with --perf-no_read_workqueue --perf-no_write_workqueue, makes it faster",
        )
    # A hypervisor's drive claims to spin and has a scheduler; what it is made of decides elsewhere.
    if device.bus == "nvme" and device.scheduler not in ("none", ""):
        yield _finding(
            directory,
            "scheduler",
            Severity.WARNING if device.scheduler == "bfq" else Severity.NOTE,
            f"{device.name} has the I/O scheduler {device.scheduler}, which costs CPU time and gains nothing "
            "on NVMe",
            f"echo none | sudo tee /sys/block/{device.name}/queue/scheduler",
        )
    link = device.link
    if link is not None and (link.width < link.max_width or link.generation < link.max_generation):
        yield _finding(
            directory,
            "drive-link-slow",
            Severity.WARNING,
            f"{device.name} is linked by {describe_link(link)}: its slot holds it back",
            "move it to an M.2 or U.2 slot with as many and as fast lanes, best one of the CPU's",
        )


def _check_shared(facts: Facts) -> Iterator[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for directory in facts.directories:
        if directory.origin == "named" and not directory.problem:
            name = directory.device.name if directory.device is not None else directory.file_system_id
            groups[name].append(directory.path)
    for name, paths in groups.items():
        if len(paths) > 1:
            yield Finding(
                id="one-drive",
                severity=Severity.WARNING,
                about=", ".join(paths),
                problem=f"these are on one drive ({name}): striping over them gains nothing",
                fix="name one directory on each drive",
            )


def _check_measured(measured: MeasuredFacts) -> Iterator[Finding]:
    if measured.problem:
        yield Finding(
            id="measurement-unreadable",
            severity=Severity.WARNING,
            about=measured.path or "machine.json",
            problem=f"what offload bench measured is not used: {measured.problem}",
            fix="offload bench, with a directory on each drive",
        )


def _finding(directory: DirectoryFacts, id: str, severity: Severity, problem: str, fix: str) -> Finding:
    return Finding(id=id, severity=severity, about=directory.path, problem=problem, fix=fix)
