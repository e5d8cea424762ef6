"""The lock of a run folder: one live process at a time.

The kernel's `flock` decides, so the lock of a process that ended in any way is free at once and is
simply taken over. The pid and boot id written into the file are only for the message to the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from ..errors import LockedError, StorageError
from .files import check_owned, storage_errors

__all__ = ["LOCK_NAME", "RunLock"]

LOCK_NAME = "lock"
_MAX_NBYTES = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class RunLock:
    """Holds the lock of one run folder until `release`.

    Raises:
        LockedError: a live process holds it; names its pid.
        StorageError: the lock file is not ours, or cannot be opened.
    """

    def __init__(self, dir_fd: int, path: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with storage_errors("open", path):
            self._fd = os.open(LOCK_NAME, flags, 0o600, dir_fd=dir_fd)
        try:
            self._acquire(path)
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

    def _acquire(self, path: str) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        with storage_errors("write", path):
            os.fchmod(self._fd, 0o600)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"boot_id": _boot_id(), "pid": os.getpid()}).encode("ascii"), 0)


def _boot_id() -> str:
    return _BOOT_ID.read_text("ascii").strip() if _BOOT_ID.exists() else ""


def _who(data: bytes, path: str) -> str:
    """Return the message about the holder, as far as the lock file tells."""
    try:
        holder = json.loads(data)
        pid, boot_id = int(holder["pid"]), holder["boot_id"]
    except (ValueError, TypeError, KeyError):
        return f"{path} is locked by another process; wait until it has ended"
    if boot_id != _boot_id():
        return f"{path} is locked by process {pid} of another machine; wait until it has ended"
    if not Path(f"/proc/{pid}").exists():
        return f"{path} is locked by a process that process {pid}, now ended, started; end that one first"
    return f"{path} is locked by process {pid}, which uses this run; wait until it has ended"
