"""The held-out loss of a fine-tuning: when it is measured, and how.

Thread rule: the thread that trains.
"""

from __future__ import annotations

import numpy as np
import torch

from ..runtime.runtime import Runtime
from .job import Job
from .output import OutputDirectory
from .progress import Progress
from .signals import StopRequest

__all__ = ["evaluate", "evaluates"]


def evaluates(job: Job, step: int) -> bool:
    """Return whether the held-out loss is measured behind `step` steps: at both ends, every `eval_steps`."""
    every = job.config.eval_steps
    return step in (0, job.num_steps) or (every is not None and step % every == 0)


def evaluate(
    job: Job,
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
