"""Builds a runtime for a model: the composition root, where every part is made and wired once.

The order matters: cut the model, open the device, plan memory (and refuse before anything is touched),
open the store, reserve memory, start the threads, fill the records from their source or recover them,
and only then replace the model's parameters and take over its units.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..aio import open_engine
from ..buffers import Budget
from ..device import Device, open_device
from ..errors import ConfigError, StateError, StorageError
from ..optim import StreamedAdamW, default_param_groups
from ..optim.arrivals import Arrivals
from ..optim.gradient_parts import GradientParts
from ..optim.updater import Updater
from ..sizes import MIB
from ..sources import ModuleSource, WeightSource
from ..specs import Tier
from ..store import RecordSpec, Store, remove_run
from ..store.scratch import Scratch
from ..tiers.activations import Activations
from ..tiers.disk_gradients import DiskGradients
from ..tiers.gradient_homes import PartLayout
from ..tiers.gradients import Gradients
from ..tiers.masters import Masters
from ..tiers.memory_plan import MemoryPlan, plan_memory, shared_owners
from ..tiers.records import RecordSet, record_sets, store_records
from ..tiers.residents import ResidentRecords
from ..tiers.schedule import Schedule, completion_order, first_use_order
from ..tiers.transfer import Transfer
from ..trace import Tracer
from ..units import Unit, find_units
from .identity import check_same_run, run_identity
from .io_setting import choose_io_setting
from .options import RuntimeOptions
from .parts import Committed, Parts
from .placeholders import placeholder, refuse_load_state_dict, refuse_state_dict, replace_parameters
from .resume_point import count_in, read_resume_point
from .rng import DeviceRng, capture_rng, restore_rng
from .runtime import Runtime
from .step import Step
from .stream import StreamedUnit

__all__ = ["attach"]

_log = logging.getLogger("offload")

# What saved inputs get at least when the user does not say: enough for 8 units of 2 x 256 x 1024 fp32.
DEFAULT_ACTIVATIONS_NBYTES = 16 * MIB

OnProgress = Callable[[str, int, int], None]


def attach(
    model: torch.nn.Module,
    options: RuntimeOptions | None = None,
    *,
    source: WeightSource | None = None,
    param_groups: Iterable[dict[str, Any]] | None = None,
    trace: Tracer | None = None,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> Runtime:
    """Attach `model` to the tiers: its weights and optimizer state leave it, its calls are streamed.

    Afterwards an ordinary loop trains it: `loss = model(...)`, `loss.backward()`, `runtime.step()`.
    Parameters become placeholders on the meta device; buffers go to the device and stay there.

    Args:
        model: parameters in memory, or on the meta device together with a `source`.
        options: how; or pass its fields as keyword arguments (sizes may be text, `"8GiB"`).
        source: initial values; the model's own parameters when None. Not read on a resume.
        param_groups: groups of (name, parameter) pairs with `lr`, `betas`, `eps`, `weight_decay`;
            weights with decay and norms and biases without when None.
        trace: records spans and counters; one that only counts when None.
        on_progress: called with (unit, bytes done, bytes in all) while records are filled.

    Returns:
        The runtime. Close it, or use it as a context manager.

    Raises:
        UnitError: the model cannot be cut into units.
        CapacityError: the budgets are too small, with the numbers; nothing was touched.
        StorageError: a directory cannot be used, or the drives have too little room.

    >>> import torch, offload
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    >>> with offload.attach(model, device="cpu", host_memory="64MiB", device_memory="64MiB") as runtime:
    ...     model(torch.ones(2, 8)).sum().backward()
    ...     runtime.step()
    """
    chosen = _resolve(options, settings)
    tracer = trace or Tracer(enabled=False)
    units = find_units(model)
    records = record_sets((unit.layout for unit in units), chosen.record_format, chosen.torch_compute_dtype)
    schedule = Schedule(
        tuple(unit.name for unit in units),
        {unit.name: unit.records for unit in units},
        wraps=not chosen.parks,
    )
    trains = {unit.name: unit.trained_records for unit in units}
    groups = [dict(group) for group in param_groups or _default_groups(model, chosen)]
    _check_groups(groups, records)
    with contextlib.ExitStack() as undo:
        device = undo.enter_context(open_device(chosen.device, device_memory=chosen.device_memory))
        plan = _plan(chosen, schedule, records, trains, device)
        parts = _build(model, chosen, units, records, device, plan, schedule, trains, tracer, undo)
        state: Mapping[str, Any] = {}
        if chosen.resume:
            state = _recover(parts)
        else:
            _fill(parts, source or ModuleSource(dict(model.named_parameters())), on_progress)
            parts.progress.committed(0, 0 if parts.store is None else parts.store.generation)
        _move_buffers(model, device.torch_device)
        step = Step(parts, parts.progress.committed_step)
        runtime = Runtime(parts, step, state)
        undo.callback(runtime.close)
        _take_over(model, runtime, step, parts, groups)
        undo.pop_all()
        return runtime


def _resolve(options: RuntimeOptions | None, settings: Mapping[str, Any]) -> RuntimeOptions:
    if options is None:
        return RuntimeOptions.parse(settings)
    if settings:
        raise ConfigError(f"give options or keyword arguments, not both: {', '.join(settings)}")
    return options


def _default_groups(model: torch.nn.Module, options: RuntimeOptions) -> list[dict[str, Any]]:
    return default_param_groups(model.named_parameters(), options.optimizer.weight_decay)


def _check_groups(groups: list[dict[str, Any]], records: Mapping[str, RecordSet]) -> None:
    for group in groups:
        # An iterator of pairs would be used up by the first look at it.
        group["params"] = list(group["params"])
    grouped = {name for group in groups for name, _ in group["params"]}
    trained = [spec.name for record in records.values() for spec in record.layout.trainable]
    missing = [name for name in trained if name not in grouped]
    if missing:
        raise ConfigError(
            f"no parameter group holds {len(missing)} of {len(trained)} trainable parameters, the first is"
            f" {missing[0]!r}: give them to a group, or freeze them (requires_grad_(False)) before attaching"
        )


def _plan(
    options: RuntimeOptions,
    schedule: Schedule,
    records: Mapping[str, RecordSet],
    trains: Mapping[str, tuple[str, ...]],
    device: Device,
) -> MemoryPlan:
    return plan_memory(
        schedule,
        records,
        trains=trains,
        home=options.resolved_home,
        host_limit_nbytes=options.host_memory,
        # What the device holds back for itself (staging for conversions) is not there to be planned.
        device_limit_nbytes=device.budget.free_nbytes,
        gradient_itemsize=options.torch_gradient_dtype.itemsize,
        micro_gradients=options.sums_wide,
        parks=options.parks,
        parks_on_disk=bool(options.disk),
        activations_nbytes=options.activations_nbytes or DEFAULT_ACTIVATIONS_NBYTES,
        fill_activations=options.activations_nbytes is None,
    )


def _build(
    model: torch.nn.Module,
    options: RuntimeOptions,
    units: tuple[Unit, ...],
    records: Mapping[str, RecordSet],
    device: Device,
    plan: MemoryPlan,
    schedule: Schedule,
    trains: Mapping[str, tuple[str, ...]],
    trace: Tracer,
    undo: contextlib.ExitStack,
) -> Parts:
    closers: list[Any] = []

    def own(part: Any) -> Any:
        closers.append(part)
        undo.callback(part.close)
        return part

    closers.append(device)
    store = _open_store(model, options, records, own)
    scratch = _open_scratch(options, plan, records, store, own)
    host_budget = Budget(Tier.HOST, options.host_memory)
    host = own(device.host_arena(host_budget, plan.host_nbytes))
    device_arena = own(device.arena(plan.device_nbytes))
    residents = ResidentRecords(host, records) if plan.home is not Tier.DISK else None
    host_weights = host.pool("weights", plan.host_weights) if plan.host_weights else None
    host_gradients = host.pool("gradients", plan.host_gradients) if plan.host_gradients else None
    updating = host.pool("weights under update", plan.host_updates) if plan.host_updates else None
    staging = host.pool("optimizer chunks", plan.staging) if plan.staging else None
    stack = host.stack("saved inputs", plan.activations_nbytes)
    transfer = Transfer(
        schedule=schedule,
        records=records,
        window=plan.window,
        device=device,
        host=host,
        host_pool=host_weights,
        device_arena=device_arena,
        device_pool=device_arena.pool("weights", plan.device_weights),
        store=store,
        residents=residents,
        keep_on_device=plan.home is Tier.DEVICE,
        keep_host=not options.parks,
        trace=trace,
    )
    undo.callback(transfer.close)
    progress = Committed(0 if store is None else _step_of(store), 0 if store is None else store.generation)
    num_threads = options.optimizer.num_threads or max(1, torch.get_num_threads() // 2)
    disk_gradients = None
    gradient_parts = None
    if scratch is not None:
        itemsize = options.torch_gradient_dtype.itemsize
        disk_gradients = DiskGradients(
            scratch=scratch,
            host=host,
            ring=host.pool("gradients on their way to disk", plan.gradient_ring),
            numel={owner: records[owner].layout.trainable_numel for owner in plan.parked_on_disk},
            layout=PartLayout(options.chunk_numel, itemsize),
            trace=trace,
        )
        gradient_parts = GradientParts(
            records=records,
            disk=disk_gradients,
            itemsize=itemsize,
            host=host,
            slots=host.pool("parts of gradients", plan.gradient_parts),
            trace=trace,
        )
    arrivals = Arrivals(
        host=host, disk=disk_gradients, num_threads=num_threads, on_error=transfer.fail, trace=trace
    )
    undo.callback(arrivals.close)
    updater = Updater(
        records=records,
        host=host,
        staging=staging,
        weights=updating,
        store=store,
        residents=residents,
        gradient_parts=gradient_parts,
        num_threads=num_threads,
        on_updated=transfer.end_update,
        on_committed=progress.committed,
        on_error=transfer.fail,
        trace=trace,
    )
    undo.callback(updater.close)
    predict = first_use_order if options.parks else completion_order
    updater.expect(predict(schedule.order, trains))
    gradients = Gradients(
        records=records,
        device=device,
        host=host,
        host_pool=host_gradients,
        disk=disk_gradients,
        device_arena=device_arena,
        device_pool=device_arena.pool("gradients", plan.device_gradients),
        # With `parks` every record has a place.
        shared=() if options.parks else shared_owners(trains),
        overflow=stack,
        sum_wide=options.sums_wide,
        parks=options.parks,
        dtype=options.torch_gradient_dtype,
        trace=trace,
    )
    return Parts(
        model=model,
        options=options,
        units=units,
        records=records,
        plan=plan,
        schedule=schedule,
        transfer=transfer,
        gradients=gradients,
        activations=Activations(device, host, stack, trace),
        updater=updater,
        arrivals=arrivals,
        disk_gradients=disk_gradients,
        masters=Masters(host=host, host_pool=host_weights, staging=staging, store=store, residents=residents),
        store=store,
        residents=residents,
        host_budget=host_budget,
        device_budget=device.budget,
        rng=DeviceRng(device.torch_device),
        trace=trace,
        progress=progress,
        closers=closers,
    )


def _open_store(
    model: torch.nn.Module,
    options: RuntimeOptions,
    records: Mapping[str, RecordSet],
    own: Callable[[Any], Any],
) -> Store | None:
    if not options.disk:
        return None
    setting = choose_io_setting(options)
    engine = own(
        open_engine(options.io_engine, queue_depth=setting.queue_depth, segment_nbytes=setting.segment_nbytes)
    )
    specs = store_records(records)
    store: Store
    if options.resume:
        assert options.run_id is not None
        store = own(Store.open(options.disk, engine=engine, run_id=options.run_id))
        check_same_run(store, options, records)
    else:
        store = own(
            Store.create(
                options.disk,
                specs,
                engine=engine,
                run_id=options.run_id,
                chunk_nbytes=options.chunk_nbytes or options.record_format.store_chunk_nbytes,
                identity=run_identity(model, options, records),
                room_for_snapshot=options.room_for_snapshot,
            )
        )
    return store


def _open_scratch(
    options: RuntimeOptions,
    plan: MemoryPlan,
    records: Mapping[str, RecordSet],
    store: Store | None,
    own: Callable[[Any], Any],
) -> Scratch | None:
    """Reserve room on the drives for the gradients that the plan parks there."""
    if not plan.parked_on_disk:
        return None
    assert store is not None, "the plan parks on disk where there is one"
    layout = PartLayout(options.chunk_numel, options.torch_gradient_dtype.itemsize)
    specs = [
        RecordSpec(owner, layout.record_nbytes(records[owner].layout.trainable_numel))
        for owner in plan.parked_on_disk
    ]
    try:
        # A run that goes on has its snapshot, or is told when it takes one, before its first step.
        room_for_snapshot = options.room_for_snapshot and not options.resume
        scratch = store.scratch(specs, chunk_nbytes=layout.chunk_nbytes, room_for_snapshot=room_for_snapshot)
    except StorageError:
        if not options.resume:
            # Nothing was written into the run: it goes again, as when its own room is not there.
            store.close()
            remove_run(options.disk, store.run_id)
        raise
    own(scratch)
    return scratch


def _step_of(store: Store) -> int:
    return count_in(store.state, "step", f"run {store.run_id}", default=0)


def _recover(parts: Parts) -> Mapping[str, Any]:
    store = parts.store
    assert store is not None
    if store.generation == 0:
        raise StateError(
            f"run {store.run_id} was never committed: its first import did not finish; start it anew"
        )
    if parts.residents is not None:
        parts.masters.load_residents(parts.records)
    point = read_resume_point(store.state, f"run {store.run_id}")
    restore_rng(point.rng)
    return point.user


def _fill(parts: Parts, source: WeightSource, on_progress: OnProgress | None) -> None:
    total = sum(unit.host_nbytes + unit.optimizer_nbytes for unit in parts.records.values())
    done = 0
    for owner, unit in parts.records.items():
        parts.masters.write(unit, source)
        done += unit.host_nbytes + unit.optimizer_nbytes
        if on_progress is not None:
            on_progress(owner, done, total)
    if parts.store is not None:
        if parts.residents is not None:
            parts.residents.flush(parts.store)
        parts.store.commit({"step": 0, "rng": capture_rng(), "user": {}})


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _take_over(
    model: torch.nn.Module, runtime: Runtime, step: Step, parts: Parts, groups: list[dict[str, Any]]
) -> None:
    replace_parameters(model, lambda _, parameter: placeholder(parameter))
    by_name = dict(model.named_parameters())
    named_groups = [
        {**group, "params": [(name, by_name[name]) for name, _ in group["params"]]} for group in groups
    ]
    streamed = {
        unit.name: StreamedUnit(unit, model.get_submodule(unit.name), parts.records, step)
        for unit in parts.units
    }
    hooks = []
    for unit in streamed.values():
        # torch leaves these methods untyped.
        hooks.append(unit.module.register_state_dict_pre_hook(refuse_state_dict))  # type: ignore[no-untyped-call]
        hooks.append(unit.module.register_load_state_dict_pre_hook(refuse_load_state_dict))  # type: ignore[no-untyped-call]
    runtime.install(StreamedAdamW(named_groups, runtime.step, parts.options.optimizer), streamed, hooks)
