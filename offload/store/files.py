"""Small files relative to a directory's descriptor: the system calls of the store that are not the engine's.

Every call is checked and its failure becomes a `StorageError` with errno and path. Nothing here follows
a symbolic link, and what is created is for its owner alone whatever the umask. This is the one seam
through which manifests, ownership files and locks reach the disk: crash tests record and replay it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CorruptionError, DiskFullError, StorageError

__all__ = [
    "check_owned",
    "clone_range",
    "create_file",
    "make_directory",
    "open_directory",
    "open_file",
    "read_file",
    "remove_directory",
    "rename",
    "storage_errors",
    "sync",
    "unlink",
    "write_file",
]

_FULL = (errno.ENOSPC, errno.EDQUOT)

# ioctl_ficlonerange(2): the request, its argument (descriptor, offset, length, target's offset), and the
# errors that say that this file system, or this pair of files, cannot.
_FICLONERANGE = 0x4020940D
_CLONE = struct.Struct("=qQQQ")
_NO_CLONES = (errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.ENOTTY, errno.ENOSYS, errno.EPERM)


@contextmanager
def storage_errors(action: str, path: str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `StorageError` that says what failed on which path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        number = error.errno or 0
        kind = DiskFullError if number in _FULL else StorageError
        reason = os.strerror(number) if number else str(error)
        raise kind(f"cannot {action} {path}: {reason}", errno=number, path=path) from error


def open_directory(name: str, path: str, *, dir_fd: int | None = None, follow: bool = False) -> int:
    """Open a directory and return its descriptor.

    Args:
        name: relative to `dir_fd`, or a path of its own.
        path: the whole path, for messages.
        follow: whether the last component may be a symbolic link.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    with storage_errors("open directory", path):
        return os.open(name, flags, dir_fd=dir_fd)


def make_directory(dir_fd: int, name: str, path: str) -> int:
    """Create a directory with mode 0700 that must not exist yet, open it, and return its descriptor."""
    with storage_errors("create directory", path):
        os.mkdir(name, 0o700, dir_fd=dir_fd)
    fd = open_directory(name, path, dir_fd=dir_fd)
    with storage_errors("set the mode of", path):
        os.fchmod(fd, 0o700)
    return fd


def check_owned(fd: int, path: str, *, directory: bool = False) -> os.stat_result:
    """Return the status of an open file after checking that it is ours alone.

    Raises:
        StorageError: another user's, open to group or others, not a plain file (or directory), or
            reachable under a second name.
    """
    with storage_errors("examine", path):
        status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise StorageError(
            f"{path} belongs to user {status.st_uid}, not to user {os.geteuid()} who runs this", path=path
        )
    if status.st_mode & 0o077:
        raise StorageError(
            f"{path} is open to others (mode {stat.S_IMODE(status.st_mode):o}); make sure that nobody "
            "changed it, then take the permissions of group and others away",
            path=path,
        )
    if not directory and (not stat.S_ISREG(status.st_mode) or status.st_nlink > 1):
        raise StorageError(f"{path} is not a plain file with one name; it is not ours", path=path)
    return status


def create_file(dir_fd: int, name: str, path: str) -> int:
    """Create a file with mode 0600 that must not exist yet, and return its descriptor for writing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with storage_errors("create", path):
        fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
    with storage_errors("set the mode of", path):
        os.fchmod(fd, 0o600)
    return fd


def open_file(dir_fd: int, name: str, path: str, *, write: bool = False) -> int:
    """Open a plain file of ours and return its descriptor.

    Raises:
        StorageError: missing, not ours alone, or not to be opened.
    """
    flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with storage_errors("open", path):
        fd = os.open(name, flags, dir_fd=dir_fd)
    try:
        check_owned(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def clone_range(fd: int, offset: int, target_fd: int, target_offset: int, nbytes: int, path: str) -> bool:
    """Let a range of a file share the bytes of another file; return whether the file system can.

    Raises:
        StorageError: it can, and failed; `path` is the target's.
    """
    with storage_errors("share extents with", path):
        try:
            fcntl.ioctl(target_fd, _FICLONERANGE, _CLONE.pack(fd, offset, nbytes, target_offset))
        except OSError as error:
            if error.errno in _NO_CLONES:
                return False
            raise
    return True


def write_file(fd: int, data: bytes, path: str) -> None:
    """Write all of `data` to an open file."""
    view = memoryview(data)
    with storage_errors("write", path):
        while view:
            view = view[os.write(fd, view) :]


def read_file(dir_fd: int, name: str, path: str, max_nbytes: int) -> bytes:
    """Return the contents of a plain file of ours.

    Raises:
        CorruptionError: longer than `max_nbytes`.
        StorageError: missing, not ours alone, or unreadable.
    """
    # O_NONBLOCK: opening a FIFO that somebody put there must fail the check, not hang.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with storage_errors("open", path):
        fd = os.open(name, flags, dir_fd=dir_fd)
    try:
        # First: Python refuses to make a file of a directory, with an error of its own.
        check_owned(fd, path)
        with storage_errors("read", path), os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            data = file.read(max_nbytes + 1)
    finally:
        os.close(fd)
    if data is None or len(data) > max_nbytes:
        raise CorruptionError(f"{path} has more than the {max_nbytes:,} bytes allowed", path=path)
    return data


def sync(fd: int, path: str) -> None:
    """Make an open file, or the entries of an open directory, durable."""
    with storage_errors("sync", path):
        os.fsync(fd)


def rename(dir_fd: int, old: str, new: str, path: str) -> None:
    """Give a file its final name, replacing what has it."""
    with storage_errors("rename to", path):
        os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)


def unlink(dir_fd: int, name: str, path: str) -> None:
    """Remove a file."""
    with storage_errors("remove", path):
        os.unlink(name, dir_fd=dir_fd)


def remove_directory(dir_fd: int, name: str, path: str) -> None:
    """Remove an empty directory."""
    with storage_errors("remove directory", path):
        os.rmdir(name, dir_fd=dir_fd)
