"""`offload finetune`: read, attach, learn, commit, export; resume when there is a run.

Invariants: everything the user can get wrong is checked before a directory is made; a start that
fails before its first commit leaves nothing behind; training ends on a committed step.

Thread rule: the main thread, because of signals; elsewhere it works without them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StorageError
from ..export.checkpoint import ExportOptions, export
from ..planner import TrainingPlan
from ..runtime.runtime import Runtime
from ..sizes import format_bytes, format_time
from ..trace import Tracer
from .config import FinetuneConfig
from .job import Job, prepare_job
from .loop import train
from .outcome import compare_with_plan, outcome_lines
from .output import OutputDirectory, RunPointer
from .progress import Progress, format_amount
from .start import start_run

__all__ = ["FinetuneResult", "finetune"]


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done.
        exit_code: 0, or 128 + the signal that stopped it.
        directory: the exported model, None when the run was stopped.
    """

    step: int
    exit_code: int
    directory: Path | None


def finetune(config: FinetuneConfig, *, echo: Callable[[str], None] | None = None) -> FinetuneResult:
    """Run one fine-tuning from its configuration, or go on with the one in its output directory.

    Args:
        config: what to do.
        echo: prints a line; standard output when None.

    Raises:
        OffloadError: with one message for the user; the last commit, if there is one, is intact.
    """
    output = OutputDirectory(config.output_dir)
    with ExitStack() as stack:
        job = prepare_job(config, output, stack)
        progress = Progress(num_steps=job.num_steps, logging_steps=config.logging_steps, echo=echo)
        tracer = Tracer(enabled=config.trace is not None)
        runtime, pointer, plan = start_run(job, output, progress, tracer, stack)
        first = runtime.global_step
        if parked := runtime.plan.describe_parked():
            progress.line(parked)
        if (path := config.trace) is not None:
            stack.push(lambda _, error, __: _write_trace(tracer, path, runtime, progress, error))
        exit_code = train(job, runtime, output, progress)
        if exit_code:
            return FinetuneResult(runtime.global_step, exit_code, None)
        _report(job, runtime, output, progress)
        if plan is not None:
            _report_plan(plan, first, runtime, output, progress)
        _export(job, runtime, output, pointer, progress)
        return FinetuneResult(runtime.global_step, 0, output.final)


def _report(job: Job, runtime: Runtime, output: OutputDirectory, progress: Progress) -> None:
    steps = [record for record in output.read_metrics() if "loss" in record]
    if steps:
        seconds = sum(record["seconds"] for record in steps)
        rate = sum(record["num_tokens"] for record in steps) / max(seconds, 1e-9)
        # Single batches differ more than a short run improves.
        span = max(1, len(steps) // 4)
        # The first step pays for warming up; the median step is what a longer run would see.
        read = float(np.median([record["disk_read_nbytes"] for record in steps]))
        written = float(np.median([record["disk_written_nbytes"] for record in steps]))
        progress.line(
            f"loss {_mean_loss(steps[:span]):.4f} -> {_mean_loss(steps[-span:]):.4f} in {len(steps)} steps"
            f" (means of the first and last {span}), {format_time(seconds)}, {rate:,.0f} tokens/s"
        )
        progress.line(
            f"per step: {format_amount(read)} read, {format_amount(written)} written "
            f"({read / job.numel:.1f} and {written / job.numel:.1f} bytes per parameter)"
        )
    stats = runtime.stats()
    progress.line(
        f"peaks: host {format_bytes(stats.host_high_water_nbytes)}, device "
        f"{format_bytes(stats.device_high_water_nbytes)} under lease"
    )
    if len(stats.drives) > 1:
        shares = (
            f"{load.directory} {load.share:.0%} of the bytes at {load.bytes_per_s / 1e9:.2f} GB/s"
            for load in stats.drives
        )
        progress.line(f"drives, while at work: {', '.join(shares)}")
    for sentence in stats.slow_drives:
        progress.line(sentence)


def _report_plan(
    plan: TrainingPlan, first: int, runtime: Runtime, output: OutputDirectory, progress: Progress
) -> None:
    """Put what was measured beside what was predicted, on the screen and in the metrics."""
    records = output.read_metrics()
    # Steps of an earlier start may have had another plan.
    steps = [record for record in records if "loss" in record and record["step"] > first]
    figures = compare_with_plan(plan, steps, runtime.stats())
    for line in outcome_lines(figures):
        progress.line(line)
    if figures:
        output.append_metrics(
            {
                "step": runtime.global_step,
                "predicted": {figure.name: figure.predicted for figure in figures},
                "measured": {figure.name: figure.measured for figure in figures},
            }
        )


def _mean_loss(records: list[dict[str, Any]]) -> float:
    return float(np.mean([record["loss"] for record in records]))


def _export(
    job: Job, runtime: Runtime, output: OutputDirectory, pointer: RunPointer, progress: Progress
) -> None:
    if pointer.exported_step != runtime.global_step or not output.final.is_dir():
        done_nbytes = 0
        options = ExportOptions(assets_from=job.source.directory)
        with progress.phase("export") as moved:

            def written(nbytes: int) -> None:
                nonlocal done_nbytes
                done_nbytes += nbytes
                moved(done_nbytes, max(done_nbytes, job.numel * job.source.dtype.itemsize))

            export(
                output.final,
                runtime.parameters_by_unit(),
                job.shapes,
                model=job.model,
                options=options,
                on_written=written,
            )
        output.mark_exported(pointer, runtime.global_step)
    progress.line(f"the model is in {output.final}")


def _write_trace(
    tracer: Tracer, path: Path, runtime: Runtime, progress: Progress, ended_by: BaseException | None
) -> None:
    try:
        tracer.write_chrome_trace(path)
    except StorageError as error:
        if ended_by is not None:
            progress.line(str(error))  # Raised, it would hide why the run ended.
            return
        progress.line(f"the run stands at step {runtime.committed_step}, committed; only its trace is lost")
        raise
    progress.line(f"the trace is in {path}; open it in ui.perfetto.dev or chrome://tracing")
