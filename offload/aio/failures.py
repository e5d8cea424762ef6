"""The words of an I/O error: one place that turns what failed into a `StorageError`, for every engine.

The C++ engines call these by name from `csrc/aio/bind.cc`; the portable engine calls them directly.
Nothing here does I/O.
"""

from __future__ import annotations

import errno as errno_names
import functools
import logging
import os

from offload.errors import DiskFullError, RequestTimeoutError, StorageError
from offload.sizes import format_time

__all__ = ["io_error", "timeout_error", "warn_buffered"]

_log = logging.getLogger("offload.aio")

_DISK_FULL = frozenset({errno_names.ENOSPC, errno_names.EDQUOT})

# What to do next, by errno; an unlisted errno stands for itself.
_ADVICE = {
    errno_names.ENOSPC: "free space on that drive or name a directory on another",
    errno_names.EDQUOT: "free space under your quota there or name a directory on another drive",
    errno_names.EFBIG: "raise the limit of file sizes (ulimit -f), or use a file system with larger ones",
    errno_names.EIO: "the drive reports a fault: look at dmesg, and do not trust what it holds",
    errno_names.EROFS: "the file system is read-only; after a fault the kernel remounts it so: look at dmesg",
    errno_names.EINVAL: "the file system refuses this access; try OFFLOAD_IO_ENGINE=portable",
    errno_names.ELOOP: "it is a symbolic link, and those are not followed: name the file itself",
    errno_names.EEXIST: "it exists already and is not overwritten",
    errno_names.EMFILE: "raise the limit of open files (ulimit -n)",
    errno_names.ECANCELED: "it was cancelled before all of it had begun",
}
_SHORT_READ = "the file ends there; it was cut off, or is not the file that was written"
_SHORT_WRITE = "the file system takes no more, and gives no reason"


def io_error(
    action: str,
    path: str,
    errno: int,
    *,
    detail: str = "",
    offset_bytes: int | None = None,
    asked_nbytes: int | None = None,
    got_nbytes: int | None = None,
) -> StorageError:
    """Return the error of a file operation: `DiskFullError` for ENOSPC and EDQUOT, else `StorageError`.

    Args:
        action: what was being done: `open`, `read`, `write`, `sync`, `allocate`, `stat`.
        path: the file.
        errno: of the failing call; 0 for a transfer that ended early without one.
        detail: what is wrong, where the errno says too little.
        offset_bytes: where in the file the transfer began.
        asked_nbytes: bytes asked for.
        got_nbytes: bytes transferred before the failure.
    """
    if asked_nbytes is not None and got_nbytes is not None and offset_bytes is not None:
        extent = f"{got_nbytes:,} of {asked_nbytes:,} bytes at offset {offset_bytes:,} of {path}"
    elif asked_nbytes is not None:
        extent = f"{asked_nbytes:,} bytes of {path}"
    else:
        extent = path
    if errno == 0:
        advice = _SHORT_READ if action == "read" else _SHORT_WRITE
        message = f"short {action}: {extent}: {advice}"
    else:
        reason = detail or os.strerror(errno)
        name = errno_names.errorcode.get(errno, f"errno {errno}")
        advice = "" if detail else _ADVICE.get(errno, "")
        message = f"{action} failed: {extent}: {reason} ({name})" + (f"; {advice}" if advice else "")
    cls = DiskFullError if errno in _DISK_FULL else StorageError
    return cls(
        message,
        errno=errno,
        path=path,
        offset_bytes=offset_bytes,
        asked_nbytes=asked_nbytes,
        got_nbytes=got_nbytes,
    )


def timeout_error(
    action: str, path: str, timeout_s: float, *, offset_bytes: int, asked_nbytes: int
) -> RequestTimeoutError:
    """Return the error of a wait that was given up; the request itself goes on."""
    return RequestTimeoutError(
        f"{action} not done after {format_time(timeout_s)}: {asked_nbytes:,} bytes at offset "
        f"{offset_bytes:,} of {path}; it is still in flight: wait again, or look at the drive (dmesg)",
        errno=errno_names.ETIMEDOUT,
        path=path,
        offset_bytes=offset_bytes,
        asked_nbytes=asked_nbytes,
    )


def warn_buffered(path: str, device: int) -> None:
    """Log, once a drive, that its file system takes no direct transfers and what is done instead.

    Args:
        path: a file on it.
        device: its number (st_dev).
    """
    if device in _warned_devices():
        return
    _warned_devices().add(device)
    _log.warning(
        "%s: its file system (device %d:%d) refuses O_DIRECT; transfers go through the page cache, more "
        "slowly, and their pages are dropped from it afterwards",
        path,
        os.major(device),
        os.minor(device),
    )


@functools.cache
def _warned_devices() -> set[int]:
    return set()
