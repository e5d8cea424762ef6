"""The union of time spans, in bounded memory. Pure arithmetic; not locked, its owner is.

Invariants: the intervals kept are disjoint, do not touch, and are in order; there are at most
`MAX_INTERVALS`. When there are more, the older half is summed up and the horizon moves to its end: a
span that reaches back beyond the horizon counts from the horizon on, so a union is never too long.
Spans arrive as they end, so nearly in order, and an insertion touches only the ends of the lists.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

__all__ = ["MAX_INTERVALS", "Intervals"]

# Some ten steps of any model, and about 0.5 MiB a track.
MAX_INTERVALS = 1 << 13


class Intervals:
    """Disjoint intervals in order, the oldest of them summed up.

    Args:
        horizon_s: when to begin; what is added counts from there on.
    """

    def __init__(self, horizon_s: float) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        # Nothing before the horizon is looked at again; `_folded_s` is what was busy before it.
        self._horizon_s = horizon_s
        self._folded_s = 0.0

    def add(self, start_s: float, end_s: float) -> None:
        """Add the time from `start_s` to `end_s`; what is in already does not count twice."""
        start_s = max(start_s, self._horizon_s)
        if end_s <= start_s:
            return
        # The intervals that touch the new one are those from `first` up to, not including, `last`.
        first = bisect_left(self._ends, start_s)
        last = bisect_right(self._starts, end_s)
        if first < last:
            start_s = min(start_s, self._starts[first])
            end_s = max(end_s, self._ends[last - 1])
        self._starts[first:last] = [start_s]
        self._ends[first:last] = [end_s]
        if len(self._starts) > MAX_INTERVALS:
            self._fold(MAX_INTERVALS // 2)

    def total_s(self) -> float:
        """Return the length of the union."""
        return self._folded_s + sum(end - start for start, end in self._pairs())

    def overlap_s(self, other: Intervals) -> float:
        """Return the length of the intersection with `other`, as far back as both are kept apart."""
        total_s = 0.0
        mine, theirs = self._pairs(), other._pairs()
        a, b = next(mine, None), next(theirs, None)
        while a is not None and b is not None:
            total_s += max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
            if a[1] <= b[1]:
                a = next(mine, None)
            else:
                b = next(theirs, None)
        return total_s

    def _pairs(self) -> Iterator[tuple[float, float]]:
        return zip(self._starts, self._ends, strict=True)

    def _fold(self, count: int) -> None:
        self._horizon_s = self._ends[count - 1]
        self._folded_s += sum(
            end - start for start, end in zip(self._starts[:count], self._ends[:count], strict=True)
        )
        del self._starts[:count], self._ends[:count]
