"""The loop of `offload finetune`: read, attach, learn, commit, export; resume when there is a run.

The step and the number of batches seen are the whole position: the learning rate of step n and batch m
are functions of the configuration, n and m; weights and random state come from the commit, so a resumed
run computes what an unbroken one does. The two numbers differ by the batches that were skipped because
something was not finite.

Invariants: everything the user can get wrong is checked before a directory is made; a start that
fails before its first commit leaves nothing behind; training ends on a committed step.

Thread rule: the main thread, because of signals; elsewhere it works without them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import psutil
import torch
from transformers import get_scheduler

from ..errors import ConfigError, OffloadError, StorageError
from ..export.checkpoint import ExportOptions, check_export_target, export
from ..hf import PretrainedSource, load_tokenizer, open_pretrained
from ..optim import AdamWOptions
from ..runtime.compose import attach
from ..runtime.options import RuntimeOptions
from ..runtime.runtime import Runtime
from ..sizes import format_bytes, format_time
from ..trace import Tracer
from .config import FinetuneConfig
from .data import Batches, Rows, find_files, pack_rows, read_texts, split_rows
from .guard import StepGuard
from .output import OutputDirectory, RunPointer
from .progress import Progress, StepReport, format_amount
from .signals import StopRequest

__all__ = ["FinetuneResult", "finetune", "learning_rates"]


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


@dataclass(frozen=True)
class _Job:
    """Everything that is known before the model is attached."""

    config: FinetuneConfig
    model: torch.nn.Module
    source: PretrainedSource
    shapes: Mapping[str, tuple[int, ...]]
    batches: Batches
    held_out: Rows | None
    num_steps: int
    learning_rate: Callable[[int], float]
    identity: Mapping[str, Any]
    device: torch.device
    compute_dtype: Any
    disk: tuple[Path, ...]

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return sum(math.prod(shape) for shape in self.shapes.values())


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
        job = _prepare(config, output, stack)
        progress = Progress(num_steps=job.num_steps, logging_steps=config.logging_steps, echo=echo)
        tracer = Tracer(enabled=config.trace is not None)
        runtime, pointer = _start(job, output, progress, tracer, stack)
        if parked := runtime.plan.describe_parked():
            progress.line(parked)
        if (path := config.trace) is not None:
            stack.push(lambda _, error, __: _write_trace(tracer, path, runtime, progress, error))
        exit_code = _train(job, runtime, output, progress)
        if exit_code:
            return FinetuneResult(runtime.global_step, exit_code, None)
        _report(job, runtime, output, progress)
        _export(job, runtime, output, pointer, progress)
        return FinetuneResult(runtime.global_step, 0, output.final)


def learning_rates(config: FinetuneConfig, num_steps: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step (from 0), as transformers' schedules have it.

    Raises:
        ConfigError: the schedule cannot be made from these settings.
    """
    warmup = config.warmup_steps
    num_warmup_steps = math.ceil(warmup * num_steps) if warmup < 1 else int(warmup)
    holder = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    try:
        scheduler: Any = get_scheduler(
            config.lr_scheduler_type, holder, num_warmup_steps=num_warmup_steps, num_training_steps=num_steps
        )
    except ValueError as error:
        raise ConfigError(f"lr_scheduler_type {config.lr_scheduler_type}: {error}") from error
    (factor,) = scheduler.lr_lambdas
    return lambda step: config.learning_rate * float(factor(step))


def _prepare(config: FinetuneConfig, output: OutputDirectory, stack: ExitStack) -> _Job:
    """Read and check everything; nothing is written."""
    check_export_target(output.final)
    if config.trace is not None and not config.trace.absolute().parent.is_dir():
        raise ConfigError(f"trace: {config.trace.absolute().parent} is not a directory; make it first")
    device = _device(config)
    compute = config.compute_dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model, source = open_pretrained(config.model_name_or_path, dtype=getattr(torch, compute))
    stack.callback(source.close)
    tokenizer = load_tokenizer(config.model_name_or_path)
    files = find_files(config.train_file)
    rows = pack_rows((text for file in files for text in read_texts(file)), tokenizer, config.max_length)
    _check_fits(model, rows, config)
    train, held_out = split_rows(rows, config.val_size, config.seed)
    batches = Batches(train, rows_per_step=config.rows_per_step, seed=config.seed)
    num_steps = config.max_steps or math.ceil(config.num_train_epochs * batches.steps_per_epoch)
    return _Job(
        config=config,
        model=model,
        source=source,
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        batches=batches,
        held_out=held_out,
        num_steps=num_steps,
        learning_rate=learning_rates(config, num_steps),
        identity={
            "model_name_or_path": str(config.model_name_or_path.resolve()),
            "data": f"sha256 {rows.fingerprint[:16]}",
            "max_length": config.max_length,
            "val_size": config.val_size,
            "rows_per_step": config.rows_per_step,
            "seed": config.seed,
            "dtype": config.dtype,
            "moments": config.moments,
            "compute_dtype": compute,
        },
        device=device,
        compute_dtype=compute,
        disk=tuple(config.disk) or (output.state,),
    )


