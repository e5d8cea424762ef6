"""The files of the portable engine: one buffered descriptor and a count of those who use it.

A descriptor is closed when the last user has let it go, never under a system call. Nothing here
submits or schedules; `offload.aio.portable` does.

Thread rule: any thread may call any method; the count is under a lock.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from offload.aio.engine import OpenMode
from offload.aio.failures import io_error
from offload.errors import StateError

__all__ = ["PortableFile", "open_regular"]

_FLAGS = {"r": os.O_RDONLY, "r+": os.O_RDWR, "x+": os.O_RDWR | os.O_CREAT | os.O_EXCL}


class PortableFile:
    """An open file of the portable engine; see `offload.aio.engine.File`."""

    _fd = -1  # until it is open; __del__ sees this when it never was

    def __init__(self, path: str, mode: OpenMode, dir_fd: int | None) -> None:
        self.path = os.fsdecode(path)
        self.direct = False
        self.writable = mode != "r"
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._num_users = 0
        self._closed = False
        self._fd = open_regular(self.path, mode, dir_fd)

    @property
    def size_nbytes(self) -> int:
        with self.use() as fd:
            return os.fstat(fd).st_size

    def allocate(self, nbytes: int) -> None:
        if nbytes < 0:
            raise ValueError(f"nbytes must be >= 0, not {nbytes}")
        with self.use() as fd:
            try:
                if nbytes:
                    os.posix_fallocate(fd, 0, nbytes)
            except OSError as error:
                raise io_error("allocate", self.path, error.errno or 0, asked_nbytes=nbytes) from error

    def sync(self) -> None:
        """Make completed writes durable; blocks."""
        with self.use() as fd:
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise io_error("sync", self.path, error.errno or 0) from error

    @contextmanager
    def use(self) -> Iterator[int]:
        """Keep the descriptor open inside the block and give it."""
        fd = self.acquire()
        try:
            yield fd
        finally:
            self.release()

    def acquire(self) -> int:
        """Return the descriptor, open until `release`."""
        if os.getpid() != self._pid:
            raise StateError(f"{self.path} was opened by the parent of this process; open it again here")
        with self._changed:
            if self._closed:
                raise StateError(f"{self.path} is closed; open it again to use it")
            self._num_users += 1
            return self._fd

    def release(self) -> None:
        """End what `acquire` began."""
        with self._changed:
            self._num_users -= 1
            self._changed.notify_all()

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._num_users == 0)
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __del__(self) -> None:
        # Requests in flight hold the file, so nothing uses the descriptor any more.
        if self._fd >= 0:
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_regular(path: str, mode: OpenMode, dir_fd: int | None = None) -> int:
    """Return a blocking descriptor of a regular file, opened as `Engine.open` promises.

    Raises:
        ValueError: no such mode.
        StorageError: the file cannot be opened, or is not a regular one.
    """
    if mode not in _FLAGS:
        raise ValueError(f"mode must be 'r', 'r+' or 'x+', not {mode!r}")
    # O_NONBLOCK so that a FIFO does not block here until someone writes to it.
    flags = _FLAGS[mode] | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
    except OSError as error:
        raise io_error("open", path, error.errno or 0) from error
    kind = os.fstat(fd).st_mode
    if not stat.S_ISREG(kind):
        os.close(fd)
        reason = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
        raise io_error("open", path, reason, detail="not a regular file")
    os.set_blocking(fd, True)
    return fd
