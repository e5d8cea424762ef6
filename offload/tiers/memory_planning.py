"""Makes the memory plan of a run from sizes and budgets: a pure function.

It tries deeper windows first and settles for shallower ones; when the shallowest does not fit, it refuses
with the numbers.

[Note: slots and progress] Slots are sized by `window_slots`: any `n` neighbouring visits fit one
record to a slot. Records are fetched in the order of their use and a visit waits only for records
whose slots are held by earlier visits, which end without it; so the smallest plan makes progress.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..errors import CapacityError
from ..sizes import align_down, align_up
from ..specs import Tier
from .fetches import count_fetches
from .gradient_homes import GradientHomes, PartLayout, choose_homes
from .host_cache import choose_cached
from .memory_plan import MemoryPlan
from .memory_refusal import refusal_text
from .memory_request import MemoryRequest
from .records import RecordSet
from .residency import Residency
from .schedule import Pass, Phase, window_slots

__all__ = ["plan_memory", "smallest_plan"]

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


@dataclass(frozen=True, slots=True)
class _Depth:
    """How far a plan works ahead: visits fetched, updates in flight, staging slots."""

    window: int
    updates: int
    staging: int


def plan_memory(
    request: MemoryRequest,
    *,
    host_limit_nbytes: int,
    device_limit_nbytes: int,
    fill_activations: bool = False,
) -> MemoryPlan:
    """Return the deepest plan that fits both budgets.

    Parked gradients stay in host memory with the shallowest plan rather than go to disk with a deeper one.
    Once some must go, depth may cost a few more of them; see `DEPTH_WORTH`.

    Args:
        request: what is asked for.
        host_limit_nbytes: the host budget.
        device_limit_nbytes: the device budget.
        fill_activations: give saved inputs what is left of the host budget as well.

    Raises:
        CapacityError: not even the smallest plan fits.
    """
    plans: list[MemoryPlan] = []
    fitting: list[MemoryPlan] = []
    for depth, residency in _depths(request):
        plans.append(_plan_at(request, depth, residency))
        fitting = _fitting(plans[-1:], host_limit_nbytes, device_limit_nbytes)
        if fitting:
            break  # With no gradient on disk it is the one; shallower plans need not be made.
    if not fitting and request.parks and request.parks_on_disk:
        share = host_limit_nbytes // ACTIVATIONS_SHARE if fill_activations else 0
        plans = [
            _with_gradients_on_disk(
                plan,
                request,
                host_limit_nbytes=host_limit_nbytes,
                spare_nbytes=max(0, share - plan.activations_nbytes),
            )
            for plan in plans
        ]
        fitting = _fitting(plans, host_limit_nbytes, device_limit_nbytes)
    if not fitting:
        raise CapacityError(refusal_text(plans[-1], host_limit_nbytes, device_limit_nbytes))
    plan = _deepest(fitting, request.records)
    if not fill_activations:
        return plan
    rest = align_down(host_limit_nbytes - plan.host_nbytes, SLOT_ALIGNMENT_NBYTES)
    return replace(plan, activations_nbytes=plan.activations_nbytes + rest)


def smallest_plan(request: MemoryRequest) -> MemoryPlan:
    """Return the plan of the least memory: where it does not fit, `plan_memory` refuses."""
    plan = _plan_at(request, *list(_depths(request))[-1])
    if not (request.parks and request.parks_on_disk):
        return plan
    on_disk = _with_gradients_on_disk(plan, request, host_limit_nbytes=0, spare_nbytes=0)
    # Of a few small gradients, the slots that they pass through can be more than they are.
    return min(plan, on_disk, key=lambda one: one.host_nbytes)


def _depths(request: MemoryRequest) -> Iterator[tuple[_Depth, Residency]]:
    """Yield the depths to try, deepest first, each with the records that are in host memory at it."""
    for window in WINDOWS if request.home is not Tier.DEVICE else (0,):
        residency = _residency(request, window)
        for updates, staging in product(
            UPDATES_IN_FLIGHT, STAGING_SLOTS if request.home is Tier.DISK else (0,)
        ):
            yield _Depth(window, updates, staging), residency


def _residency(request: MemoryRequest, window: int) -> Residency:
    if request.home is not Tier.DISK:
        return Residency.whole(request.records)
    if not request.host_cache_nbytes:
        return Residency()
    order = request.schedule.order
    used = dict.fromkeys(owner for unit in order for owner in request.schedule.needs[unit])
    return choose_cached(
        request.records,
        count_fetches(request.schedule, request.trains, window=window, stays=False, parks=request.parks),
        order=tuple(dict.fromkeys((*used, *request.records))),
        parks=request.parks,
        capacity_nbytes=request.host_cache_nbytes,
    )


def _plan_at(request: MemoryRequest, depth: _Depth, residency: Residency) -> MemoryPlan:
    records, parks = request.records, request.parks
    visits = request.schedule.visits(Pass.TRAIN)
    needs = [request.schedule.needs[visit.unit] for visit in visits]
    backward = [request.trains[visit.unit] for visit in visits if visit.phase is Phase.BACKWARD]
    # What lives in host memory passes through no slot there.
    host_nbytes = {
        owner: unit.host_nbytes for owner, unit in records.items() if owner not in residency.weights
    }
    device_nbytes = {owner: unit.device_nbytes for owner, unit in records.items()}
    # Updates during backward take the buffers of the weights over; those between passes have their own.
    host_window = depth.window + 1 + (0 if parks else depth.updates)
    device_weights = window_slots(_sizes(device_nbytes, needs), depth.window + 1)
    if request.home is Tier.DEVICE:
        device_weights = tuple(device_nbytes.values())
    host_gradients = _rounded(_gradient_slots(request, backward, depth.updates))
    accumulated = _accumulated_nbytes(request)
    return MemoryPlan(
        home=request.home,
        window=depth.window,
        updates_in_flight=depth.updates,
        host_weights=_rounded(window_slots(_sizes(host_nbytes, needs), host_window)),
        host_gradients=host_gradients,
        host_updates=_rounded(window_slots(_sizes(host_nbytes, backward), depth.updates) if parks else ()),
        parked_nbytes=sum(host_gradients) if parks else 0,
        parked_on_disk=(),
        parked_disk_nbytes=0,
        gradient_ring=(),
        gradient_parts=(),
        staging=_rounded((_chunk_nbytes(records, residency),) * depth.staging),
        residency=residency,
        host_resident_nbytes=residency.nbytes(records),
        activations_nbytes=align_up(request.activations_nbytes, SLOT_ALIGNMENT_NBYTES),
        device_weights=_rounded(device_weights),
        device_gradients=_rounded(window_slots(_sizes(accumulated, backward), 1)),
        device_reserve_nbytes=_device_reserve(request),
    )


def _gradient_slots(request: MemoryRequest, backward: list[tuple[str, ...]], updates: int) -> tuple[int, ...]:
    """Return slots for gradients on the host: all that are parked, else those that wait for an update."""
    gradient = {
        owner: unit.layout.trainable_numel * request.gradient_itemsize
        for owner, unit in request.records.items()
    }
    if request.parks:
        return tuple(gradient.values())
    # A gradient that several units add to waits on the host from the first of them to the last.
    shared = sorted(gradient[owner] for owner in request.shared)
    return (*window_slots(_sizes(gradient, backward), updates), *shared)


def _accumulated_nbytes(request: MemoryRequest) -> dict[str, int]:
    """Return the device bytes of each gradient: in fp32 as well when it is a sum in another dtype."""

    def itemsize(owner: str, own: int) -> int:
        summed = request.micro_gradients or (owner in request.chunked and own < 4)
        return own + (4 if summed else 0)

    return {
        owner: unit.layout.trainable_numel * itemsize(owner, unit.compute_dtype.itemsize)
        for owner, unit in request.records.items()
    }


def _chunk_nbytes(records: Mapping[str, RecordSet], residency: Residency) -> int:
    """Return the bytes of the largest optimizer chunk on disk; the only one of a record may be short."""
    return max(
        (
            unit.chunks[residency.chunks.get(owner, 0)].nbytes
            for owner, unit in records.items()
            if residency.chunks.get(owner, 0) < len(unit.chunks)
        ),
        default=0,
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
    plan: MemoryPlan, request: MemoryRequest, *, host_limit_nbytes: int, spare_nbytes: int
) -> MemoryPlan:
    """Return `plan` with as many of its parked gradients on disk as must be, or all when that is too few."""
    itemsize = request.gradient_itemsize
    trained = {owner: unit for owner, unit in request.records.items() if unit.layout.trainable}
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
            sizes,
            order=request.update_order,
            shared=request.shared,
            capacity_nbytes=capacity - spare,
            ring=ring,
            parts=parts,
        )
        for spare in dict.fromkeys((spare_nbytes, 0))
    )
    none = GradientHomes((), tuple(sizes), (max(sizes.values(), default=0),) * ring, parts)
    chosen = next((found for found in homes if found is not None), none)
    host = tuple(sizes[owner] for owner in chosen.host)
    return replace(
        plan,
        host_gradients=host,
        parked_nbytes=sum(host),
        parked_on_disk=chosen.disk,
        parked_disk_nbytes=sum(sizes[owner] for owner in chosen.disk),
        gradient_ring=chosen.ring,
        gradient_parts=chosen.parts,
    )


def _sizes(nbytes: Mapping[str, int], visits: list[tuple[str, ...]]) -> list[dict[str, int]]:
    """Return for each visit the bytes of those of its records that `nbytes` has."""
    return [{owner: nbytes[owner] for owner in owners if owner in nbytes} for owners in visits if owners]


def _device_reserve(request: MemoryRequest) -> int:
    """Return the bytes autograd needs beside the arena: the largest parameter's gradient, or the loss's."""

    def largest(owners: Iterable[str]) -> int:
        units = [request.records[owner] for owner in owners]
        sizes = (spec.numel * unit.compute_dtype.itemsize for unit in units for spec in unit.layout.trainable)
        return max(sizes, default=0)

    # The head's gradient is computed from that of a chunk's logits, while these still exist.
    return max(largest(request.records), request.chunk_nbytes + largest(request.chunked))


def _rounded(slots: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(align_up(nbytes, SLOT_ALIGNMENT_NBYTES) for nbytes in slots if nbytes)
