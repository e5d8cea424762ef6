"""Which bytes of [0, nbytes) are free, and the first of them that are enough. Pure bookkeeping.

Invariants: free ranges are kept in order, none is empty, and no two touch.

Thread rule: none of its own; whoever owns it takes care.
"""

from __future__ import annotations

import bisect

__all__ = ["FreeRanges"]


class FreeRanges:
    """First fit; see the module.

    Args:
        nbytes: all that there is, free at first.

    >>> free = FreeRanges(12)
    >>> free.take(4), free.take(4), free.take(8)
    (0, 4, None)
    >>> free.give(0, 4)
    >>> free.free_nbytes, free.largest_nbytes
    (8, 4)
    """

    def __init__(self, nbytes: int) -> None:
        self._ranges = [(0, nbytes)] if nbytes else []

    @property
    def free_nbytes(self) -> int:
        """Bytes of all free ranges."""
        return sum(end - begin for begin, end in self._ranges)

    @property
    def largest_nbytes(self) -> int:
        """Bytes of the largest free range, 0 when there is none."""
        return max((end - begin for begin, end in self._ranges), default=0)

    def take(self, nbytes: int) -> int | None:
        """Take `nbytes` from the first free range that has them; return their offset, or None."""
        assert nbytes > 0
        for index, (begin, end) in enumerate(self._ranges):
            if end - begin >= nbytes:
                self._ranges[index : index + 1] = [(begin + nbytes, end)] if end - begin > nbytes else []
                return begin
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """Give back what `take` returned."""
        begin, end = offset, offset + nbytes
        index = bisect.bisect(self._ranges, (begin, end))
        first = last = index
        if index and self._ranges[index - 1][1] == begin:
            first, begin = index - 1, self._ranges[index - 1][0]
        if index < len(self._ranges) and self._ranges[index][0] == end:
            last, end = index + 1, self._ranges[index][1]
        self._ranges[first:last] = [(begin, end)]
