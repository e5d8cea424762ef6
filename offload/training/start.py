"""Begins a fine-tuning's run, or goes on with the one in its output directory.

Invariant: a start that fails before its first commit leaves nothing behind.
"""

from __future__ import annotations

import random
from contextlib import ExitStack

import numpy as np
import psutil
import torch

from ..optim import AdamWOptions
from ..runtime.compose import attach
from ..runtime.options import RuntimeOptions
from ..runtime.runtime import Runtime
from ..trace import Tracer
from .job import Job
from .output import OutputDirectory, RunPointer
from .progress import Progress

__all__ = ["start_run"]


def start_run(
    job: Job, output: OutputDirectory, progress: Progress, tracer: Tracer, stack: ExitStack
) -> tuple[Runtime, RunPointer]:
    """Attach the model to the run in the output directory, or to a new one."""
    pointer = output.pointer()
    if pointer is not None:
        output.check_own(pointer, job.disk)
    if pointer is not None and not pointer.imported:
        progress.line("the last start did not finish its import; starting anew")
        output.abandon(pointer)
        pointer = None
    if pointer is not None:
        output.check_same(pointer, job.identity)
        runtime = stack.enter_context(attach(job.model, _options(job, pointer, resume=True), trace=tracer))
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
                runtime = attach(
                    job.model,
                    _options(job, pointer, resume=False),
                    source=job.source,
                    trace=tracer,
                    on_progress=lambda _, done, total: moved(done, total),
                )
        except BaseException:
            output.abandon(pointer)
            raise
        stack.enter_context(runtime)
    pointer = output.mark_imported(pointer, job.disk)
    return runtime, pointer


def _options(job: Job, pointer: RunPointer, *, resume: bool) -> RuntimeOptions:
    config = job.config
    return RuntimeOptions(
        disk=job.disk,
        host_memory=config.host_memory or psutil.virtual_memory().available // 2,
        device_memory=config.device_memory or _free_device_memory(job.device),
        device=str(job.device),
        dtype=config.dtype,
        moments=config.moments,
        compute_dtype=job.compute_dtype,
        rows=config.per_device_train_batch_size if config.gradient_accumulation_steps > 1 else None,
        optimizer=AdamWOptions(
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        ),
        max_grad_norm=config.max_grad_norm,
        gradient_dtype=config.gradient_dtype,
        activations_nbytes=config.activations_nbytes,
        on_non_finite=config.on_non_finite,
        max_non_finite_steps=config.max_non_finite_steps,
        max_rollbacks=config.max_rollbacks,
        room_for_snapshot=config.snapshot_steps is not None,
        run_id=pointer.run_id,
        resume=resume,
        home=config.tier,
        host_cache_nbytes=config.host_cache,
        save_steps=config.commit_steps,
        io_engine=config.io_engine,
        queue_depth=config.queue_depth,
    )


def _free_device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        # A tenth is left to what torch allocates outside the budget: temporaries of one layer.
        return torch.cuda.mem_get_info(device)[0] * 9 // 10
    return psutil.virtual_memory().available // 4
