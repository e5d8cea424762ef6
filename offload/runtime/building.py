"""Makes the parts of a runtime, each once, and wires them to each other.

Each part is undone when one behind it cannot be made; once all are made, the runtime closes what
`Parts.closers` lists. No decision is made here: `memory_planning.py` has planned the memory already.

Thread rule: one thread; the parts that have threads of their own start them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..buffers import Arena, Budget, Pool
from ..device import Device, DeviceArena
from ..machine import DriveSpeed
from ..optim.arrivals import Arrivals
from ..optim.gradient_parts import GradientParts
from ..optim.updater import Updater
from ..specs import Tier
from ..store import Store
from ..store.scratch import Scratch
from ..tiers.activations import Activations
from ..tiers.disk_gradients import DiskGradients
from ..tiers.gradient_homes import PartLayout
from ..tiers.gradients import Gradients
from ..tiers.masters import Masters
from ..tiers.memory_plan import MemoryPlan
from ..tiers.memory_request import shared_owners
from ..tiers.residents import ResidentRecords
from ..tiers.schedule import completion_order, first_use_order
from ..tiers.spill import Spill
from ..tiers.transfer import Transfer
from ..trace import Tracer
from .blueprint import Blueprint
from .parts import Committed, Opened, Parts
from .resume_point import count_in
from .rng import DeviceRng
from .storage import OpenRun, create_run, open_scratch, open_spill_scratch

__all__ = ["build_parts"]


def build_parts(
    blueprint: Blueprint,
    device: Device,
    plan: MemoryPlan,
    run: OpenRun | None,
    trace: Tracer,
    opened: Opened,
) -> Parts:
    """Create a new run, reserve the memory of `plan`, start the threads, and return the parts.

    Args:
        blueprint: what is built.
        device: open.
        plan: made for `blueprint` and `device`.
        run: that goes on; None where a new one begins.
        trace: records spans and counters.
        opened: closes what was made when something behind it fails.

    Raises:
        StorageError: a directory cannot be used, or the drives have too little room.
        CapacityError: the memory of the plan is not to be had.
    """
    undo = opened.undo
    base = _lay_base(blueprint, device, plan, run or create_run(blueprint, opened.own), trace, opened.own)
    transfer = _transfer(base)
    undo.callback(transfer.close)
    store = base.store
    progress = Committed(0 if store is None else _step_of(store), 0 if store is None else store.generation)
    disk_gradients = _disk_gradients(base)
    arrivals = Arrivals(
        tensors={owner: record.layout.trainable for owner, record in blueprint.records.items()},
        host=base.host,
        disk=disk_gradients,
        num_threads=base.num_threads,
        on_error=transfer.fail,
        trace=trace,
    )
    undo.callback(arrivals.close)
    updater = _updater(base, transfer, disk_gradients, progress)
    undo.callback(updater.close)
    return Parts(
        model=blueprint.model,
        options=blueprint.options,
        units=blueprint.units,
        records=blueprint.records,
        plan=plan,
        schedule=blueprint.schedule,
        transfer=transfer,
        gradients=_gradients(base, disk_gradients),
        activations=base.activations,
        updater=updater,
        arrivals=arrivals,
        disk_gradients=disk_gradients,
        masters=Masters(
            host=base.host,
            host_pool=base.host_weights,
            staging=base.staging,
            store=store,
            residents=base.residents,
        ),
        store=store,
        drive_speeds=base.drive_speeds,
        residents=base.residents,
        host_budget=base.host_budget,
        device_budget=device.budget,
        rng=DeviceRng(device.torch_device),
        trace=trace,
        progress=progress,
        closers=opened.closers,
    )


@dataclass(frozen=True, kw_only=True)
class _Base:
    """What the parts stand on: drives, memory, and the slots that more than one of them uses."""

    blueprint: Blueprint
    device: Device
    plan: MemoryPlan
    trace: Tracer
    store: Store | None
    drive_speeds: Mapping[str, DriveSpeed]
    scratch: Scratch | None
    host_budget: Budget
    host: Arena
    device_arena: DeviceArena
    residents: ResidentRecords
    host_weights: Pool | None
    staging: Pool | None
    activations: Activations

    @property
    def num_threads(self) -> int:
        """Threads of an update; the other half of torch's compute meanwhile."""
        return self.blueprint.options.optimizer.num_threads or max(1, torch.get_num_threads() // 2)

    def pool(self, name: str, slots: tuple[int, ...]) -> Pool | None:
        """Carve a pool of host memory; None when it would have no slot."""
        return self.host.pool(name, slots) if slots else None


def _lay_base(
    blueprint: Blueprint,
    device: Device,
    plan: MemoryPlan,
    run: OpenRun,
    trace: Tracer,
    own: Callable[[Any], Any],
) -> _Base:
    store = run.store
    scratch = open_scratch(blueprint, plan, store, own)
    spill_scratch = open_spill_scratch(blueprint.options, store, own)
    host_budget = Budget(Tier.HOST, blueprint.options.host_memory)
    host: Arena = own(device.host_arena(host_budget, plan.host_nbytes))
    device_arena: DeviceArena = own(device.arena(plan.device_nbytes))
    spill = None if spill_scratch is None else Spill(spill_scratch, host, trace)
    return _Base(
        blueprint=blueprint,
        device=device,
        plan=plan,
        trace=trace,
        store=store,
        drive_speeds=run.drive_speeds,
        scratch=scratch,
        host_budget=host_budget,
        host=host,
        device_arena=device_arena,
        residents=ResidentRecords(host, blueprint.records, plan.residency, trace),
        host_weights=host.pool("weights", plan.host_weights) if plan.host_weights else None,
        staging=host.pool("optimizer chunks", plan.staging) if plan.staging else None,
        activations=Activations(
            device, host, host.heap("saved inputs", plan.activations_nbytes), trace, spill
        ),
    )


def _transfer(base: _Base) -> Transfer:
    return Transfer(
        schedule=base.blueprint.schedule,
        records=base.blueprint.records,
        window=base.plan.window,
        device=base.device,
        host=base.host,
        host_pool=base.host_weights,
        device_arena=base.device_arena,
        device_pool=base.device_arena.pool("weights", base.plan.device_weights),
        store=base.store,
        residents=base.residents,
        keep_on_device=base.plan.home is Tier.DEVICE,
        keep_host=not base.blueprint.options.parks,
        trace=base.trace,
    )


def _disk_gradients(base: _Base) -> DiskGradients | None:
    if base.scratch is None:
        return None
    records, options = base.blueprint.records, base.blueprint.options
    return DiskGradients(
        scratch=base.scratch,
        host=base.host,
        ring=base.host.pool("gradients on their way to disk", base.plan.gradient_ring),
        numel={owner: records[owner].layout.trainable_numel for owner in base.plan.parked_on_disk},
        layout=PartLayout(options.chunk_numel, options.torch_gradient_dtype.itemsize),
        trace=base.trace,
    )


def _updater(
    base: _Base, transfer: Transfer, disk_gradients: DiskGradients | None, progress: Committed
) -> Updater:
    blueprint = base.blueprint
    parts = None
    if disk_gradients is not None:
        parts = GradientParts(
            records=blueprint.records,
            disk=disk_gradients,
            itemsize=blueprint.options.torch_gradient_dtype.itemsize,
            host=base.host,
            slots=base.host.pool("parts of gradients", base.plan.gradient_parts),
            trace=base.trace,
        )
    updater = Updater(
        records=blueprint.records,
        host=base.host,
        staging=base.staging,
        weights=base.pool("weights under update", base.plan.host_updates),
        store=base.store,
        residents=base.residents,
        gradient_parts=parts,
        num_threads=base.num_threads,
        on_updated=transfer.end_update,
        on_committed=progress.committed,
        on_error=transfer.fail,
        trace=base.trace,
    )
    predict = first_use_order if blueprint.options.parks else completion_order
    updater.expect(predict(blueprint.schedule.order, blueprint.trains))
    return updater


def _gradients(base: _Base, disk_gradients: DiskGradients | None) -> Gradients:
    blueprint, options = base.blueprint, base.blueprint.options
    return Gradients(
        records=blueprint.records,
        device=base.device,
        host=base.host,
        host_pool=base.pool("gradients", base.plan.host_gradients),
        disk=disk_gradients,
        device_arena=base.device_arena,
        device_pool=base.device_arena.pool("gradients", base.plan.device_gradients),
        # With `parks` every record has a place.
        shared=() if options.parks else shared_owners(blueprint.trains),
        overflow=base.activations,
        wide=base.blueprint.wide_owners,
        parks=options.parks,
        dtype=options.torch_gradient_dtype,
        trace=base.trace,
    )


def _step_of(store: Store) -> int:
    return count_in(store.state, "step", f"run {store.run_id}", default=0)
