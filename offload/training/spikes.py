"""Tells when a loss jumps out of the range of the losses before it.

Owns the last losses. The middle of the range is their median, and its width their median absolute
deviation (MAD): unlike mean and deviation, neither moves much when a spike is among them.

It decides nothing; who asks does. Thread rule: one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

__all__ = ["LossSpikes", "Spike"]

# Long enough for the MAD to be steady, short enough to follow a loss that falls.
WINDOW = 64
SMALLEST_WINDOW = 16

# 1.4826 MAD is one standard deviation of a normal distribution; six of them are not chance.
DEVIATIONS = 6 * 1.4826

# Losses that hardly vary have no MAD to speak of: less than this share of the median is no spike.
SMALLEST_RISE = 0.05


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss far above those before it.

    Attributes:
        median: of the losses before.
        num_losses: how many those are.
    """

    median: float
    num_losses: int


class LossSpikes:
    """See the module.

    Args:
        losses: of the steps done before, the oldest first.

    >>> spikes = LossSpikes([2.0, 2.1] * 10)
    >>> spikes.check(2.2), spikes.check(4.0)
    (None, Spike(median=2.1, num_losses=21))
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(losses, maxlen=WINDOW)

    @property
    def losses(self) -> list[float]:
        """The last losses, the oldest first: what makes another one that decides alike."""
        return list(self._losses)

    def check(self, loss: float) -> Spike | None:
        """Note the loss of the next step; return a spike if it is one."""
        before = tuple(self._losses)
        self._losses.append(loss)
        if len(before) < SMALLEST_WINDOW:
            return None
        middle = median(before)
        deviation = median(abs(value - middle) for value in before)
        if loss - middle <= max(DEVIATIONS * deviation, SMALLEST_RISE * abs(middle)):
            return None
        return Spike(middle, len(before))
