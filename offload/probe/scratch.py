"""The file that is measured: one in each directory, nameless from the start, its contents known.

Invariants: the only file touched is the one made here, `offload-bench-<uuid>`; its name is removed as
soon as it is open, so its space is free again when the process ends, however that happens. A kill in
the instant between leaves an empty file, which stays: it may be that of a bench that runs. Not O_TMPFILE:
an engine opens a name, without following links, and may open it a second time for O_DIRECT. What each
block must hold is known at every moment.

Thread rule: one thread at a time for each file. Buffers belong to the caller.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self
from uuid import uuid4

import numpy as np

from ..aio.engine import Engine, Op, Request
from ..errors import CorruptionError, DiskFullError, StorageError
from ..sizes import GIB, MIB, align_down, format_bytes
from .content import BLOCK_NBYTES, PERIOD_NBYTES, Content, Counts
from .options import MIN_FILE_NBYTES

__all__ = ["ScratchFile", "check_directories"]

# Whatever else lives on the file system goes on while we measure: this much is left to it.
_RESERVE_NBYTES = GIB
_RESERVE_SHARE = 0.05

_ADVICE = {
    errno.ENOENT: "there is no such directory: create it, or name one that exists",
    errno.ENOTDIR: "it is not a directory: name the directory that holds it",
    errno.EACCES: "name a directory that you may write to, or change its owner",
    errno.EPERM: "name a directory that you may write to",
    errno.EROFS: "mount it for writing, or name a directory on another drive",
}


def check_directories(directories: Sequence[str], nbytes: int) -> list[int]:
    """Check that each directory takes a file of `nbytes`, and return the bytes free in each.

    Args:
        directories: existing ones; several on one file system share its room.
        nbytes: of each file.

    Raises:
        StorageError: one is missing, or is no directory.
        DiskFullError: the files would leave less than 1 GiB free, or 5 % of a small file system.
    """
    devices = [_device_of(directory) for directory in directories]
    sharers: dict[int, int] = defaultdict(int)
    for device in devices:
        sharers[device] += 1
    free_nbytes = []
    for directory, device in zip(directories, devices, strict=True):
        room = os.statvfs(directory)
        free = room.f_bavail * room.f_frsize
        free_nbytes.append(free)
        if room.f_blocks == 0:
            continue  # some network file systems do not tell; the reservation decides
        reserve = min(_RESERVE_NBYTES, int(room.f_blocks * room.f_frsize * _RESERVE_SHARE))
        if sharers[device] * nbytes + reserve > free:
            raise _full(directory, nbytes, free, reserve, sharers[device])
    return free_nbytes


class ScratchFile:
    """A file of known contents; see the module. A context manager.

    Args:
        engine: opens the file; any engine of the same name may then use it.
        directory: where, absolute.
        nbytes: its size, a multiple of 1 MiB.
        seed: of its contents.

    Raises:
        StorageError: the directory cannot be used.
        DiskFullError: there is no room.
    """

    def __init__(self, engine: Engine, directory: str, nbytes: int, *, seed: int = 0) -> None:
        assert nbytes % PERIOD_NBYTES == 0, nbytes
        self.directory = directory
        self.nbytes = nbytes
        check_directories([directory], nbytes)
        self.verified_nbytes = 0
        self.read_nbytes = 0
        self.written_nbytes = 0
        self.content = Content(seed)
        self.counts: Counts = np.zeros(nbytes // BLOCK_NBYTES, dtype=np.uint32)
        # Where the next run goes on, so that runs do not meet what a drive's cache still holds.
        self.next_offsets: dict[tuple[str, int], int] = {}
        name = f"offload-bench-{uuid4()}"
        self.path = os.path.join(directory, name)
        self._engine = engine
        self._cache_fd = -1
        self._make(name)

    def _make(self, name: str) -> None:
        try:
            folder = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _refused(self.directory, error) from error
        try:
            # Around the open too: Ctrl-C during it is raised when the name is there and nobody has the file.
            with _unlinked(name, folder):
                try:
                    self.file = self._engine.open(name, "x+", dir_fd=folder)
                except DiskFullError:
                    raise
                except StorageError as error:
                    raise _refused(self.directory, error) from error
                # Ours, for the page cache only; the engine keeps its descriptors to itself.
                self._cache_fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
            self.device_id = os.fstat(self._cache_fd).st_dev
            self.file.allocate(self.nbytes)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(folder)

    @property
    def device(self) -> str:
        """`major:minor` of the file system."""
        return f"{os.major(self.device_id)}:{os.minor(self.device_id)}"

    def fill(self, memory: memoryview, told: Callable[[float], None] | None = None) -> None:
        """Write the whole file once and make it durable.

        Args:
            memory: whole periods, to write from.
            told: called with the fraction done.
        """
        self.content.fill(memory)
        self._stream("write", memory, told)
        self._engine.sync(self.file)
        self.drop_cache()

    def verify(self, memory: memoryview, told: Callable[[float], None] | None = None) -> None:
        """Read the whole file and compare every byte with what was last written.

        Args:
            memory: whole periods, to read into.
            told: called with the fraction done.

        Raises:
            CorruptionError: a byte differs; names its offset.
        """
        self.drop_cache()
        self._stream("read", memory, told)
        self.drop_cache()

    def stamp(self, buffer: memoryview, offset_bytes: int) -> None:
        """Make a filled buffer the next contents of its place, and take note of it.

        Args:
            buffer: whole blocks, filled with `content` as for `offset_bytes`.
            offset_bytes: where it is about to be written, a multiple of 4096.
        """
        counts = self._counts(buffer, offset_bytes)
        counts += 1
        self.content.stamp(buffer, offset_bytes, counts)
        self.written_nbytes += buffer.nbytes

    def check(self, buffer: memoryview, offset_bytes: int) -> None:
        """Compare what was read with what was last written there.

        Raises:
            CorruptionError: a byte differs; names its offset.
        """
        wrong = self.content.first_difference(buffer, offset_bytes, self._counts(buffer, offset_bytes))
        if wrong is not None:
            raise CorruptionError(
                f"read back other bytes than were written: the first at offset {wrong:,} of the file in "
                f"{self.directory}, in a read of {buffer.nbytes:,} bytes at offset {offset_bytes:,}; do not "
                "trust this drive: look at dmesg and its SMART data",
                path=self.path,
                offset_bytes=wrong,
                asked_nbytes=buffer.nbytes,
            )
        self.verified_nbytes += buffer.nbytes

    def drop_cache(self, offset_bytes: int = 0, nbytes: int = 0) -> None:
        """Drop the file's clean pages from the page cache; all of them when `nbytes` is 0.

        Advice to the kernel; on tmpfs, which is memory, it does nothing.
        """
        if not self.file.direct:
            os.posix_fadvise(self._cache_fd, offset_bytes, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Finish what is in flight and give the space back. Closing twice is harmless."""
        if hasattr(self, "file"):
            self.file.close()
        if self._cache_fd >= 0:
            os.close(self._cache_fd)
            self._cache_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, op: Op, memory: memoryview, told: Callable[[float], None] | None) -> None:
        """Read and check, or write, the whole file from front to back, several requests at a time."""
        step = min(8 * MIB, align_down(memory.nbytes // 2, PERIOD_NBYTES))
        places = range(0, self.nbytes, step)
        slots = min(4, memory.nbytes // step, len(places))
        pending: deque[tuple[Request, memoryview, int]] = deque()
        for index in range(len(places) + slots):
            if index >= slots:
                request, part, offset = pending.popleft()
                request.wait()
                if op == "read":
                    self.read_nbytes += part.nbytes
                    self.check(part, offset)
                if told is not None:
                    told((offset + part.nbytes) / self.nbytes)
            if index < len(places):
                start, offset = index % slots * step, places[index]
                part = memory[start : start + min(step, self.nbytes - offset)]
                if op == "write":
                    self.stamp(part, offset)
                pending.append((self._engine.submit(op, self.file, part, offset), part, offset))

    def _counts(self, buffer: memoryview, offset_bytes: int) -> Counts:
        first = offset_bytes // BLOCK_NBYTES
        return self.counts[first : first + buffer.nbytes // BLOCK_NBYTES]


@contextmanager
def _unlinked(name: str, folder: int) -> Iterator[None]:
    """Remove a name at the end, if there is one by then."""
    try:
        yield
    except BaseException:
        # What went wrong counts, and a file system that cannot be written to refuses this as well.
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)
        raise
    os.unlink(name, dir_fd=folder)


def _device_of(directory: str) -> int:
    try:
        if not os.path.isdir(directory):
            os.stat(directory)
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return os.stat(directory).st_dev
    except OSError as error:
        raise _refused(directory, error) from error


def _refused(directory: str, error: OSError) -> StorageError:
    number = error.errno or 0
    reason = os.strerror(number) if number else str(error)
    advice = f"; {_ADVICE[number]}" if number in _ADVICE else ""
    return StorageError(f"cannot measure in {directory}: {reason}{advice}", errno=number, path=directory)


def _full(directory: str, nbytes: int, free: int, reserve: int, sharers: int) -> DiskFullError:
    fits = align_down(max(0, free - reserve) // sharers, MIB)
    shared = f" for each of {sharers} directories on that file system" if sharers > 1 else ""
    if fits >= MIN_FILE_NBYTES:
        # The largest round size that fits.
        size = 1 << (fits.bit_length() - 1)
        remedy = f"use --size {format_bytes(size).replace('.0 ', '')}, or free some space"
    else:
        remedy = "free some space, or name a directory on another drive"
    return DiskFullError(
        f"{directory} has {format_bytes(free)} ({free:,} bytes) free; the file to measure with needs "
        f"{format_bytes(nbytes)} ({nbytes:,} bytes){shared}, and {format_bytes(reserve)} ({reserve:,} bytes) "
        f"must stay free; {remedy}",
        errno=errno.ENOSPC,
        path=directory,
        asked_nbytes=sharers * nbytes,
        got_nbytes=free,
    )
