"""The order in which units are visited, and what follows from it: pure functions, no I/O, no threads.

A step visits every unit forward, then every unit backward in reverse order. A visit needs one or
more *records* (a unit's own, and those of units whose parameters it borrows), named by their owner.
The order predicts: which records to fetch next, and whether a record is worth keeping because its
next visit is near. It never decides correctness; when a model takes another path, the visits that
really happen are served on demand and the prediction is made anew.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

__all__ = ["Pass", "Phase", "Schedule", "Visit", "completion_order", "first_use_order", "window_slots"]


class Phase(enum.Enum):
    """The direction of a visit."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Pass(enum.Enum):
    """What a forward visit will be followed by: TRAIN goes on to backward, INFER to the next forward."""

    TRAIN = "train"
    INFER = "infer"


@dataclass(frozen=True, slots=True)
class Visit:
    """One unit run once, in one direction."""

    unit: str
    phase: Phase


@dataclass(frozen=True)
class Schedule:
    """The predicted visits of a pass, repeated for ever.

    Attributes:
        order: unit names in the order of their forward visits; a unit called twice stands twice.
        needs: for each unit, the owners of the records it needs.
        wraps: whether what the next pass needs may be fetched before a training pass is over. Not when
            records are updated between passes: what was fetched before would be thrown away.
    """

    order: tuple[str, ...]
    needs: Mapping[str, tuple[str, ...]]
    wraps: bool = True

    def visits(self, kind: Pass) -> tuple[Visit, ...]:
        """Return the visits of one pass."""
        return self._train if kind is Pass.TRAIN else self._infer

    @cached_property
    def _infer(self) -> tuple[Visit, ...]:
        return tuple(Visit(unit, Phase.FORWARD) for unit in self.order)

    @cached_property
    def _train(self) -> tuple[Visit, ...]:
        return self._infer + tuple(Visit(unit, Phase.BACKWARD) for unit in reversed(self.order))

    def locate(self, visit: Visit, after: int, kind: Pass) -> int | None:
        """Return the position of the first `visit` behind position `after`, wrapping around.

        Args:
            after: position of the visit before, -1 at the start of a pass.

        Returns:
            A position in `visits(kind)`, or None when the pass has no such visit.
        """
        visits = self.visits(kind)
        for step in range(1, len(visits) + 1):
            position = (after + step) % len(visits)
            if visits[position] == visit:
                return position
        return None

    def ahead(self, position: int, kind: Pass) -> Iterator[Visit]:
        """Yield the visits that follow `position`: the rest of this pass, then the next one if it `wraps`."""
        visits = self.visits(kind)
        return chain(visits[position + 1 :], visits if self.wraps or kind is Pass.INFER else ())

    def upcoming_records(self, position: int, kind: Pass, window: int) -> tuple[str, ...]:
        """Return the records that the next `window` visits need, soonest first, each once."""
        near = islice(self.ahead(position, kind), window)
        return tuple(dict.fromkeys(owner for visit in near for owner in self.needs[visit.unit]))

    def visits_until_use(self, owner: str, position: int, kind: Pass) -> int | None:
        """Return how many visits lie before the next one that needs `owner`, or None if none does.

        A record that was updated in between is another matter: an updated record is fetched anew.
        """
        for distance, visit in enumerate(self.ahead(position, kind)):
            if owner in self.needs[visit.unit]:
                return distance
        return None


def window_slots(sizes: Sequence[Mapping[str, int]], length: int) -> tuple[int, ...]:
    """Return buffer sizes, largest first, such that any `length` neighbouring visits fit at once.

    The i-th slot is as large as the i-th largest record of any window, so a window's records fit
    one to a slot. The visits are taken to repeat.

    Args:
        sizes: for each visit in order, the bytes of each record it needs, by owner.
        length: neighbouring visits that must fit together, at least 1.

    >>> window_slots([{"a": 5}, {"b": 3}, {"c": 3}], 2)
    (5, 3)
    """
    slots: list[int] = []
    count = len(sizes)
    for start in range(count):
        window: dict[str, int] = {}
        for step in range(min(length, count)):
            window.update(sizes[(start + step) % count])
        slots = _elementwise_max(slots, sorted(window.values(), reverse=True))
    return tuple(slots)


def completion_order(order: tuple[str, ...], trained: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the owners in the order in which backward completes their gradients.

    >>> completion_order(("embed", "block", "head"), {"embed": ("embed",), "block": ("block",),
    ...                                               "head": ("embed",)})
    ('block', 'embed')
    """
    last: dict[str, None] = {}
    for unit in reversed(order):
        for owner in trained[unit]:
            last.pop(owner, None)
            last[owner] = None
    return tuple(last)


def first_use_order(order: tuple[str, ...], trained: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the owners of trained records in the order in which forward needs them.

    >>> first_use_order(("embed", "block", "head"), {"embed": ("embed",), "block": ("block",),
    ...                                              "head": ("embed",)})
    ('embed', 'block')
    """
    return tuple(dict.fromkeys(owner for unit in order for owner in trained[unit]))


def _elementwise_max(left: Iterable[int], right: Iterable[int]) -> list[int]:
    first, second = list(left), list(right)
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    return [max(size, shorter[index]) if index < len(shorter) else size for index, size in enumerate(longer)]
