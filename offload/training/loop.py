"""The steps of a fine-tuning: learn, record, commit, until all are done or a signal asks for a stop.

The step and the number of batches seen are the whole position: the learning rate of step n and batch m
are functions of the configuration, n and m; weights and random state come from the commit, so a resumed
run computes what an unbroken one does. The two numbers differ by the batches that were skipped because
something was not finite.

Invariant: training ends on a committed step.

Thread rule: the main thread, because of signals; elsewhere it works without them.
"""

from __future__ import annotations

import math
from time import monotonic
from typing import Any

import torch

from ..errors import OffloadError
from ..runtime.runtime import Runtime
from ..sizes import format_time
from .evaluation import evaluate, evaluates
from .guard import StepGuard
from .job import Job
from .output import OutputDirectory
from .progress import Progress, StepReport
from .signals import StopRequest

__all__ = ["train"]


def train(job: Job, runtime: Runtime, output: OutputDirectory, progress: Progress) -> int:
    """Take the steps that are left; return 0, or 128 + the signal that asked for a stop."""
    first = runtime.global_step
    if evaluates(job, first):
        evaluate(job, runtime, output, progress)
    if first >= job.num_steps:
        progress.line(f"all {job.num_steps} steps are done; raise max_steps to train further")
        return 0
    with StopRequest(
        lambda number: progress.line(f"{number.name}: finishing this step, then stopping")
    ) as stop:
        try:
            with progress.training(first):
                _take_steps(job, runtime, output, progress, stop)
            runtime.commit()
            runtime.synchronize()
        except OffloadError:
            progress.line(
                f"the run stands at step {runtime.committed_step}, committed; start it again to go on"
                if runtime.is_resumable
                else "the run is lost, since commit is off: remove it with 'offload clean' and start anew"
            )
            raise
    if stop.requested and runtime.global_step < job.num_steps:
        progress.line(
            f"stopped after step {runtime.global_step} of {job.num_steps}, which is committed; "
            "run the same command again to go on"
        )
        return stop.exit_code
    return 0


def _take_steps(
    job: Job, runtime: Runtime, output: OutputDirectory, progress: Progress, stop: StopRequest
) -> None:
    first = runtime.global_step
    guard = StepGuard(job.config, runtime, output, progress)
    guard.keep()
    before = runtime.stats()
    began_s = monotonic()
    commit_s: float | None = None
    told = False
    while runtime.global_step < job.num_steps:
        step = runtime.global_step
        rate = job.learning_rate(step)
        for group in runtime.optimizer.param_groups:
            group["lr"] = rate
        batch = job.batches.batch(guard.next_batch()).to(job.device)
        value, problem = _backward(job, runtime, batch)
        if not guard.accepts(value, problem):
            if stop.requested:
                return
            continue
        after = runtime.stats()
        now_s = monotonic()
        # Commits run in the background, so this is that of an earlier step.
        busy_s = after.busy_s.get("commit", 0.0) - before.busy_s.get("commit", 0.0)
        commit_s = busy_s or commit_s
        report = StepReport(
            step=step + 1,
            loss=value,
            learning_rate=rate,
            num_tokens=batch.numel(),
            seconds=now_s - began_s,
            read_nbytes=after.disk_read_nbytes - before.disk_read_nbytes,
            written_nbytes=after.disk_written_nbytes - before.disk_written_nbytes,
            to_device_nbytes=after.to_device_nbytes - before.to_device_nbytes,
            to_host_nbytes=after.to_host_nbytes - before.to_host_nbytes,
            grad_norm=runtime.grad_norm,
            commit_s=commit_s,
        )
        before, began_s = after, now_s
        # Before the commit: a step that is committed then always has its record.
        output.append_metrics(_record(job, report))
        runtime.step(guard.state)
        if step == first and job.config.commit:
            # Whatever `save_steps` is: how long it takes shall be known early, and that it works.
            runtime.commit()
        progress.step(report)
        if not told and step > first and (commit_s is not None or not job.config.commit):
            # Not of the first step, which warms up.
            progress.line(_stop_time(report.seconds, commit_s))
            told = True
        if step + 1 < job.num_steps and guard.keep():
            before, began_s = runtime.stats(), monotonic()
        if stop.requested:
            return
        if evaluates(job, step + 1):
            evaluate(job, runtime, output, progress, stop)


def _stop_time(step_s: float, commit_s: float | None) -> str:
    if commit_s is None:
        return (
            f"a stop (Ctrl-C, SIGTERM) ends after the step, within about {format_time(step_s)}, and commits"
            " it: the only commit there is; SIGKILL before that loses the run"
        )
    return (
        f"a stop (Ctrl-C, SIGTERM) ends after the step, within about {format_time(step_s + commit_s)}: its"
        f" commit takes {format_time(commit_s)}; wait longer than that before SIGKILL"
    )


def _backward(job: Job, runtime: Runtime, batch: torch.Tensor) -> tuple[float, str]:
    """Compute the batch's loss and gradients; return the loss, and what is not finite, if anything."""
    loss = job.model(input_ids=batch, labels=batch, use_cache=False).loss
    value = float(loss.detach())
    if not math.isfinite(value):
        return value, f"the loss is {value}"
    loss.backward()
    if not math.isfinite(runtime.measure_gradients()):
        return value, f"the loss is {value:.4f}, and a gradient is not finite"
    return value, ""


def _record(job: Job, report: StepReport) -> dict[str, Any]:
    return {
        "step": report.step,
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "epoch": report.step / job.batches.steps_per_epoch,
        "num_tokens": report.num_tokens,
        "seconds": report.seconds,
        "disk_read_nbytes": report.read_nbytes,
        "disk_written_nbytes": report.written_nbytes,
        "to_device_nbytes": report.to_device_nbytes,
        "to_host_nbytes": report.to_host_nbytes,
        "grad_norm": report.grad_norm,
        "commit_seconds": report.commit_s,
    }
