"""What is known of a fine-tuning before its model is attached: data, schedule, device, identity.

Invariant: everything the user can get wrong in the configuration is checked here, and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from ..errors import ConfigError
from ..export.checkpoint import check_export_target
from ..hf import PretrainedSource, load_tokenizer, open_pretrained
from ..runtime.options import ComputeDType
from .config import FinetuneConfig
from .data import Batches, Rows, find_files, pack_rows, read_texts, split_rows
from .output import OutputDirectory

__all__ = ["Job", "choose_device", "learning_rates", "prepare_job"]


@dataclass(frozen=True)
class Job:
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
    compute_dtype: ComputeDType
    disk: tuple[Path, ...]

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def prepare_job(config: FinetuneConfig, output: OutputDirectory, stack: ExitStack) -> Job:
    """Read and check everything; nothing is written."""
    check_export_target(output.final)
    if config.trace is not None and not config.trace.absolute().parent.is_dir():
        raise ConfigError(f"trace: {config.trace.absolute().parent} is not a directory; make it first")
    device, compute = choose_device(config)
    model, source = open_pretrained(config.model_name_or_path, dtype=getattr(torch, compute))
    stack.callback(source.close)
    tokenizer = load_tokenizer(config.model_name_or_path)
    files = find_files(config.train_file)
    rows = pack_rows((text for file in files for text in read_texts(file)), tokenizer, config.max_length)
    _check_fits(model, rows, config)
    train, held_out = split_rows(rows, config.val_size, config.seed)
    batches = Batches(train, rows_per_step=config.rows_per_step, seed=config.seed)
    num_steps = config.max_steps or math.ceil(config.num_train_epochs * batches.steps_per_epoch)
    return Job(
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
            # Runs from before there was a choice have no such key.
            **({} if config.gradient_dtype is None else {"gradient_dtype": config.gradient_dtype}),
        },
        device=device,
        compute_dtype=compute,
        disk=tuple(config.disk) or (output.state,),
    )


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


def choose_device(config: FinetuneConfig) -> tuple[torch.device, ComputeDType]:
    """Return where a run computes, and in what dtype.

    Raises:
        ConfigError: CUDA was asked for, and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for and torch sees no CUDA device; write device: cpu")
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, config.compute_dtype or ("bfloat16" if device.type == "cuda" else "float32")


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
