"""What can be wrong with directories and drives; nothing else is."""

from __future__ import annotations

from dataclasses import replace

from doctor_machines import DIRECTORY, SOUND, with_directory, with_drive, with_options

from offload.doctor.facts import Facts, Link, MeasuredFacts
from offload.doctor.finding import Severity
from offload.sizes import GIB, MIB

SLOW_LINK = Link(generation=3, width=4, max_generation=4, max_width=4)

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

# A machine, and what is found of it: id, severity, and a part of the problem and of the fix.
DIRECTORY_CASES: list[tuple[Facts, str, Severity, str, str]] = [
    (
        with_directory(problem="No such file or directory"),
        "directory-unusable",
        ERROR,
        "No such file",
        "mkdir -p /mnt/nvme0",
    ),
    (with_directory(problem="Not a directory"), "directory-unusable", ERROR, "Not a dir", "holds it"),
    (with_directory(problem="no answer within 3 s"), "directory-unusable", ERROR, "no answer", "dmesg"),
    (with_directory(problem="Permission denied"), "directory-unusable", ERROR, "Permission", "owner"),
    (
        with_directory(problem="No such file or directory", origin="measured"),
        "directory-unusable",
        WARNING,
        "No such file",
        "mount its drive",
    ),
    (
        with_directory(write_problem="Permission denied"),
        "cannot-write",
        ERROR,
        "Permission denied",
        "of your own",
    ),
    (
        with_directory(
            write_problem="Read-only file system",
            mount=replace(DIRECTORY.mount, options=("ro",)),
            direct=None,
        ),
        "cannot-write",
        ERROR,
        "Read-only",
        "remount,rw /mnt/nvme0",
    ),
    (with_directory(mode=0o777), "writable-by-everyone", ERROR, "mode 777", "chmod o-w /mnt/nvme0"),
    (with_directory(clock_skew_s=-61.0), "clock-skew", WARNING, "61 s behind", "chrony"),
    (with_options("rw", kind="tmpfs"), "in-memory", WARNING, "tmpfs is memory", "drive"),
    (with_options("rw", kind="nfs4"), "network", WARNING, "nfs4", "of this machine"),
    (with_options("rw", kind="overlay"), "overlay", WARNING, "container", "docker run -v"),
    (with_options("rw", kind="fuseblk"), "fuse", WARNING, "fuseblk", "ext4"),
    (with_options("rw", kind="btrfs"), "copy-on-write", NOTE, "btrfs", "chattr +C"),
    (with_directory(direct=False), "o-direct-refused", WARNING, "ext4 refuses O_DIRECT", "XFS"),
    (with_options("rw", "nobarrier"), "no-barriers", WARNING, "in its volatile write cache", "fstab"),
    (with_options("rw", "barrier=0"), "no-barriers", WARNING, "barrier=0", "fstab"),
    (with_options("rw", "volatile"), "no-barriers", WARNING, "syncs do nothing", "mount the drive"),
    (with_options("rw", "sync"), "mounted-sync", WARNING, "every write waits", "async"),
    (with_options("rw", "data=writeback"), "data-writeback", NOTE, "data=writeback", "data=ordered"),
    (with_options("rw", "discard"), "discard", NOTE, "discard", "nodiscard /mnt/nvme0"),
    (with_directory(free_nbytes=500 * MIB), "full", WARNING, "500.0 MiB of 1000.0 GiB", "offload clean"),
    (with_directory(free_nbytes=90 * GIB), "nearly-full", WARNING, "90.0 GiB of 1000.0 GiB", "offload clean"),
    (with_drive(name="loop3", bus="virtual", rotational=True), "no-drive", WARNING, "loop3", "drive"),
    (with_drive(name="sdb", bus="usb", rotational=True), "usb", WARNING, "sdb", "inside"),
    (
        with_drive(name="sda", bus="sata", rotational=True),
        "rotational",
        WARNING,
        "sda is a spinning disk",
        "NVMe",
    ),
    (with_drive(encrypted=True), "encrypted", NOTE, "dm-crypt", "workqueue"),
    (with_drive(scheduler="bfq"), "scheduler", WARNING, "bfq", "/sys/block/nvme0n1/queue/scheduler"),
    (with_drive(scheduler="mq-deadline"), "scheduler", NOTE, "mq-deadline", "echo none"),
    (with_drive(link=SLOW_LINK), "drive-link-slow", WARNING, "PCIe 3 x4 of 4 x4", "slot"),
    (
        with_directory(file_system_id="fsid-2"),
        "not-measured",
        NOTE,
        "not measured",
        "offload bench /mnt/nvme0",
    ),
    (
        replace(SOUND, directories=(DIRECTORY, replace(DIRECTORY, path="/mnt/nvme1"))),
        "one-drive",
        WARNING,
        "on one drive (nvme0n1)",
        "each drive",
    ),
    (
        replace(SOUND, measured=MeasuredFacts(problem="not JSON", file_system_ids=("fsid-1",))),
        "measurement-unreadable",
        WARNING,
        "not JSON",
        "offload bench",
    ),
]
