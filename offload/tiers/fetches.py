"""How often a training step brings each record to the device, told from its order of visits. Pure.

[Note: which fetches are counted] `Transfer` fetches what the next `window` visits need and lets go of what
they do not, so how often a record is fetched follows from the order of visits alone; the walk here makes
the same decisions and counts those of a later step, when what the step before left is there. A record
that was updated is fetched again. It comes from the update's buffer, not from disk, when it is wanted before
its update is done. Expected is that of the units wanted within the window as their backward ends (the first
ones, at the turn to the next step) and, with gradients that are parked, of all, since the forward then waits
for updates. How far updates lag decides it for the others, so there are bounds: `least_disk_read_nbytes` when
all are handed over, `most_disk_read_nbytes` when none is (a forward so slow that parked updates run ahead).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .schedule import Pass, Phase, Schedule, completion_order

__all__ = ["Fetches", "count_fetches"]

# The first pass begins with nothing fetched; from the second on each is like the one before.
_PASSES = 3


@dataclass(frozen=True)
class Fetches:
    """How often a step brings each record to the device.

    Attributes:
        all: by owner, from wherever it is.
        handed_over: by owner, of these, straight from the buffer of its update.
    """

    all: Mapping[str, int]
    handed_over: Mapping[str, int]


def count_fetches(
    schedule: Schedule, trains: Mapping[str, tuple[str, ...]], *, window: int, stays: bool, parks: bool
) -> Fetches:
    """Return how often each record is fetched in a step; see [Note: which fetches are counted].

    Args:
        schedule: the order of visits.
        trains: for each unit, the owners whose gradients its backward adds to.
        window: visits fetched ahead.
        stays: whether what was fetched stays on the device.
        parks: whether records are updated between passes.
    """
    last = {unit: tuple(owners) for unit, owners in _completes(schedule, trains).items()}
    trained = {owner for owners in trains.values() for owner in owners}
    held: set[str] = set()
    updated: set[str] = set()
    fetched: Counter[str] = Counter()
    handed_over: Counter[str] = Counter()
    for step in range(_PASSES):
        if parks:
            # What was fetched ahead is dropped, and every trained record is under update.
            held = held - trained if stays else set()
            updated = trained if step else set()
        if step == _PASSES - 1:
            fetched.clear()
            handed_over.clear()
        for position, visit in enumerate(schedule.visits(Pass.TRAIN)):
            needs = schedule.needs[visit.unit]
            near = schedule.upcoming_records(position, Pass.TRAIN, window)
            missing = [owner for owner in dict.fromkeys((*needs, *near)) if owner not in held]
            for owner in missing:
                fetched[owner] += 1
                if owner in updated:
                    handed_over[owner] += 1
            updated = updated.difference(missing)
            held = held.union(missing) if stays else {*needs, *near}
            if visit.phase is Phase.BACKWARD and not parks:
                held = held.difference(last[visit.unit])
                updated |= {owner for owner in last[visit.unit] if owner in near}
    return Fetches(dict(fetched), dict(handed_over))


def _completes(schedule: Schedule, trains: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Return for each unit the owners whose gradient its backward completes."""
    found: dict[str, list[str]] = {unit: [] for unit in schedule.order}
    for owner in completion_order(schedule.order, trains):
        # Backward is the reverse of the order: the first unit that trains it comes last.
        found[next(unit for unit in schedule.order if owner in trains[unit])].append(owner)
    return found
