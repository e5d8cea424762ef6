"""How much memory each part of the runtime gets: a pure function from sizes and budgets to slots.

The plan is made once, before anything runs. It tries deeper windows first and settles for shallower
ones; when the shallowest does not fit, it refuses with the numbers. The slots it returns are all the
memory that streaming uses, so a run that was planned cannot run out later.

[Note: slots and progress] Slots are sized by `window_slots`: any `n` neighbouring visits fit one
record to a slot. Records are fetched in the order of their use and a visit waits only for records
whose slots are held by earlier visits, which end without it; so the smallest plan makes progress.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..errors import CapacityError
from ..sizes import align_down, align_up, format_bytes
from ..specs import Tier
from .gradient_homes import GradientHomes, PartLayout, choose_homes
from .records import RecordSet
from .schedule import Pass, Phase, Schedule, first_use_order, window_slots

__all__ = ["MemoryPlan", "plan_memory", "shared_owners", "smallest_plan"]

SLOT_ALIGNMENT_NBYTES = 4096

# Depths tried, deepest first. Three visits ahead hide a fetch behind the visits before it even when
# units alternate between large and small; more only costs memory. Two updates in flight let one be
# written while the next computes.
WINDOWS = (3, 2, 1)
UPDATES_IN_FLIGHT = (2, 1)
STAGING_SLOTS = (4, 3, 2)

# Where parked gradients fill the host budget, so much of it is left to saved inputs unless the user says
# how much: their size depends on the batch, which is not known here.
ACTIVATIONS_SHARE = 8

# A deeper plan is worth so much of the bytes that a step moves to and from the disk: in a model of many units
# it sends one or two gradients more there, and hides the waits that a shallow window has at every unit.
DEPTH_WORTH = 0.05


@dataclass(frozen=True)
class MemoryPlan:
    """The slots of every pool, in bytes, and the depths they allow.

    Attributes:
        home: where the records rest between uses.
        window: visits fetched ahead of the one that runs.
        updates_in_flight: units whose update may be pending while the model goes on.
        host_weights: slots for weights and frozen records on their way to the device.
        host_gradients: slots for gradients waiting for their update; one for each that is parked in host
            memory.
        host_updates: slots for weights under update between passes, when gradients are parked.
        parked_nbytes: host bytes of parked gradients, 0 when updates run during backward; they are part of
            `host_gradients`.
        parked_on_disk: owners whose parked gradients go to disk.
        parked_disk_nbytes: bytes of these; so many are written and read once a step.
        gradient_ring: slots for whole gradients on their way to disk.
        gradient_parts: slots for parts of gradients on their way back.
        staging: slots for chunks of optimizer records.
        host_resident_nbytes: records that live in host memory for the whole run.
        activations_nbytes: what is left of the host budget for saved unit inputs.
        device_weights: slots for weights in the compute dtype.
        device_gradients: slots for gradients of the unit in backward.
        device_reserve_nbytes: device bytes left to the framework for activations and temporaries.
    """

    home: Tier
    window: int
    updates_in_flight: int
    host_weights: tuple[int, ...]
    host_gradients: tuple[int, ...]
    host_updates: tuple[int, ...]
    parked_nbytes: int
    parked_on_disk: tuple[str, ...]
    parked_disk_nbytes: int
    gradient_ring: tuple[int, ...]
    gradient_parts: tuple[int, ...]
    staging: tuple[int, ...]
    host_resident_nbytes: int
    activations_nbytes: int
    device_weights: tuple[int, ...]
    device_gradients: tuple[int, ...]
    device_reserve_nbytes: int

    @property
    def host_nbytes(self) -> int:
        """Bytes of the host arena."""
        slots = (*self.host_weights, *self.host_gradients, *self.host_updates, *self.staging)
        in_transit = (*self.gradient_ring, *self.gradient_parts)
        return _total((*slots, *in_transit)) + self.host_resident_nbytes + self.activations_nbytes

    @property
    def device_nbytes(self) -> int:
        """Bytes of the device arena; the reserve is not part of it."""
        return _total((*self.device_weights, *self.device_gradients))

    def describe_parked(self) -> str:
        """Return a line on where parked gradients wait, empty when none are."""
        if not self.parked_nbytes and not self.parked_on_disk:
            return ""
        memory = f"gradients of a step: {format_bytes(self.parked_nbytes)} parked in host memory"
        if not self.parked_on_disk:
            return memory
        disk = format_bytes(self.parked_disk_nbytes)
        return f"{memory}, {disk} on disk, written and read once a step"


def plan_memory(
    schedule: Schedule,
    records: Mapping[str, RecordSet],
    *,
    trains: Mapping[str, tuple[str, ...]],
    home: Tier,
    host_limit_nbytes: int,
    device_limit_nbytes: int,
    gradient_itemsize: int,
    micro_gradients: bool,
    activations_nbytes: int,
    parks: bool = False,
    parks_on_disk: bool = False,
    fill_activations: bool = False,
) -> MemoryPlan:
    """Return the deepest plan that fits both budgets.

    Parked gradients stay in host memory with the shallowest plan rather than go to disk with a deeper one.
    Once some must go, depth may cost a few more of them; see `DEPTH_WORTH`.

    Args:
        schedule: the predicted order.
        records: the records by owner.
        trains: for each unit, the owners whose gradients its backward adds to.
        home: where records rest; `DEVICE` keeps the optimizer records in host memory.
        host_limit_nbytes: the host budget.
        device_limit_nbytes: the device budget.
        gradient_itemsize: bytes of one gradient element as it crosses to the host.
        micro_gradients: whether micro-batches are summed in a second, wider device buffer.
        activations_nbytes: bytes for saved inputs.
        parks: keep every gradient until the step ends.
        parks_on_disk: gradients that do not fit into host memory may be kept on disk.
        fill_activations: give saved inputs what is left of the host budget as well.

    Raises:
        CapacityError: not even the smallest plan fits.
    """
    reserve = _device_reserve(records)
    plans = [
        _plan_at(
            schedule,
            records,
            trains=trains,
            home=home,
            window=window,
            updates=updates,
            staging=staging,
            gradient_itemsize=gradient_itemsize,
            micro_gradients=micro_gradients,
            activations_nbytes=activations_nbytes,
            parks=parks,
            reserve=reserve,
        )
        for window, updates, staging in _depths(home)
    ]
    fitting = _fitting(plans, host_limit_nbytes, device_limit_nbytes)
    if not fitting and parks and parks_on_disk:
        share = host_limit_nbytes // ACTIVATIONS_SHARE if fill_activations else 0
        plans = [
            _with_gradients_on_disk(
                plan,
                records,
                order=first_use_order(schedule.order, trains),
                shared=shared_owners(trains),
                itemsize=gradient_itemsize,
                host_limit_nbytes=host_limit_nbytes,
                spare_nbytes=max(0, share - plan.activations_nbytes),
            )
            for plan in plans
        ]
        fitting = _fitting(plans, host_limit_nbytes, device_limit_nbytes)
    if not fitting:
        raise CapacityError(_refusal(plans[-1], host_limit_nbytes, device_limit_nbytes))
    plan = _deepest(fitting, records)
    if not fill_activations:
        return plan
    rest = align_down(host_limit_nbytes - plan.host_nbytes, SLOT_ALIGNMENT_NBYTES)
    return replace(plan, activations_nbytes=plan.activations_nbytes + rest)


def smallest_plan(
    schedule: Schedule,
    records: Mapping[str, RecordSet],
    *,
    trains: Mapping[str, tuple[str, ...]],
    home: Tier,
    gradient_itemsize: int,
    micro_gradients: bool,
    activations_nbytes: int,
    parks: bool = False,
    parks_on_disk: bool = False,
) -> MemoryPlan:
    """Return the plan of the least memory: where it does not fit, `plan_memory` refuses.

    Args:
        schedule: and the rest: see `plan_memory`.
    """
    window, updates, staging = list(_depths(home))[-1]
    plan = _plan_at(
        schedule,
        records,
        trains=trains,
        home=home,
        window=window,
        updates=updates,
        staging=staging,
        gradient_itemsize=gradient_itemsize,
        micro_gradients=micro_gradients,
        activations_nbytes=activations_nbytes,
        parks=parks,
        reserve=_device_reserve(records),
    )
    if not (parks and parks_on_disk):
        return plan
    on_disk = _with_gradients_on_disk(
        plan,
        records,
        order=first_use_order(schedule.order, trains),
        shared=shared_owners(trains),
        itemsize=gradient_itemsize,
        host_limit_nbytes=0,
        spare_nbytes=0,
    )
    # Of a few small gradients, the slots that they pass through can be more than they are.
    return min(plan, on_disk, key=lambda one: one.host_nbytes)


def shared_owners(trains: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the owners whose gradients more than one unit adds to.

    >>> shared_owners({"embed": ("embed",), "block": ("block",), "head": ("embed",)})
    ('embed',)
    """
    counts = Counter(owner for owners in trains.values() for owner in owners)
    return tuple(owner for owner, count in counts.items() if count > 1)


