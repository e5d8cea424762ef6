"""What the file of a measurement holds: bytes that do not compress, known for every block of 4 KiB.

One MiB of random words is repeated over the file; the first and the last word of each block of 4 KiB
are replaced by its stamp, a number made of the block's index and of how often it was written. So no two
blocks are alike, now or earlier: nothing can be compressed, deduplicated or skipped because it is there
already, and a block that is stale, torn or in the wrong place is seen. Stamping costs two stores for
each 4 KiB, which leaves the processor to the transfers; making all bytes anew would not.

Pure, apart from writing to the buffers it is handed. Thread rule: any thread; no state changes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..sizes import MIB

__all__ = ["BLOCK_NBYTES", "PERIOD_NBYTES", "Content", "Counts"]

# The smallest transfer of direct I/O, and so the smallest thing that can go astray.
BLOCK_NBYTES = 4096

# Beyond the window of every compressor in a drive or file system with records up to 1 MiB.
PERIOD_NBYTES = MIB

_BLOCKS = PERIOD_NBYTES // BLOCK_NBYTES
_WORDS = BLOCK_NBYTES // 8

# How often a block was written stands above its index in a stamp: 2^40 blocks are 4 PiB.
_COUNT_SHIFT = np.uint64(40)

# How often each block was written, an array of one entry a block.
Counts = NDArray[np.uint32]


class Content:
    """The bytes that belong to a place in the file.

    Args:
        seed: other bytes for each file.
    """

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._base = random.integers(0, 1 << 64, (_BLOCKS, _WORDS), dtype=np.uint64)
        self._key = np.uint64(random.integers(0, 1 << 39))

    def fill(self, buffer: memoryview) -> None:
        """Fill a buffer, of whole blocks, that stands for bytes from the start of any period."""
        blocks = _blocks(buffer)
        for start in range(0, len(blocks), _BLOCKS):
            part = blocks[start : start + _BLOCKS]
            part[:] = self._base[: len(part)]

    def stamp(self, buffer: memoryview, offset_bytes: int, counts: Counts) -> None:
        """Make a filled buffer what is to be at `offset_bytes` of the file.

        Args:
            buffer: whole blocks, filled as for `offset_bytes` modulo the period.
            offset_bytes: of its first byte, a multiple of 4096.
            counts: how often each of its blocks has then been written.
        """
        blocks = _blocks(buffer)
        stamps = self._stamps(offset_bytes, counts)
        blocks[:, 0] = stamps
        blocks[:, -1] = ~stamps

    def first_difference(self, buffer: memoryview, offset_bytes: int, counts: Counts) -> int | None:
        """Return the file offset of the first byte that is not what was written; None when all are.

        Args:
            buffer: whole blocks, read from the file.
            offset_bytes: where they were read.
            counts: how often each of them was written.
        """
        blocks = _blocks(buffer)
        stamps = self._stamps(offset_bytes, counts)
        start = 0
        while start < len(blocks):
            row = (offset_bytes // BLOCK_NBYTES + start) % _BLOCKS
            stop = min(len(blocks), start + _BLOCKS - row)
            got, base = blocks[start:stop], self._base[row : row + stop - start]
            if not (
                np.array_equal(got[:, 1:-1], base[:, 1:-1])
                and np.array_equal(got[:, 0], stamps[start:stop])
                and np.array_equal(got[:, -1], ~stamps[start:stop])
            ):
                want = base.copy()
                want[:, 0] = stamps[start:stop]
                want[:, -1] = ~stamps[start:stop]
                differ = np.ascontiguousarray(got).view(np.uint8) != want.view(np.uint8)
                return offset_bytes + start * BLOCK_NBYTES + int(np.argmax(differ))
            start = stop
        return None

    def _stamps(self, offset_bytes: int, counts: Counts) -> NDArray[np.uint64]:
        first = offset_bytes // BLOCK_NBYTES
        index = np.arange(first, first + len(counts), dtype=np.uint64)
        stamps: NDArray[np.uint64] = (counts.astype(np.uint64) << _COUNT_SHIFT) + index + self._key
        return stamps


def _blocks(buffer: memoryview) -> NDArray[np.uint64]:
    """Return a view of a buffer as rows of one block each."""
    return np.frombuffer(buffer, dtype=np.uint64).reshape(-1, _WORDS)
