"""The bytes that a training step moves over each link, told from its order of visits and records' homes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..runtime.options import RuntimeOptions
from ..specs import Tier
from ..tiers.fetches import Fetches, count_fetches
from ..tiers.gradient_homes import PartLayout
from ..tiers.memory_plan import MemoryPlan
from ..tiers.records import RecordSet
from ..tiers.schedule import Schedule
from .inputs import SavedInputs

__all__ = ["Traffic", "step_traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one optimizer step, by link.

    Attributes:
        disk_read_nbytes: as `RuntimeStats` counts them; see [Note: which fetches are counted].
        least_disk_read_nbytes: where no updated record is read again.
        most_disk_read_nbytes: where every updated record is.
        disk_written_nbytes: the same, with the share of a step where commits are several steps apart.
        commit_nbytes: that a commit writes of records in host memory; 0 where all are on disk.
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
    stays = plan.home is Tier.DEVICE
    fetches = count_fetches(schedule, trains, window=plan.window, stays=stays, parks=options.parks)
    fetched = sum(count * records[owner].host_nbytes for owner, count in fetches.all.items())
    trained = {owner: unit for owner, unit in records.items() if unit.layout.trainable}
    itemsize = options.torch_gradient_dtype.itemsize
    gradients = {owner: unit.layout.trainable_numel * itemsize for owner, unit in trained.items()}
    visits = Counter(owner for unit in schedule.order for owner in trains[unit])
    parked_read, parked_written = _parked(trained, visits, options, plan)
    disk = _disk_traffic(fetches, records, options, plan)
    commit = plan.residency.mutable_nbytes(records) if options.disk else 0
    committed = commit // options.save_steps if options.commit else 0
    spilled = sum(saved.on_disk(plan.activations_nbytes))
    # Every visit behind the first that adds to a gradient brings the sum so far back to the device.
    again = sum((count - 1) * gradients[owner] for owner, count in visits.items())
    return Traffic(
        disk_read_nbytes=disk.read - disk.handed_over + parked_read + spilled,
        least_disk_read_nbytes=disk.read - disk.kept + parked_read + spilled,
        most_disk_read_nbytes=disk.read + parked_read + spilled,
        disk_written_nbytes=disk.written + committed + parked_written + spilled,
        commit_nbytes=commit,
        spilled_nbytes=spilled,
        parked_nbytes=max(parked_read, parked_written),
        to_device_nbytes=fetched + again + saved.nbytes,
        to_host_nbytes=sum(gradients.values()) + again + saved.nbytes,
        saved_inputs_nbytes=saved.nbytes,
        update_nbytes=sum(gradients.values())
        + 2 * sum(unit.weights_nbytes + unit.optimizer_nbytes for unit in trained.values()),
    )


@dataclass(frozen=True, slots=True)
class _DiskTraffic:
    """Bytes of the records on disk: read at most, of these saved at best and as expected, and written."""

    read: int
    kept: int
    handed_over: int
    written: int


def _disk_traffic(
    fetches: Fetches, records: Mapping[str, RecordSet], options: RuntimeOptions, plan: MemoryPlan
) -> _DiskTraffic:
    residency = plan.residency
    weights = {owner: unit for owner, unit in records.items() if owner not in residency.weights}
    trained = [unit for unit in weights.values() if unit.layout.trainable]
    optimizer = sum(unit.optimizer_nbytes - residency.optimizer_nbytes(unit) for unit in records.values())
    fetched = sum(fetches.all.get(owner, 0) * unit.host_nbytes for owner, unit in weights.items())
    once = sum(unit.host_nbytes for unit in trained)
    return _DiskTraffic(
        # Between passes an update reads the weights itself, and what is frozen with them.
        read=optimizer + fetched + (once if options.parks else 0),
        # Each is fetched once behind its update.
        kept=once,
        handed_over=sum(
            fetches.handed_over.get(owner, 0) * unit.host_nbytes for owner, unit in weights.items()
        ),
        written=optimizer + sum(unit.weights_nbytes for unit in trained),
    )


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
