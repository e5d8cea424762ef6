"""The configuration of `offload finetune`: flat keys with Hugging Face's names, from YAML and flags.

Owns the keys, their defaults and limits, the names that other tools use for them, and the messages
for what is wrong. A flag wins over the file, the file over the default.

Invariants: an unknown key is an error with the nearest known one; every message names the key, what
was given, and where. A configuration is frozen once it is made.

It opens no model, data or device: that a path exists is found out by who opens it.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from ..aio.engine import EngineName
from ..errors import ConfigError
from ..redaction import holds_secret, redact
from ..sizes import MIB, parse_bytes
from ..specs import MEMORY_SAVE_STEPS, MomentDType, RecordDType, Tier

__all__ = ["ALIASES", "ELSEWHERE", "GROUPS", "FinetuneConfig", "load_config", "read_yaml", "suggest"]

SchedulerName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]

# What other tools call a key of ours. Each is taken and mapped, with one warning.
ALIASES = {
    "base_model": "model_name_or_path",
    "dataset": "train_file",
    "train_files": "train_file",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "nvme_path": "disk",
    "rows": "per_device_train_batch_size",
    "tier": "home",
}

# Keys a user may expect and will not find: what happens instead.
ELSEWHERE = {
    "keep_generations": "one commit is kept, and the one before until it is written over; nothing piles up, "
    "and older steps are kept by snapshot_steps",
    "save_total_limit": "one commit is kept, and the newest snapshot of snapshot_steps; nothing piles up",
    "save_strategy": "commits follow save_steps; every step is one when everything is on disk",
    "resume_from_checkpoint": "the run in output_dir is resumed whenever there is one",
    "gradient_checkpointing": "every unit is always recomputed in the backward pass",
    "packing": "texts are always packed into rows of max_length tokens",
    "bf16": "write compute_dtype: bfloat16",
    "fp16": "float16 is not offered: write compute_dtype: bfloat16 or float32",
    "optim": "the optimizer is AdamW",
    "deepspeed": "offload moves the state by itself: set device_memory, host_memory and disk",
}


# A configuration has some forty keys; a file longer than this is something else.
_MAX_FILE_NBYTES = 1 << 20
# Numbers are steps, seeds and bytes.
_MAX_NUMBER = 1 << 64


class _Loader(yaml.SafeLoader):
    """A safe YAML loader for flat files: no key twice, no alias of more than a scalar, no odd values.

    An alias of a list can make a few lines stand for more than memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if not self.check_event(yaml.AliasEvent):
            return super().compose_node(parent, index)
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if not isinstance(self.anchors.get(event.anchor), yaml.ScalarNode):
            raise yaml.MarkedYAMLError(None, None, "* names no single value given before", event.start_mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise yaml.MarkedYAMLError(
                None, None, f"a value cannot be read as {node.tag}", node.start_mark
            ) from error
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise yaml.MarkedYAMLError(None, None, "a number is too large", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def _none_if_negative(value: Any) -> Any:
    # TrainingArguments says -1 for "not set".
    return None if value in (-1, "-1") else value


def _none_if_zero(value: float | None) -> float | None:
    # TrainingArguments says 0 for "do not clip".
    return value or None


def _expand(value: Any) -> Any:
    try:
        return Path(_check_path(value)).expanduser() if isinstance(value, str) else value
    except RuntimeError as error:
        raise ValueError(f"{value!r:.80}: {error}") from error


def _check_path(value: str) -> str:
    """Return `value` if a file could have that name, and the name may be written down."""
    if holds_secret(value):
        raise ValueError(
            "there is what looks like a password or a token in it, and paths are kept in the files of a run;"
            " name a local path without one"
        )
    try:
        if "\0" in value:
            raise ValueError(f"{value!r:.80} has a zero byte, which no path has")
        os.fsencode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{value!r:.80} has a character that no path has") from error
    return value


def _parse_size(value: Any) -> int:
    if isinstance(value, str) and holds_secret(value):
        raise ValueError("not a size, but what looks like a password or a token")
    return parse_bytes(value)


def _print_size(nbytes: int | None) -> str | int | None:
    return f"{nbytes // MIB}MiB" if nbytes and nbytes % MIB == 0 else nbytes


Size = Annotated[int, BeforeValidator(_parse_size), PlainSerializer(_print_size)]
UserPath = Annotated[Path, BeforeValidator(_expand)]
PathText = Annotated[str, AfterValidator(_check_path)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# The first key of each group, for the help text.
GROUPS = {
    "model_name_or_path": "Model and data",
    "learning_rate": "Training",
    "device": "Where the bytes live",
    "output_dir": "Output",
}


class FinetuneConfig(BaseModel):
    """One run of `offload finetune`; the keys are those of TrainingArguments and SFTConfig."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,  # what is given may be a secret in the wrong place
    )

    model_name_or_path: UserPath = Field(description="Local model directory: config.json and safetensors.")
    train_file: Annotated[list[PathText], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        description="Text to learn: .txt or .md files, .jsonl with a 'text' field, directories or globs."
    )
    val_size: Annotated[float, Field(ge=0)] = Field(
        0, description="Rows held out for evaluation; a fraction when below 1."
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        1024, description="Tokens of a row; texts are packed into rows."
    )

    learning_rate: Annotated[float, Field(ge=0)] = Field(5e-5, description="Peak learning rate of AdamW.")
    lr_scheduler_type: SchedulerName = Field(
        "linear", description=f"Shape of the learning rate: {', '.join(get_args(SchedulerName))}."
    )
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        0, description="Steps of linear warm-up; a fraction of the run when below 1."
    )
    max_steps: Annotated[Positive | None, BeforeValidator(_none_if_negative)] = Field(
        None, description="Optimizer steps; wins over num_train_epochs."
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(3.0, description="Passes over the data.")
    per_device_train_batch_size: Positive = Field(
        1, description="Rows computed at once inside a unit (micro-batch)."
    )
    gradient_accumulation_steps: Positive = Field(
        1, description="Micro-batches of a step; weights are read once per step whatever their number."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Decoupled weight decay; biases and norms have none."
    )
    adam_beta1: Fraction = Field(0.9, description="AdamW beta1.")
    adam_beta2: Fraction = Field(0.999, description="AdamW beta2.")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW epsilon.")
    max_grad_norm: Annotated[float | None, Field(ge=0), AfterValidator(_none_if_zero)] = Field(
        None,
        description="Clip to this global norm; keeps a step's gradients in host memory. 0: do not.",
    )
    gradient_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of gradients that clipping keeps; bfloat16 rounds them, half the bytes."
    )
    on_non_finite: Literal["skip", "rollback", "stop"] = Field(
        "stop",
        description="When a loss or gradient is not finite: skip the batch; skip, then go back to the "
        "snapshot; or stop.",
    )
    max_non_finite_steps: Positive = Field(
        3, description="Batches skipped in a row before the run goes back, or stops after all."
    )
    on_loss_spike: Literal["warn", "rollback"] = Field(
        "warn", description="When a loss jumps out of the range of those before: warn, or go back as well."
    )
    snapshot_steps: Positive | None = Field(
        None, description="Steps between snapshots to go back to; the newest is kept, on the same drives."
    )
    max_rollbacks: Positive = Field(3, description="Times a run goes back before it stops after all.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="Seed of data order and dropout.")

    device: Literal["cpu", "cuda"] | None = Field(
        None, description="Where to compute; a GPU when there is one."
    )
    device_memory: Size | None = Field(None, description="Bytes offload may hold on the device.")
    host_memory: Size | None = Field(None, description="Bytes offload may hold in host memory.")
    activations_nbytes: Size | None = Field(
        None, description="Of these, bytes for saved inputs of units; what the rest leaves."
    )
    disk: Annotated[list[UserPath], BeforeValidator(_as_list)] = Field(
        default=[], description="Directories for the state, one per drive; output_dir/state if none."
    )
    dtype: RecordDType = Field(
        "bfloat16", description="How master weights are stored; exact fp32 either way."
    )
    moments: MomentDType = Field(
        "float32", description="How AdamW's moments are stored: 8bit takes a quarter of the bytes, rounded."
    )
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of the arithmetic; bfloat16 on a GPU, else float32."
    )
    home: Literal["disk", "host", "device"] | None = Field(
        None, description="Where the state rests between uses; the plan's choice, disk without one."
    )
    preflight: bool = Field(
        True, description="Measure the machine for some seconds first, plan with it, warn of a slow link."
    )
    host_cache: Size | None = Field(
        None, description="Of host_memory, bytes of records on disk to keep there; the plan's choice."
    )
    save_steps: Positive | None = Field(
        None,
        description=f"Steps between commits; 1 if all is on disk, else {MEMORY_SAVE_STEPS}. A stop commits.",
    )
    commit: bool = Field(
        True, description="on or off. off: half the room on the drives, no commits; a crash loses the run."
    )
    io_engine: EngineName | None = Field(None, description="I/O engine; the fastest that works here.")
    queue_depth: Positive | None = Field(
        None, description="I/O operations in flight on a drive; what offload bench measured best, else 32."
    )

    output_dir: UserPath = Field(description="Directory of the run; the model goes to output_dir/final.")
    logging_steps: Positive = Field(10, description="Steps between report lines.")
    eval_steps: Positive | None = Field(None, description="Steps between evaluations; else before and after.")
    trace: UserPath | None = Field(None, description="Write a Chrome trace of the run to this file.")

    @model_validator(mode="after")
    def _check_rollbacks(self) -> Self:
        for key in ("on_non_finite", "on_loss_spike"):
            if getattr(self, key) == "rollback" and self.snapshot_steps is None:
                raise ValueError(f"{key}: rollback goes back to a snapshot: set snapshot_steps, such as 100")
        return self

    @model_validator(mode="after")
    def _check_gradients(self) -> Self:
        if self.gradient_dtype is not None and self.max_grad_norm is None:
            raise ValueError("gradient_dtype is that of gradients that clipping keeps: set max_grad_norm")
        return self

    @model_validator(mode="after")
    def _check_undoing(self) -> Self:
        if self.on_non_finite == "stop" or self.max_grad_norm is not None:
            return self
        if self.commit_steps > 1 or not self.commit:
            why = f"commits are {self.commit_steps} steps apart" if self.commit else "commit is off"
            cure = "save_steps: 1" if self.commit else "commit: on"
            raise ValueError(
                f"on_non_finite: {self.on_non_finite} cannot undo updates that run during backward when"
                f" {why}: set {cure}, or max_grad_norm"
            )
        return self

    @model_validator(mode="after")
    def _check_commit(self) -> Self:
        if self.commit:
            return self
        if self.save_steps is not None:
            raise ValueError("save_steps: the steps between commits, and commit: off has none; leave one out")
        if self.snapshot_steps is not None:
            raise ValueError(
                "snapshot_steps: a snapshot is copied from what no write goes over, and with commit: off"
                " everything is written in place; leave one out"
            )
        return self

    @property
    def tier(self) -> Tier | None:
        """`home` as a tier; None leaves it to the plan."""
        return None if self.home is None else Tier(self.home)

    @property
    def commit_steps(self) -> int:
        """Steps between commits: `save_steps`, or what suits where the state is; 1 where that is open."""
        on_disk = self.home in (None, "disk") and not self.host_cache
        return self.save_steps or (1 if on_disk else MEMORY_SAVE_STEPS)

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step learns from."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def to_yaml(self) -> str:
        """Return the configuration as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


def load_config(path: Path | None, flags: Mapping[str, Any]) -> FinetuneConfig:
    """Merge a YAML file and flags into a configuration.

    Args:
        path: a flat YAML file, or None.
        flags: key -> value as given on the command line; None values were not given.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or given twice, or a value is wrong.
    """
    values = _map_names(read_yaml(path), str(path)) if path is not None else {}
    values |= _map_names(
        {key: value for key, value in flags.items() if value is not None}, "the command line"
    )
    try:
        return FinetuneConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: the file cannot be read or is not a YAML mapping.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE_NBYTES + 1)
        if len(text) > _MAX_FILE_NBYTES:
            raise ConfigError(f"{path} is longer than {_MAX_FILE_NBYTES:,} bytes: it is no configuration")
        values = _Loader(text.decode("utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except yaml.YAMLError as error:
        # Without the cause, which quotes the line.
        raise ConfigError(f"{path} is not YAML: {_problem(error)}") from None
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply; write 'key: value' lines") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, and holds a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _problem(error: yaml.YAMLError) -> str:
    """Return what is wrong and where; not the line itself, which may hold what is nobody's business."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())[:200]
    said = ", ".join(part for part in (error.context, error.problem) if part)[:200]
    mark = error.problem_mark or error.context_mark
    return said if mark is None else f"{said} (line {mark.line + 1}, column {mark.column + 1})"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _map_names(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = FinetuneConfig.model_fields
    mapped: dict[str, Any] = {}
    for given, value in values.items():
        name = given.replace("-", "_")
        if name in ELSEWHERE:
            raise ConfigError(f"{given} in {where} is not a key of offload finetune: {ELSEWHERE[name]}")
        if name in ALIASES:
            logging.getLogger(__name__).warning("%s in %s is read as %s", given, where, ALIASES[name])
            name = ALIASES[name]
        if name not in known:
            near = suggest(name, [*known, *ALIASES])
            raise ConfigError(f"unknown key {given:.80} in {where}{near or '; see offload finetune --help'}")
        if name in mapped:
            raise ConfigError(f"{name} is given twice in {where}, once as {given}")
        mapped[name] = value
    return mapped


def _explain(problem: Any) -> str:
    key = str(problem["loc"][0]) if problem["loc"] else "configuration"
    if problem["type"] == "missing":
        return f"{key} is missing: give it in the YAML file or as --{key}"
    reason = problem["msg"].removeprefix("Value error, ")
    if reason.startswith("Input "):
        # Redacted before it is cut: half a secret is not recognised.
        reason = f"{redact(repr(problem['input']))[:80]} {reason.removeprefix('Input ')}"
    return f"{key}: {reason}"
