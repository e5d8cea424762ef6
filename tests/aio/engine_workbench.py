"""What the engine's tests work with: buffers, sizes, and a drive that can be filled and frozen."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Small, so that a request of a few hundred KiB has more segments than the queue is deep.
SEGMENT_NBYTES = 16 * 1024
QUEUE_DEPTH = 4


def aligned(nbytes: int, shift: int = 0) -> memoryview:
    """A zeroed buffer whose address is `shift` bytes past a page boundary."""
    return memoryview(mmap.mmap(-1, nbytes + shift + 1))[shift : shift + nbytes]


def pattern(nbytes: int, seed: int = 1) -> bytes:
    """Bytes in which no two places look alike."""
    return (b"".join((i * 2654435761 + seed).to_bytes(8, "little") for i in range(nbytes // 8 + 1)))[:nbytes]


class Drive:
    """A small ext4 file system of its own (root only): can run full, and hang like a dying drive."""

    # include/uapi/linux/fs.h
    _FREEZE = 0xC0045877
    _THAW = 0xC0045878

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def frozen(self) -> Iterator[Callable[[], None]]:
        """Make every write hang until the end of the block, or until the function given is called."""
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
