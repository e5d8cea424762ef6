"""Puts a model under a runtime: the composition root.

The order matters: cut the model, open the device and the run that goes on, plan memory (and refuse before
anything is touched), build the parts (`building.py`: create the store, reserve memory, start the threads),
fill the records from their source or recover them, and only then replace the model's parameters and take
over its units.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..device import Device, open_device
from ..errors import CapacityError, ConfigError, StateError
from ..optim import StreamedAdamW, default_param_groups
from ..sources import ModuleSource, WeightSource
from ..store import Store
from ..tiers.memory_plan import MemoryPlan
from ..tiers.memory_planning import plan_memory
from ..tiers.records import RecordSet
from ..trace import Tracer
from ..units import find_cuts, why_whole
from .blueprint import Blueprint
from .building import build_parts
from .chunked_loss import ChunkedLoss
from .identity import check_same_run, has_records
from .memory import DEFAULT_ACTIVATIONS_NBYTES, memory_request
from .options import RuntimeOptions
from .parts import Opened, Parts
from .placeholders import placeholder, refuse_load_state_dict, refuse_state_dict, replace_parameters
from .resume_point import read_resume_point
from .rng import capture_rng, restore_rng
from .runtime import Runtime
from .step import Step
from .storage import open_run
from .stream import StreamedUnit

if TYPE_CHECKING:
    # Planning needs transformers, and attaching does not.
    from ..planner.plan import TrainingPlan

__all__ = ["attach"]

_log = logging.getLogger("offload")

OnProgress = Callable[[str, int, int], None]


def attach(
    model: torch.nn.Module,
    options: RuntimeOptions | TrainingPlan | None = None,
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
        options: how; or pass its fields as keyword arguments (sizes may be text, `"8GiB"`). A plan of
            `offload.planner` is obeyed: what it does not decide (`run_id`, `resume`, `optimizer`, what
            becomes of steps that are not finite, the drives' directories) may be given beside it.
        source: initial values; the model's own parameters when None. Not read on a resume.
        param_groups: groups of (name, parameter) pairs with `lr`, `betas`, `eps`, `weight_decay`;
            weights with decay and norms and biases without when None.
        trace: records spans and counters; one that only counts when None.
        on_progress: called with (unit, bytes done, bytes in all) while records are filled.

    Returns:
        The runtime. Close it, or use it as a context manager.

    Raises:
        UnitError: the model cannot be cut into units.
        ConfigError: the plan is for another model, or an argument is what it decides.
        CapacityError: the budgets are too small, with the numbers; nothing was touched.
        StorageError: a directory cannot be used, or the drives have too little room.

    >>> import torch, offload
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    >>> with offload.attach(model, device="cpu", host_memory="64MiB", device_memory="64MiB") as runtime:
    ...     model(torch.ones(2, 8)).sum().backward()
    ...     runtime.step()
    """
    tracer = trace or Tracer(enabled=False)
    chosen = _resolve(options, settings, model)
    groups = [dict(group) for group in param_groups or _default_groups(model, chosen)]
    _check_groups(groups, next(Blueprint.cuts(model, chosen)).records)
    with contextlib.ExitStack() as undo:
        opened = Opened(undo)
        device = opened.own(open_device(chosen.device, device_memory=chosen.device_memory))
        run = open_run(chosen, opened.own)
        blueprint, plan = _plan(Blueprint.cuts(model, chosen), device, None if run is None else run.store)
        parts = build_parts(blueprint, device, plan, run, tracer, opened)
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
        _take_over(blueprint, runtime, step, parts, groups)
        undo.pop_all()
        return runtime


def _resolve(
    options: RuntimeOptions | TrainingPlan | None, settings: Mapping[str, Any], model: torch.nn.Module
) -> RuntimeOptions:
    if options is None:
        return RuntimeOptions.parse(settings)
    if not isinstance(options, RuntimeOptions):
        return options.options_for(find_cuts(model), settings)
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
    blueprints: Iterable[Blueprint], device: Device, store: Store | None
) -> tuple[Blueprint, MemoryPlan]:
    """Return the blueprint that a run takes, or has, with its memory; see [Note: the choice of a cut]."""
    if store is not None:
        coarsest, *finer = blueprints
        # One with other records is refused with what differs.
        begun = (one for one in (coarsest, *finer) if has_records(store, one.records))
        blueprint = next(begun, coarsest)
        check_same_run(store, blueprint.options, blueprint.records)
        blueprints = (blueprint,)
    refusal: CapacityError | None = None
    for blueprint in blueprints:
        try:
            return blueprint, _plan_memory(blueprint, device)
        except CapacityError as error:
            # What the finest lacks is told. A coarser one can need a little less: norms between large units
            # leave its window emptier.
            refusal = error
    kept = None if store is None else f"run {store.run_id} keeps the units that it was begun with"
    raise CapacityError(f"{refusal}\n  {kept or _about_units(blueprint)}") from refusal


def _plan_memory(blueprint: Blueprint, device: Device) -> MemoryPlan:
    options = blueprint.options
    activations_nbytes = options.activations_nbytes or DEFAULT_ACTIVATIONS_NBYTES
    return plan_memory(
        memory_request(
            options,
            blueprint.schedule,
            blueprint.records,
            blueprint.trains,
            activations_nbytes,
            blueprint.loss_head,
        ),
        host_limit_nbytes=options.host_memory,
        # What the device holds back for itself (staging for conversions) is not there to be planned.
        device_limit_nbytes=device.budget.free_nbytes,
        fill_activations=options.activations_nbytes is None,
    )


def _about_units(finest: Blueprint) -> str:
    records = finest.records
    largest = max(records, key=lambda owner: records[owner].device_nbytes)
    numel = records[largest].layout.trainable_numel + records[largest].layout.frozen_numel
    reason = why_whole(finest.model.get_submodule(largest)) or "another unit holds parts of it"
    return f"the largest unit is {largest!r}, {numel:,} parameters, and cut no further: {reason}"


def _recover(parts: Parts) -> Mapping[str, Any]:
    store = parts.store
    assert store is not None
    if store.generation == 0:
        raise StateError(
            f"run {store.run_id} was never committed: its first import did not finish; start it anew"
        )
    parts.masters.load_residents(parts.records.values())
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
        parts.residents.flush(parts.store)
        parts.store.commit({"step": 0, "rng": capture_rng(), "user": {}})
        parts.residents.committed()


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _take_over(
    blueprint: Blueprint, runtime: Runtime, step: Step, parts: Parts, groups: list[dict[str, Any]]
) -> None:
    model = blueprint.model
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
    optimizer = StreamedAdamW(named_groups, runtime.step, parts.options.optimizer)
    runtime.install(optimizer, streamed, hooks, _chunked_loss(blueprint, streamed, step))


def _chunked_loss(
    blueprint: Blueprint, streamed: Mapping[str, StreamedUnit], step: Step
) -> ChunkedLoss | None:
    head, limit = blueprint.loss_head, blueprint.options.loss_chunk_nbytes
    if limit is None:
        return None
    if head is None:
        if hasattr(blueprint.model, "loss_function"):
            _log.info(
                "the loss of a %s is not computed in chunks of tokens, but from the logits of a whole batch",
                type(blueprint.model).__name__,
            )
        return None
    rows = head.chunk_rows(limit, blueprint.options.torch_compute_dtype.itemsize)
    return ChunkedLoss(head, blueprint.model, streamed[head.unit], step, rows)