def _depths(home: Tier) -> Iterator[tuple[int, int, int]]:
    windows = WINDOWS if home is not Tier.DEVICE else (0,)
    staging = STAGING_SLOTS if home is Tier.DISK else (0,)
    return product(windows, UPDATES_IN_FLIGHT, staging)


def _plan_at(
    schedule: Schedule,
    records: Mapping[str, RecordSet],
    *,
    trains: Mapping[str, tuple[str, ...]],
    home: Tier,
    window: int,
    updates: int,
    staging: int,
    gradient_itemsize: int,
    micro_gradients: bool,
    activations_nbytes: int,
    parks: bool,
    reserve: int,
) -> MemoryPlan:
    visits = schedule.visits(Pass.TRAIN)
    needs = [schedule.needs[visit.unit] for visit in visits]
    backward = [trains[visit.unit] for visit in visits if visit.phase is Phase.BACKWARD]
    gradient = {owner: records[owner].layout.trainable_numel * gradient_itemsize for owner in records}
    # On the device a gradient is fp32 when micro-batches are summed, and has the compute dtype otherwise.
    accumulated = {
        owner: unit.layout.trainable_numel * (4 if micro_gradients else unit.compute_dtype.itemsize)
        + (unit.layout.trainable_numel * unit.compute_dtype.itemsize if micro_gradients else 0)
        for owner, unit in records.items()
    }
    # A gradient that several units add to waits on the host from the first of them to the last.
    shared = sorted(gradient[owner] for owner in shared_owners(trains))
    # Updates during backward take the buffers of the weights over; those between passes have their own.
    host_weights = window_slots(
        [{owner: records[owner].host_nbytes for owner in owners} for owners in needs],
        window + 1 + (0 if parks else updates),
    )
    device_weights = window_slots(
        [{owner: records[owner].device_nbytes for owner in owners} for owners in needs], window + 1
    )
    host_gradients = (*window_slots(_sizes(gradient, backward), updates), *shared)
    host_updates: tuple[int, ...] = ()
    if parks:
        host_gradients = tuple(gradient.values())
        host_updates = window_slots(
            _sizes({owner: records[owner].host_nbytes for owner in records}, backward), updates
        )
    # A record of one chunk may be shorter than a full one.
    chunk_nbytes = max(
        (min(unit.format.chunk_nbytes, unit.optimizer_nbytes) for unit in records.values()), default=0
    )
    resident = 0
    if home is not Tier.DISK:
        resident = sum(align_up(unit.host_nbytes, 4096) + unit.optimizer_nbytes for unit in records.values())
        host_weights = ()
        host_updates = ()
    if home is Tier.DEVICE:
        device_weights = tuple(unit.device_nbytes for unit in records.values())
    return MemoryPlan(
        home=home,
        window=window,
        updates_in_flight=updates,
        host_weights=_rounded(host_weights),
        host_gradients=_rounded(host_gradients),
        host_updates=_rounded(host_updates),
        parked_nbytes=_total(_rounded(host_gradients)) if parks else 0,
        parked_on_disk=(),
        parked_disk_nbytes=0,
        gradient_ring=(),
        gradient_parts=(),
        staging=_rounded((chunk_nbytes,) * staging),
        host_resident_nbytes=resident,
        activations_nbytes=align_up(activations_nbytes, SLOT_ALIGNMENT_NBYTES),
        device_weights=_rounded(device_weights),
        device_gradients=_rounded(window_slots(_sizes(accumulated, backward), 1)),
        device_reserve_nbytes=reserve,
    )


