"""What the engine's tests work with: buffers, sizes, a look into files, and a drive that hangs or fills up.

A `View` and a `Drive` are there twice, for real directories and for a simulated disk, so that a test
need not know which engine it runs on.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from offload.aio.sim import Fault, SimDisk

# Small, so that a request of a few hundred KiB has more segments than the queue is deep.
SEGMENT_NBYTES = 16 * 1024
QUEUE_DEPTH = 4


def aligned(nbytes: int, shift: int = 0) -> memoryview:
    """A zeroed buffer whose address is `shift` bytes past a page boundary."""
    return memoryview(mmap.mmap(-1, nbytes + shift + 1))[shift : shift + nbytes]


def pattern(nbytes: int, seed: int = 1) -> bytes:
    """Bytes in which no two places look alike."""
    return (b"".join((i * 2654435761 + seed).to_bytes(8, "little") for i in range(nbytes // 8 + 1)))[:nbytes]


class View(Protocol):
    """Looks into the files under test without the engine, as another process would."""

    def read_file(self, path: Path) -> bytes: ...
    def write_file(self, path: Path, data: bytes) -> None: ...
    def exists(self, path: Path) -> bool: ...
    def remove(self, path: Path) -> None: ...
    def used_nbytes(self, path: Path) -> int: ...


class RealView:
    """A view of the file system."""

    def read_file(self, path: Path) -> bytes:
        return path.read_bytes()

    def write_file(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)

    def exists(self, path: Path) -> bool:
        return path.exists()

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def used_nbytes(self, path: Path) -> int:
        return path.stat().st_blocks * 512


class SimView:
    """A view of a simulated disk."""

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk

    def read_file(self, path: Path) -> bytes:
        return self._disk.read_file(str(path))

    def write_file(self, path: Path, data: bytes) -> None:
        self._disk.write_file(str(path), data)

    def exists(self, path: Path) -> bool:
        return self._disk.exists(str(path))

    def remove(self, path: Path) -> None:
        self._disk.remove(str(path))

    def used_nbytes(self, path: Path) -> int:
        return self._disk.used_nbytes(str(path))


class Drive(Protocol):
    """A small drive of its own: can run full, and hang like one that dies."""

    path: Path

    def frozen(self) -> AbstractContextManager[Callable[[], None]]:
        """Make every write hang until the end of the block, or until the function given is called."""


class MountedDrive:
    """A small ext4 file system (root only)."""

    # include/uapi/linux/fs.h
    _FREEZE = 0xC0045877
    _THAW = 0xC0045878

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def frozen(self) -> Iterator[Callable[[], None]]:
        root = os.open(self.path, os.O_RDONLY)
        is_frozen = False

        def thaw() -> None:
            nonlocal is_frozen
            if is_frozen:
                fcntl.ioctl(root, self._THAW, 0)
                is_frozen = False

        try:
            fcntl.ioctl(root, self._FREEZE, 0)
            is_frozen = True
            yield thaw
        finally:
            thaw()
            os.close(root)


class SimDrive:
    """A simulated disk as such a drive."""

    def __init__(self, disk: SimDisk, path: Path) -> None:
        self._disk = disk
        self.path = path

    @contextmanager
    def frozen(self) -> Iterator[Callable[[], None]]:
        self._disk.plan(Fault(0, "stuck", of="write", forever=True))
        try:
            yield self._disk.unstick
        finally:
            self._disk.unstick()
