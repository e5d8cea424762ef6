"""Axes: from values to pixels, with ticks at round numbers. Pure arithmetic.

A scale maps values to pixels; its ticks lie inside its range and carry labels without units, since the
unit stands once at the axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Scale", "Tick", "category_scale", "linear_scale", "log_scale", "spread"]


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis.

    Attributes:
        at: pixels.
        label: text.
    """

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: pixels.
        end: pixels; below `start` for an upright axis.
        ticks: labelled places.
        logarithmic: whether equal factors are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[Tick, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return where `value` lies, in pixels with one decimal."""
        return _place(value, self.low, self.high, self.start, self.end, self.logarithmic)


def linear_scale(top: float, start: float, end: float, *, num_ticks: int = 5) -> Scale:
    """Return a scale from 0 to a round number at or above `top`.

    >>> [tick.label for tick in linear_scale(3.4, 0, 100).ticks]
    ['0', '1', '2', '3', '4']
    """
    step = _round_step(top / num_ticks) if top > 0 else 1.0
    num_steps = max(1, math.ceil(top / step - 1e-9))
    high = step * num_steps
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple(
        Tick(_place(step * index, 0.0, high, start, end, False), f"{step * index:.{digits}f}")
        for index in range(num_steps + 1)
    )
    return Scale(0.0, high, start, end, ticks)


def log_scale(low: float, high: float, start: float, end: float, labels: dict[float, str]) -> Scale:
    """Return a logarithmic scale that covers both values, with ticks at those of `labels` inside.

    Both must be above 0. The range is widened a little, so that no mark lies on the frame.
    """
    low, high = low / 1.15, high * 1.15
    ticks = tuple(
        Tick(_place(value, low, high, start, end, True), label)
        for value, label in labels.items()
        if low <= value <= high
    )
    return Scale(low, high, start, end, ticks, logarithmic=True)


def category_scale(labels: Sequence[str], start: float, end: float) -> tuple[Tick, ...]:
    """Return evenly spaced places for labels, half a step away from both ends.

    >>> [tick.at for tick in category_scale(["a", "b"], 0, 100)]
    [25.0, 75.0]
    """
    step = (end - start) / len(labels)
    return tuple(Tick(round(start + (index + 0.5) * step, 1), label) for index, label in enumerate(labels))


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until neighbours are `gap` away from each other, as little as is simple.

    Args:
        wanted: places in any order; the result has the same order.
        gap: smallest distance.
        low: no place lies below, unless there are too many for the range.
        high: no place lies above.

    >>> spread([50.0, 50.0, 10.0], 10.0, 0.0, 100.0)
    [45.0, 55.0, 10.0]
    """
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    # Clusters of (centre, members): neighbours that touch merge and are centred on their mean.
    clusters: list[tuple[float, list[int]]] = []
    for index in order:
        clusters.append((wanted[index], [index]))
        while len(clusters) > 1 and _touch(clusters[-2], clusters[-1], gap):
            (left, first), (right, second) = clusters[-2:]
            mean = (left * len(first) + right * len(second)) / (len(first) + len(second))
            clusters[-2:] = [(mean, first + second)]
    places = [0.0] * len(wanted)
    floor = low
    for centre, members in clusters:
        for rank, index in enumerate(members):
            places[index] = max(floor, centre + (rank - (len(members) - 1) / 2) * gap)
            floor = places[index] + gap
    ceiling = high
    for index in reversed(order):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    return [round(place, 1) for place in places]


def _touch(left: tuple[float, list[int]], right: tuple[float, list[int]], gap: float) -> bool:
    return right[0] - left[0] < gap * (len(left[1]) + len(right[1])) / 2


def _round_step(rough: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1.0, 2.0, 5.0):
        if rough <= factor * power * (1 + 1e-9):
            return factor * power
    return 10.0 * power


def _place(value: float, low: float, high: float, start: float, end: float, logarithmic: bool) -> float:
    if logarithmic:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return round(start + (value - low) / (high - low) * (end - start), 1)