def _fitting(plans: Sequence[MemoryPlan], host_limit: int, device_limit: int) -> list[MemoryPlan]:
    return [
        plan
        for plan in plans
        if plan.host_nbytes <= host_limit and plan.device_nbytes + plan.device_reserve_nbytes <= device_limit
    ]


def _deepest(plans: Sequence[MemoryPlan], records: Mapping[str, RecordSet]) -> MemoryPlan:
    """Return the first of `plans` that does not send too many gradients to disk."""
    # Weights are read twice and written once, optimizer records once each; a gradient once each as well.
    step_nbytes = sum(3 * unit.weights_nbytes + 2 * unit.optimizer_nbytes for unit in records.values())
    most = min(plan.parked_disk_nbytes for plan in plans) + DEPTH_WORTH * step_nbytes / 2
    return next(plan for plan in plans if plan.parked_disk_nbytes <= most)


def _with_gradients_on_disk(
    plan: MemoryPlan,
    records: Mapping[str, RecordSet],
    *,
    order: tuple[str, ...],
    shared: tuple[str, ...],
    itemsize: int,
    host_limit_nbytes: int,
    spare_nbytes: int,
) -> MemoryPlan:
    """Return `plan` with as many of its parked gradients on disk as must be, or all when that is too few."""
    trained = {owner: unit for owner, unit in records.items() if unit.layout.trainable}
    numel = {owner: unit.layout.trainable_numel for owner, unit in trained.items()}
    sizes = {owner: align_up(count * itemsize, SLOT_ALIGNMENT_NBYTES) for owner, count in numel.items()}
    part_nbytes = max(
        (
            PartLayout(unit.format.chunk_numel, itemsize).max_part_nbytes(numel[owner])
            for owner, unit in trained.items()
        ),
        default=0,
    )
    # A part more than is computed is being read; with residents nothing else says how many.
    parts = (part_nbytes,) * max(len(plan.staging) - 1, plan.updates_in_flight)
    without = replace(plan, host_gradients=(), parked_nbytes=0)
    capacity = host_limit_nbytes - without.host_nbytes
    ring = plan.updates_in_flight
    homes = (
        choose_homes(
            sizes, order=order, shared=shared, capacity_nbytes=capacity - spare, ring=ring, parts=parts
        )
        for spare in dict.fromkeys((spare_nbytes, 0))
    )
    none = GradientHomes((), tuple(sizes), (max(sizes.values(), default=0),) * ring, parts)
    chosen = next((found for found in homes if found is not None), none)
    host = tuple(sizes[owner] for owner in chosen.host)
    return replace(
        plan,
        host_gradients=host,
        parked_nbytes=_total(host),
        parked_on_disk=chosen.disk,
        parked_disk_nbytes=sum(sizes[owner] for owner in chosen.disk),
        gradient_ring=chosen.ring,
        gradient_parts=chosen.parts,
    )


