"""Begins a fine-tuning's run, or goes on with the one in its output directory.

Invariant: a start that fails before its first commit leaves nothing behind.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from ..optim import AdamWOptions
from ..planner import TrainingPlan
from ..runtime.compose import attach
from ..runtime.options import RuntimeOptions
from ..runtime.runtime import Runtime
from ..trace import Tracer
from .job import Job
from .output import OutputDirectory, RunPointer
from .planning import RunQuestion, free_budgets, plan_run
from .progress import Progress

__all__ = ["start_run"]


def start_run(
    job: Job, output: OutputDirectory, progress: Progress, tracer: Tracer, stack: ExitStack
) -> tuple[Runtime, RunPointer, TrainingPlan | None]:
    """Plan the run in the output directory, or a new one, and attach the model to it as planned.

    The plan is None where the machine is not known (see `plan_run`); the configuration alone counts then.
    """
    pointer = output.pointer()
    if pointer is not None:
        output.check_own(pointer, job.disk)
    if pointer is not None and not pointer.imported:
        progress.line("the last start did not finish its import; starting anew")
        output.abandon(pointer)
        pointer = None
    if pointer is not None:
        output.check_same(pointer, job.identity)
    asked = RunQuestion(
        job.config, job.model, job.disk, job.device, job.compute_dtype, resumes=pointer is not None
    )
    plan, lines = plan_run(asked)
    for line in lines:
        progress.line(line)
    if pointer is not None:
        runtime = stack.enter_context(
            _attach(job, asked, plan, run_id=pointer.run_id, resume=True, trace=tracer)
        )
        output.save_config(job.config)
        output.cut_metrics(runtime.global_step)
        progress.line(f"resuming run {pointer.run_id} at step {runtime.global_step} of {job.num_steps}")
    else:
        random.seed(job.config.seed)
        np.random.seed(job.config.seed % 2**32)
        torch.manual_seed(job.config.seed)
        pointer = output.begin(job.config, job.disk, job.identity)
        try:
            with progress.phase("import") as moved:
                runtime = _attach(
                    job,
                    asked,
                    plan,
                    run_id=pointer.run_id,
                    resume=False,
                    source=job.source,
                    trace=tracer,
                    on_progress=lambda _, done, total: moved(done, total),
                )
        except BaseException:
            output.abandon(pointer)
            raise
        stack.enter_context(runtime)
    pointer = output.mark_imported(pointer, job.disk)
    if not job.config.commit:
        progress.line(
            "commit is off: the state is written in place, and A CRASH, A KILL OR A POWER CUT LOSES THIS RUN;"
            " it goes on only from an orderly stop (one Ctrl-C or SIGTERM) or its end"
        )
    return runtime, pointer, plan


def _attach(
    job: Job, asked: RunQuestion, plan: TrainingPlan | None, *, run_id: str, resume: bool, **more: Any
) -> Runtime:
    config = job.config
    settings: dict[str, Any] = {
        "disk": job.disk,
        "device": str(job.device),
        "optimizer": AdamWOptions(
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        ),
        "on_non_finite": config.on_non_finite,
        "max_non_finite_steps": config.max_non_finite_steps,
        "max_rollbacks": config.max_rollbacks,
        "room_for_snapshot": config.snapshot_steps is not None,
        "run_id": run_id,
        "resume": resume,
        "io_engine": config.io_engine,
        "queue_depth": config.queue_depth,
    }
    if plan is not None:
        return attach(job.model, plan, **settings, **more)
    host_memory, device_memory = free_budgets(asked)
    options = RuntimeOptions(
        host_memory=config.host_memory or host_memory,
        device_memory=config.device_memory or device_memory,
        dtype=config.dtype,
        moments=config.moments,
        compute_dtype=job.compute_dtype,
        rows=config.per_device_train_batch_size if config.gradient_accumulation_steps > 1 else None,
        max_grad_norm=config.max_grad_norm,
        gradient_dtype=config.gradient_dtype,
        activations_nbytes=config.activations_nbytes,
        home=config.tier,
        host_cache_nbytes=config.host_cache or 0,
        save_steps=config.commit_steps,
        commit=config.commit,
        **settings,
    )
    return attach(job.model, options, **more)
