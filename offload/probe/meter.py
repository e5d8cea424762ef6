"""Tells how far a measurement has come, by the seconds its parts are expected to take.

Invariant: what is told never goes back and never passes 1. Thread rule: one thread.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Meter"]


class Meter:
    """Turns parts that begin into a fraction that is done.

    Args:
        progress: called with the fraction and the name of the part; None tells nobody.
        total_s: sum of what the parts are expected to take.
    """

    def __init__(self, progress: Callable[[float, str], None] | None, total_s: float) -> None:
        self._progress = progress
        self._total_s = total_s
        self._before_s = 0.0
        self._part_s = 0.0
        self._text = ""

    def begin(self, part_s: float, text: str) -> None:
        """End the part before, and begin one that is expected to take `part_s` seconds."""
        self._before_s += self._part_s
        self._part_s, self._text = part_s, text
        self.within(0.0)

    def within(self, fraction: float) -> None:
        """Tell that so much of the present part is done."""
        if self._progress is not None:
            done = (self._before_s + fraction * self._part_s) / self._total_s
            self._progress(min(done, 1.0), self._text)

    def end(self) -> None:
        """Tell that everything is done."""
        if self._progress is not None:
            self._progress(1.0, "done")