def _sizes(nbytes: Mapping[str, int], visits: list[tuple[str, ...]]) -> list[dict[str, int]]:
    return [{owner: nbytes[owner] for owner in owners} for owners in visits if owners]


def _device_reserve(records: Mapping[str, RecordSet]) -> int:
    """Return the bytes autograd needs beside the arena: the gradient of the largest parameter."""
    return max(
        (
            spec.numel * unit.compute_dtype.itemsize
            for unit in records.values()
            for spec in unit.layout.trainable
        ),
        default=0,
    )


def _rounded(slots: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(align_up(nbytes, SLOT_ALIGNMENT_NBYTES) for nbytes in slots if nbytes)


def _total(slots: tuple[int, ...]) -> int:
    return sum(slots)


def _refusal(plan: MemoryPlan, host_limit: int, device_limit: int) -> str:
    host = {
        "weights": _total(plan.host_weights),
        "weights under update": _total(plan.host_updates),
        "gradients": _total(plan.host_gradients) - plan.parked_nbytes,
        "parked gradients": plan.parked_nbytes,
        "gradients on their way to disk and back": _total((*plan.gradient_ring, *plan.gradient_parts)),
        "optimizer chunks": _total(plan.staging),
        "resident records": plan.host_resident_nbytes,
        "saved inputs": plan.activations_nbytes,
    }
    device = {
        "weights": _total(plan.device_weights),
        "gradients": _total(plan.device_gradients),
        "temporaries": plan.device_reserve_nbytes,
    }
    lines = ["the smallest plan does not fit:"]
    for knob, parts, limit in (("host_memory", host, host_limit), ("device_memory", device, device_limit)):
        needed = sum(parts.values())
        if needed > limit:
            listing = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items() if nbytes)
            lines.append(
                f"  {knob}: needs {format_bytes(needed)} ({listing}), the budget is {format_bytes(limit)};"
                f" set {knob} to at least {needed} bytes"
            )
    if sum(host.values()) > host_limit and (plan.parked_nbytes or plan.parked_on_disk):
        lines.append(_refusal_of_parking(plan))
    return "\n".join(lines)


def _refusal_of_parking(plan: MemoryPlan) -> str:
    knobs = (
        "max_grad_norm=None and park_gradients=False need none, gradient_dtype='bfloat16' needs 2 bytes"
        " per trainable parameter"
    )
    if plan.parked_on_disk:
        return (
            f"  all {plan.parked_disk_nbytes} bytes of gradients kept until the step ends are on disk in this"
            f" plan, and pass through {_total((*plan.gradient_ring, *plan.gradient_parts))} of these bytes:"
            f" {knobs}"
        )
    return f"  of these, {plan.parked_nbytes} bytes are gradients kept until the step ends: {knobs}"
