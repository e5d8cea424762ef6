"""The bytes that a training step moves over each link, told from its order of visits. Pure.

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

from ..runtime.options import RuntimeOptions
from ..specs import Tier
from ..tiers.gradient_homes import PartLayout
from ..tiers.memory_plan import MemoryPlan
from ..tiers.records import RecordSet
from ..tiers.schedule import Pass, Phase, Schedule, completion_order
from .inputs import SavedInputs

__all__ = ["Fetches", "Traffic", "count_fetches", "step_traffic"]

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


@dataclass(frozen=True)
class Traffic:
    """Bytes of one optimizer step, by link.

    Attributes:
        disk_read_nbytes: as `RuntimeStats` counts them.
        least_disk_read_nbytes: where no updated record is read again.
        most_disk_read_nbytes: where every updated record is.
        disk_written_nbytes: the same, with the share of a step where commits are several steps apart.
        commit_nbytes: written by one commit, where the home is not the disk; 0 where it is.
        spilled_nbytes: of those read, and of those written, inputs of units that memory does not hold.
        parked_nbytes: of those read, and of those written, gradients parked on disk.
        to_device_nbytes: weights, partial gradients and saved inputs.
        to_host_nbytes: gradients and saved inputs.
        saved_inputs_nbytes: of each of these two, inputs of units kept from forward to backward.
        update_nbytes: that AdamW reads and writes in host memory.
    """

    disk_read_nbytes: int
    least_disk_read_nbytes: int
    most_disk_read_nbytes: int
    disk_written_nbytes: int
    commit_nbytes: int
    spilled_nbytes: int
    parked_nbytes: int
    to_device_nbytes: int
    to_host_nbytes: int
    saved_inputs_nbytes: int
    update_nbytes: int

    @property
    def host_memory_nbytes(self) -> int:
        """Bytes that host memory takes in or gives out, for every link that ends there."""
        disk = self.disk_read_nbytes + self.disk_written_nbytes
        return disk + self.to_device_nbytes + self.to_host_nbytes + self.update_nbytes


def step_traffic(
    schedule: Schedule,
    records: Mapping[str, RecordSet],
    trains: Mapping[str, tuple[str, ...]],
    options: RuntimeOptions,
    plan: MemoryPlan,
    saved: SavedInputs,
) -> Traffic:
    """Return what a step moves when `plan` is carried out.

    Args:
        schedule: the order of visits, wrapping as the runtime's does.
        records: by owner.
        trains: for each unit, the owners whose gradients its backward adds to.
        options: of the run.
        plan: its memory.
        saved: inputs of units that the batch saves.
    """
    fetches = count_fetches(schedule, trains, plan, parks=options.parks)
    fetched = sum(count * records[owner].host_nbytes for owner, count in fetches.all.items())
    handed_over = sum(count * records[owner].host_nbytes for owner, count in fetches.handed_over.items())
    trained = {owner: unit for owner, unit in records.items() if unit.layout.trainable}
    weights = sum(unit.weights_nbytes for unit in trained.values())
    optimizer = sum(unit.optimizer_nbytes for unit in trained.values())
    itemsize = options.torch_gradient_dtype.itemsize
    gradients = {owner: unit.layout.trainable_numel * itemsize for owner, unit in trained.items()}
    visits = Counter(owner for unit in schedule.order for owner in trains[unit])
    parked_read, parked_written = _parked(trained, visits, options, plan)
    spilled = sum(saved.on_disk(plan.activations_nbytes))
    read = written = commit = kept = 0
    if plan.home is Tier.DISK:
        # Between passes an update reads the weights itself, and what is frozen with them.
        own_reads = sum(unit.host_nbytes for unit in trained.values()) if options.parks else 0
        read, written = optimizer + fetched + own_reads, optimizer + weights
        # Each is fetched once behind its update.
        kept = sum(unit.host_nbytes for unit in trained.values())
    elif options.disk:
        commit, handed_over = optimizer + weights, 0
        written = commit // options.save_steps if options.commit else 0
    else:
        handed_over = 0
    # Every visit behind the first that adds to a gradient brings the sum so far back to the device.
    again = sum((count - 1) * gradients[owner] for owner, count in visits.items())
    return Traffic(
        disk_read_nbytes=read - handed_over + parked_read + spilled,
        least_disk_read_nbytes=read - kept + parked_read + spilled,
        most_disk_read_nbytes=read + parked_read + spilled,
        disk_written_nbytes=written + parked_written + spilled,
        commit_nbytes=commit,
        spilled_nbytes=spilled,
        parked_nbytes=max(parked_read, parked_written),
        to_device_nbytes=fetched + again + saved.nbytes,
        to_host_nbytes=sum(gradients.values()) + again + saved.nbytes,
        saved_inputs_nbytes=saved.nbytes,
        update_nbytes=sum(gradients.values()) + 2 * (weights + optimizer),
    )


def count_fetches(
    schedule: Schedule, trains: Mapping[str, tuple[str, ...]], plan: MemoryPlan, *, parks: bool
) -> Fetches:
    """Return how often each record is fetched in a step; see [Note: which fetches are counted]."""
    last = {unit: tuple(owners) for unit, owners in _completes(schedule, trains).items()}
    trained = {owner for owners in trains.values() for owner in owners}
    stays = plan.home is Tier.DEVICE
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
            near = schedule.upcoming_records(position, Pass.TRAIN, plan.window)
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


def _parked(
    trained: Mapping[str, RecordSet], visits: Mapping[str, int], options: RuntimeOptions, plan: MemoryPlan
) -> tuple[int, int]:
    """Return the bytes of gradients read from and written to disk."""
    layout = PartLayout(options.chunk_numel, options.torch_gradient_dtype.itemsize)
    read = written = 0
    for owner in plan.parked_on_disk:
        unit = trained[owner]
        numel = unit.layout.trainable_numel
        nbytes = layout.record_nbytes(numel)
        written += visits[owner] * nbytes
        read += (visits[owner] - 1) * nbytes
        read += sum(
            layout.part(chunk.start, chunk.stop, numel)[1] for chunk in unit.format.optimizer_chunks(numel)
        )
    return read, written
