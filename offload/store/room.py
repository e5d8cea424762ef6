"""Whether there is room on the drives for what is about to be made, and the error when there is not.

The answer is a promise of the moment: what must stay free is reserved (`File.allocate`) at once.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Sequence

from ..aio.engine import File
from ..errors import DiskFullError
from ..sizes import format_bytes
from . import files

__all__ = ["check_room", "free_nbytes", "has_room", "no_room", "reserve"]


def check_room(directories: Sequence[str], needed_nbytes: Sequence[int], *, what: str, cure: str) -> None:
    """Refuse before anything is made when there is too little room; directories may share a file system.

    Args:
        directories: one a drive.
        needed_nbytes: what is needed in each.
        what: who needs it, `the run`.
        cure: what to do, for the message.

    Raises:
        DiskFullError: no room, with the bytes needed and free.
        StorageError: a directory cannot be examined.
    """
    for directory, needed, free in _rooms(directories, needed_nbytes):
        if needed > free:
            raise _full(directory, needed, free, what, cure)


def has_room(directories: Sequence[str], needed_nbytes: Sequence[int]) -> bool:
    """Return whether `check_room` would find enough.

    Raises:
        StorageError: a directory cannot be examined.
    """
    return all(needed <= free for _, needed, free in _rooms(directories, needed_nbytes))


def reserve(file: File, directory: str, nbytes: int, *, what: str, cure: str) -> None:
    """Reserve `nbytes` for a file in `directory`; the words are those of `check_room`.

    Raises:
        DiskFullError: no room, with the bytes needed and free.
        StorageError: it fails for another reason.
    """
    try:
        file.allocate(nbytes)
    except DiskFullError as error:
        raise no_room(directory, nbytes, what=what, cure=cure) from error


def no_room(directory: str, needed_nbytes: int, *, what: str, cure: str) -> DiskFullError:
    """Return the error of what found no room in `directory`, with the bytes needed and free there now."""
    return _full(directory, needed_nbytes, free_nbytes(directory), what, cure)


def free_nbytes(directory: str) -> int:
    """Return the bytes that we may still write to the file system of `directory`."""
    with files.storage_errors("examine", directory):
        free = os.statvfs(directory)
    return free.f_bavail * free.f_frsize


def _rooms(directories: Sequence[str], needed_nbytes: Sequence[int]) -> list[tuple[str, int, int]]:
    """Return for each directory the bytes needed on its file system, by all of them, and those free there."""
    devices: list[int] = []
    needed: dict[int, int] = defaultdict(int)
    for directory, nbytes in zip(directories, needed_nbytes, strict=True):
        with files.storage_errors("use directory", directory):
            devices.append(os.stat(directory).st_dev)
        needed[devices[-1]] += nbytes
    return [
        (directory, needed[device], free_nbytes(directory))
        for directory, device in zip(directories, devices, strict=True)
    ]


def _full(directory: str, needed: int, free: int, what: str, cure: str) -> DiskFullError:
    return DiskFullError(
        f"{directory} has {format_bytes(free)} free ({free:,} bytes) and {what} needs "
        f"{format_bytes(needed)} ({needed:,} bytes) there; {cure}",
        errno=errno.ENOSPC,
        path=directory,
        asked_nbytes=needed,
        got_nbytes=free,
    )
