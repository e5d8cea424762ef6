"""The lock of a run folder: one live process that writes, or several that only read.

The kernel's `flock` decides, so the lock of a process that ended in any way is free at once and is
simply taken over. The pid and boot id written into the file are only for the message to the next one:
nothing else is ever read from it, so a damaged lock file does no harm.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path

from ..errors import LockedError, StorageError
from .files import check_owned, storage_errors

__all__ = ["LOCK_NAME", "RunLock", "find_holder"]

LOCK_NAME = "lock"
_MAX_NBYTES = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# PID_MAX_LIMIT of Linux on 64 bits; see proc_sys_kernel(5).
_MAX_PID = 1 << 22
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

# `find_holder` holds the lock for some microseconds; whoever takes it just then tries again this often.
_NUM_TRIES = 5
_TRY_AGAIN_S = 0.01


class RunLock:
    """Holds the lock of one run folder until `release`.

    Args:
        dir_fd: the folder.
        path: the lock file's whole path, for messages.
        shared: for reading alone: others may read as well. It works on a read-only file system, too.

    Raises:
        LockedError: a live process holds it; names its pid.
        StorageError: the lock file is not ours, or cannot be opened.
    """

    def __init__(self, dir_fd: int, path: str, *, shared: bool = False) -> None:
        writable = True
        with storage_errors("open", path):
            try:
                self._fd = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600, dir_fd=dir_fd)
            except OSError as error:
                if not shared or error.errno != errno.EROFS:
                    raise
                writable = False
                self._fd = os.open(LOCK_NAME, os.O_RDONLY | _FLAGS, dir_fd=dir_fd)
        try:
            self._acquire(path, shared=shared, writable=writable)
        except BaseException:
            os.close(self._fd)
            raise

    def release(self) -> None:
        """Give the lock up. Releasing twice is harmless."""
        if self._fd >= 0:
            # Unlocking names the open file description, so a forked child that inherited the
            # descriptor does not keep the run locked.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1

    def _acquire(self, path: str, *, shared: bool, writable: bool) -> None:
        try:
            _lock(self._fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except BlockingIOError as error:
            raise LockedError(_who(os.pread(self._fd, _MAX_NBYTES, 0), path), path=path) from error
        except OSError as error:
            raise StorageError(
                f"cannot lock {path}: {error.strerror}; a run needs a file system with flock",
                errno=error.errno or 0,
                path=path,
            ) from error
        if check_owned(self._fd, path).st_nlink == 0:
            raise StorageError(f"{path} was removed while it was being opened", path=path)
        if not writable:
            return
        with storage_errors("write", path):
            os.fchmod(self._fd, 0o600)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"boot_id": _boot_id(), "pid": os.getpid()}).encode("ascii"), 0)


def find_holder(dir_fd: int, path: str) -> int | None:
    """Return the pid of the process that writes to the run, 0 where it is not known; None for nobody.

    Nothing is changed, and no process that opens the run at this moment is kept from it.

    Raises:
        StorageError: the lock file is not ours, or cannot be read.
    """
    with storage_errors("open", path):
        try:
            fd = os.open(LOCK_NAME, os.O_RDONLY | _FLAGS, dir_fd=dir_fd)
        except FileNotFoundError:
            return None
    try:
        check_owned(fd, path)
        with storage_errors("read", path):
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _parse(os.pread(fd, _MAX_NBYTES, 0))
                return holder[0] if holder is not None and holder[1] == _boot_id() else 0
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)
    return None


def _lock(fd: int, kind: int) -> None:
    for attempt in range(_NUM_TRIES):
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == _NUM_TRIES - 1:
                raise
        time.sleep(_TRY_AGAIN_S)


def _parse(data: bytes) -> tuple[int, str] | None:
    """Return pid and boot id of the holder, None when the file does not tell."""
    try:
        holder = json.loads(data)
        pid, boot_id = holder["pid"], holder["boot_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if type(pid) is not int or not 0 < pid <= _MAX_PID or not isinstance(boot_id, str):
        return None
    return pid, boot_id


def _boot_id() -> str:
    return _BOOT_ID.read_text("ascii").strip() if _BOOT_ID.exists() else ""


def _who(data: bytes, path: str) -> str:
    """Return the message about the holder, as far as the lock file tells."""
    holder = _parse(data)
    if holder is None:
        return f"{path} is locked by another process; wait until it has ended"
    pid, boot_id = holder
    if boot_id != _boot_id():
        return f"{path} is locked by process {pid} of another machine; wait until it has ended"
    if not Path(f"/proc/{pid}").exists():
        return f"{path} is locked by a process that process {pid}, now ended, started; end that one first"
    return f"{path} is locked by process {pid}, which uses this run; wait until it has ended"
