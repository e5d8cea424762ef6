"""The plan of a fine-tuning: what the machine is, what is asked of it, and what is told of the answer.

`offload finetune` obeys the plan, and `offload plan CONFIG` prints the same one. The machine is the
`machine.json` that `offload bench` keeps where it knows the run's drives, else what a short probe finds;
how fast the model computes is always probed, since no file knows the model.

Thread rule: the caller's thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from ..errors import CapacityError
from ..machine import Machine, default_machine_path, file_system_id, load_machine
from ..planner import Answer, Question, TrainingPlan, describe_model, plan_training
from ..planner.model import ModelFacts
from ..planner.pages import refusal_text
from ..planner.work import step_flops
from ..preflight import compute_speed, probe_machine, slower_links
from ..runtime.options import ComputeDType
from ..sizes import format_bytes, format_rate, format_time
from ..store.room import free_nbytes
from .config import FinetuneConfig
from .progress import format_amount

__all__ = ["RunQuestion", "free_budgets", "plan_lines", "plan_run", "run_question"]


@dataclass(frozen=True)
class RunQuestion:
    """What there is to plan.

    Attributes:
        config: of the run.
        model: on the meta device.
        disk: directories on the run's drives; they need not exist yet.
        device: to compute on.
        compute_dtype: of units.
        resumes: whether the run is on the drives already, so that they need no room for it.
    """

    config: FinetuneConfig
    model: torch.nn.Module
    disk: tuple[Path, ...]
    device: torch.device
    compute_dtype: ComputeDType
    resumes: bool = False


def plan_run(asked: RunQuestion) -> tuple[TrainingPlan | None, tuple[str, ...]]:
    """Return the plan to obey and the lines that are told of it.

    The plan is None where the machine is not known: there is no `machine.json`, and no probe.

    Raises:
        CapacityError: nothing fits; with the bytes that are lacking and the keys that would do.
    """
    question, model, lines = run_question(asked)
    if question is None:
        return None, lines
    answer = plan_training(question, model)
    if answer.plan is None:
        raise CapacityError(refusal_text(answer, [_keys(one.flags) for one in answer.suggestions]))
    return answer.plan, (*lines, *plan_lines(answer))


def run_question(asked: RunQuestion) -> tuple[Question | None, ModelFacts, tuple[str, ...]]:
    """Return the question that a run is, its model, and what is to be said of the machine.

    The question is None where the machine is not known.
    """
    config = asked.config
    facts = describe_model(asked.model, config.model_name_or_path.name)
    machine, lines = _find_machine(asked)
    if machine is None:
        return None, facts, lines
    host, device = free_budgets(asked)
    undoes = config.on_non_finite != "stop" and config.max_grad_norm is None
    question = Question(
        machine=machine,
        host_memory=config.host_memory or host,
        device_memory=config.device_memory or device,
        batch=config.rows_per_step,
        length=config.max_length,
        home=config.tier,
        host_cache=config.host_cache,
        rows=config.per_device_train_batch_size,
        dtype=config.dtype,
        moments=config.moments,
        compute_dtype=asked.compute_dtype,
        max_grad_norm=config.max_grad_norm,
        gradient_dtype=config.gradient_dtype,
        # Updates that run during backward are undone by going back to the commit before the step.
        save_steps=config.save_steps or (1 if undoes else None),
        commit=config.commit,
        flops_per_s=_flops_per_s(asked, facts),
        activations_nbytes=config.activations_nbytes,
        snapshots=config.snapshot_steps is not None,
        room_nbytes=() if asked.resumes else tuple(free_nbytes(str(_existing(path))) for path in asked.disk),
    )
    return question, facts, lines


def free_budgets(asked: RunQuestion) -> tuple[int, int]:
    """Return the bytes of host and device memory that a run gets when its configuration does not say."""
    available = psutil.virtual_memory().available
    if asked.device.type == "cuda":
        # A tenth is left to what torch allocates outside the budget: temporaries of one layer.
        return available // 2, torch.cuda.mem_get_info(asked.device)[0] * 9 // 10
    return available // 2, available // 4


def plan_lines(answer: Answer) -> tuple[str, ...]:
    """Return the plan in a few lines: where things live, what binds, time, bytes, peaks."""
    plan, question = answer.plan, answer.question
    assert plan is not None
    options, memory = plan.options, plan.memory
    commits = "every step" if options.save_steps == 1 else f"every {options.save_steps} steps"
    commits = f"a commit {commits}" if options.commit else "no commits"
    cache = (
        f", a host cache of {format_bytes(options.host_cache_nbytes)}" if options.host_cache_nbytes else ""
    )
    lines = [
        f"plan: home {memory.home.value}, {plan.rows} rows at once, window of {memory.window}"
        f"{cache}, {commits}; moments {options.moments}, weights {options.dtype}",
        f"plan: a step in about {format_time(plan.step_s)}, {plan.tokens_per_s:,.0f} tokens/s, set by"
        f" {plan.bottleneck}; {format_amount(plan.traffic.disk_read_nbytes)} read and"
        f" {format_amount(plan.step_written_nbytes)} written a step"
        f" ({plan.step_written_nbytes / 1e12:.4f} TB)",
        f"plan: host {format_bytes(plan.host_nbytes)} of {format_bytes(question.host_memory)}, device"
        f" {format_bytes(plan.device_nbytes)} of {format_bytes(question.device_memory)} (about"
        f" {format_bytes(plan.temporaries_nbytes)} of it torch's own),"
        f" {format_bytes(plan.drive_nbytes + plan.snapshot_nbytes)} on each drive"
        + (f", {format_bytes(plan.snapshot_nbytes)} of it for a snapshot" if plan.snapshot_nbytes else ""),
    ]
    lines += [f"plan: {note}" for note in plan.notes]
    if answer.fits_without:
        lines.append(
            f"plan: ordinary training takes about {format_bytes(answer.plain_nbytes)} and would fit into"
            f" {format_bytes(answer.plain_limit_nbytes)}: it needs no offload, and is faster without"
        )
    return tuple(lines)


def _find_machine(asked: RunQuestion) -> tuple[Machine | None, tuple[str, ...]]:
    """Return the machine to plan with, its drives those of the run, and what is to be said of it."""
    directories = [_existing(path) for path in asked.disk]
    path = default_machine_path()
    kept = load_machine(path) if path.is_file() else None
    known = None if kept is None else _with_drives(kept, directories)
    if known is not None and asked.device.type == "cpu":
        known = replace(known, device=None)
    if not asked.config.preflight:
        return known, ()
    # Directories that are still to be made may have the nearest one above in common.
    probed = list(dict.fromkeys(directories))
    found = probe_machine([str(one) for one in probed], device=asked.device.type == "cuda")
    if found is None:
        return known, ("preflight: a drive has too little room for a file to measure with",)
    found = replace(
        found,
        device=found.device if asked.device.type == "cuda" else None,
        drives=tuple(
            replace(found.drives[probed.index(directory)], path=str(own))
            for directory, own in zip(directories, asked.disk, strict=True)
        ),
    )
    if known is None:
        return found, ()
    return replace(known, processor=found.processor), tuple(
        f"warning: {slow.what} is slower than planned: {format_rate(slow.found_bytes_per_s)} now,"
        f" {format_rate(slow.planned_bytes_per_s)} in {path}; see what else is running, or measure again:"
        f" offload bench {' '.join(map(str, directories))}"
        for slow in slower_links(known, found)
    )


def _with_drives(machine: Machine, directories: list[Path]) -> Machine | None:
    """Return the machine with the drives that hold `directories` alone; None when it lacks one."""
    known = {drive.device: drive for drive in machine.drives}
    wanted = [file_system_id(directory) for directory in directories]
    if any(device not in known for device in wanted):
        return None
    drives = tuple(
        replace(known[device], path=str(directory))
        for device, directory in zip(wanted, directories, strict=True)
    )
    together = machine.together if len(drives) == len(machine.drives) else None
    return replace(machine, drives=drives, together=together)


def _flops_per_s(asked: RunQuestion, facts: ModelFacts) -> float | None:
    """Return the operations that this model's layers sustain on the device; None where it was not timed."""
    config = asked.config
    if not config.preflight:
        return None
    speed = compute_speed(
        asked.model,
        device=asked.device,
        rows=config.per_device_train_batch_size,
        length=config.max_length,
    )
    return None if speed is None else sum(step_flops(facts, speed.rows, speed.length)) / speed.seconds


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def _keys(flags: tuple[tuple[str, str], ...]) -> str:
    """Return a suggestion as keys of the configuration, or as a change of the machine."""
    names = {"batch": "gradient_accumulation_steps x per_device_train_batch_size", "length": "max_length"}
    return ", ".join(f"{names.get(name, name.replace('-', '_'))}: {value}" for name, value in flags)
