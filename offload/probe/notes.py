"""What a reader must know beside the figures: which of them are not of a drive, or were disturbed. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..sizes import format_bytes, format_rate
from .options import BenchOptions
from .results import DriveFacts

__all__ = ["NETWORK", "Traffic", "busy_notes", "drive_notes", "shared_notes", "slow_notes"]

# File systems whose drives are another machine's.
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs",
    "lustre", "nfs", "nfs4", "smb3", "smbfs",
}  # fmt: skip

# A drive slower than this share of the fastest holds back what is striped over both.
_SLOW = 0.7

# Housekeeping of a file system stays below this share of what a measurement moves.
_FOREIGN = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What a whole drive moved while it was measured.

    Attributes:
        name: of the drive, as in /sys/block.
        drive_nbytes: read and written by everybody, as the kernel counts.
        own_nbytes: of these, ours.
    """

    name: str
    drive_nbytes: int
    own_nbytes: int


def drive_notes(facts: DriveFacts, options: BenchOptions, drive_name: str | None) -> list[str]:
    """Return what is to be said of one drive.

    Args:
        facts: of the drive.
        options: what was asked for.
        drive_name: of the whole drive, `nvme0n1`; None where there is none.
    """
    notes = []
    if facts.in_memory:
        notes.append(f"{facts.path} is on {facts.file_system}: these are figures of memory, not of a drive")
    elif facts.file_system in NETWORK:
        notes.append(
            f"{facts.path} is on {facts.file_system}: these are figures of the network and of a server, "
            "whose memory may have answered instead of its drives"
        )
    elif facts.file_system == "overlay":
        notes.append(f"{facts.path} is on overlay, the layer of a container; mount the drive itself there")
    if not facts.direct and not facts.in_memory:
        if not options.direct:
            why = "as asked"
        elif facts.engine == "portable":
            why = "because the portable engine has no O_DIRECT"
        else:
            why = f"because {facts.file_system} refuses O_DIRECT"
        notes.append(
            f"{facts.path} was measured through the page cache, {why}; what was read was dropped from it, "
            "and writes count their flush"
        )
    if drive_name is not None and drive_name.startswith(("vd", "xvd")):
        notes.append(
            f"{facts.path} is on {drive_name}, a virtual drive: the host may hold parts of the "
            "file in its memory"
        )
    if drive_name is not None and drive_name.startswith(("loop", "zram", "ram")):
        notes.append(f"{facts.path} is on {drive_name}, which is no drive but a file or memory")
    return notes


def shared_notes(paths: Sequence[str], places: Sequence[str]) -> list[str]:
    """Return a warning for each group of directories on one drive.

    Args:
        paths: the directories.
        places: for each, what stands for its drive; equal for the same one.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for path, place in zip(paths, places, strict=True):
        groups[place].append(path)
    return [
        f"{', '.join(group)} are on one drive ({place}): together they measure it once, with its queue shared"
        for place, group in groups.items()
        if len(group) > 1
    ]


def slow_notes(drives: Sequence[DriveFacts], bytes_per_s: Sequence[float], pattern: str) -> list[str]:
    """Return a note on each drive that is much slower than the fastest. Memory is not compared with drives.

    Args:
        drives: what they are.
        bytes_per_s: of each alone, at its best setting.
        pattern: what was measured.
    """
    rates = {drive.path: rate for drive, rate in zip(drives, bytes_per_s, strict=True) if not drive.in_memory}
    fastest = max(rates, key=rates.__getitem__, default="")
    return [
        f"{path} is slow: {pattern} {format_rate(rate)}, and {fastest} "
        f"{format_rate(rates[fastest])}; look at its slot, its temperature and how full it is, or leave it "
        "out"
        for path, rate in rates.items()
        if rate < _SLOW * rates[fastest]
    ]


def busy_notes(traffic: Sequence[Traffic]) -> list[str]:
    """Return a note on each drive that others used meanwhile."""
    return [
        f"{one.name} was busy: others moved {format_bytes(one.drive_nbytes - one.own_nbytes)} while we moved "
        f"{format_bytes(one.own_nbytes)}; measure again when it is idle"
        for one in traffic
        if one.drive_nbytes - one.own_nbytes > _FOREIGN * one.own_nbytes
    ]