def _device(config: FinetuneConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for and torch sees no CUDA device; write device: cpu")
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _check_fits(model: torch.nn.Module, rows: Rows, config: FinetuneConfig) -> None:
    settings: Any = model.config
    limit = getattr(settings, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ConfigError(
            f"max_length {config.max_length} is more than the model's {limit} positions; lower it"
        )
    vocabulary = getattr(settings, "vocab_size", None)
    if vocabulary is not None and int(rows.tokens.max()) >= vocabulary:
        raise ConfigError(
            f"the tokenizer gives token {int(rows.tokens.max())} and the model knows {vocabulary}; "
            f"the tokenizer in {config.model_name_or_path} is of another model"
        )


def _start(
    job: _Job, output: OutputDirectory, progress: Progress, tracer: Tracer, stack: ExitStack
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


def _options(job: _Job, pointer: RunPointer, *, resume: bool) -> RuntimeOptions:
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


def _train(job: _Job, runtime: Runtime, output: OutputDirectory, progress: Progress) -> int:
    """Take the steps that are left; return 0, or 128 + the signal that asked for a stop."""
    first = runtime.global_step
    if _evaluates(job, first):
        _evaluate(job, runtime, output, progress)
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
    job: _Job, runtime: Runtime, output: OutputDirectory, progress: Progress, stop: StopRequest
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
            grad_norm=runtime.grad_norm,
            commit_s=commit_s,
        )
        before, began_s = after, now_s
        # Before the commit: a step that is committed then always has its record.
        output.append_metrics(_record(job, report))
        runtime.step(guard.state)
        if step == first:
            # Whatever `save_steps` is: how long it takes shall be known early, and that it works.
            runtime.commit()
        progress.step(report)
        if not told and step > first and commit_s is not None:
            # Not of the first step, which warms up.
            progress.line(_stop_time(report.seconds, commit_s))
            told = True
        if step + 1 < job.num_steps and guard.keep():
            before, began_s = runtime.stats(), monotonic()
        if stop.requested:
            return
        if _evaluates(job, step + 1):
            _evaluate(job, runtime, output, progress, stop)


def _stop_time(step_s: float, commit_s: float) -> str:
    return (
        f"a stop (Ctrl-C, SIGTERM) ends after the step, within about {format_time(step_s + commit_s)}: its"
        f" commit takes {format_time(commit_s)}; wait longer than that before SIGKILL"
    )


def _backward(job: _Job, runtime: Runtime, batch: torch.Tensor) -> tuple[float, str]:
    """Compute the batch's loss and gradients; return the loss, and what is not finite, if anything."""
    loss = job.model(input_ids=batch, labels=batch, use_cache=False).loss
    value = float(loss.detach())
    if not math.isfinite(value):
        return value, f"the loss is {value}"
    loss.backward()
    if not math.isfinite(runtime.measure_gradients()):
        return value, f"the loss is {value:.4f}, and a gradient is not finite"
    return value, ""


def _record(job: _Job, report: StepReport) -> dict[str, Any]:
    return {
        "step": report.step,
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "epoch": report.step / job.batches.steps_per_epoch,
        "num_tokens": report.num_tokens,
        "seconds": report.seconds,
        "disk_read_nbytes": report.read_nbytes,
        "disk_written_nbytes": report.written_nbytes,
        "grad_norm": report.grad_norm,
        "commit_seconds": report.commit_s,
    }


def _evaluates(job: _Job, step: int) -> bool:
    every = job.config.eval_steps
    return step in (0, job.num_steps) or (every is not None and step % every == 0)


def _evaluate(
    job: _Job,
    runtime: Runtime,
    output: OutputDirectory,
    progress: Progress,
    stop: StopRequest | None = None,
) -> None:
    """Record the mean loss over the held-out rows, if there are any; nothing when a stop comes in.

    Once for a step: a run that was ended behind the evaluation has it, one that was ended before it has not.
    """
    if job.held_out is None:
        return
    if any(line["step"] == runtime.global_step and "eval_loss" in line for line in output.read_metrics()):
        return
    tokens = torch.from_numpy(job.held_out.tokens.astype(np.int64))
    total = 0.0
    job.model.eval()
    with torch.no_grad():
        for rows in torch.split(tokens, job.config.rows_per_step):
            if stop is not None and stop.requested:
                break
            batch = rows.to(job.device)
            total += float(job.model(input_ids=batch, labels=batch, use_cache=False).loss) * len(rows)
    job.model.train()
    if stop is not None and stop.requested:
        return
    loss = total / len(tokens)
    output.append_metrics({"step": runtime.global_step, "eval_loss": loss})
    progress.line(f"step {runtime.global_step}: held-out loss {loss:.4f} ({len(tokens)} rows)")


def _report(job: _Job, runtime: Runtime, output: OutputDirectory, progress: Progress) -> None:
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


def _mean_loss(records: list[dict[str, Any]]) -> float:
    return float(np.mean([record["loss"] for record in records]))


def _export(
    job: _Job, runtime: Runtime, output: OutputDirectory, pointer: RunPointer, progress: Progress
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
