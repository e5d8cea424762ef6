"""What `offload plan` reads and writes around the planner: the machine, the model, what-ifs and commands."""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ..errors import ConfigError
from ..machine import Machine, default_machine_path, file_system_id, load_machine
from ..planner import (
    ModelFacts,
    Question,
    Suggestion,
    config_of_shape,
    default_budgets,
    describe_config,
    find_shape,
)
from ..planner.model import build_without_memory
from ..sizes import parse_bytes
from ..specs import Tier
from ..training.config import load_config
from ..training.job import choose_device
from ..training.output import OutputDirectory
from ..training.planning import RunQuestion, run_question

__all__ = ["commands_of", "read_machine", "read_model", "read_run", "room_of", "what_if"]

# What transformers raises for a config that is no mapping, or whose values are of other types.
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def read_model(name: str) -> ModelFacts:
    """Return what is to be known of the model: a directory, a config.json, or a published shape's name.

    Raises:
        ConfigError: there is no such thing, or no plan can be made for it.
    """
    if not _is_path(name):
        return describe_config(config_of_shape(find_shape(name)), name)
    path = Path(name).expanduser()
    return describe_config(_read_config(path), path.name if path.is_dir() else str(path))


def read_run(path: Path) -> tuple[Question, ModelFacts, tuple[str, ...]]:
    """Return the question that a configuration of `offload finetune` is, as that command asks it.

    Raises:
        ConfigError: the configuration, or its model's, cannot be used; or nobody measured the machine.
    """
    config = load_config(path, {})
    device, compute = choose_device(config)
    name = config.model_name_or_path
    model = build_without_memory(_read_config(name), name.name).to(getattr(torch, compute))
    output = OutputDirectory(config.output_dir)
    pointer = output.pointer()
    asked = RunQuestion(
        config,
        model,
        tuple(config.disk) or (output.state,),
        device,
        compute,
        resumes=pointer is not None and pointer.imported,
    )
    question, facts, lines = run_question(asked)
    if question is None:
        raise ConfigError(_no_machine(default_machine_path(), asked=False))
    return question, facts, lines


def _read_config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"{file} does not exist: name a model directory with a config.json (weights are not needed), or a"
            " shape such as llama-65b"
        )
    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except (*_UNUSABLE, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"transformers cannot use {file}: {text or type(error).__name__}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{file} is of a quantized model; plan for the model that it was made from")
    return config


def read_machine(path: Path | None) -> Machine:
    """Return the machine of a file, or of this machine's own.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    chosen = default_machine_path() if path is None else path
    try:
        return load_machine(chosen)
    except FileNotFoundError as error:
        raise ConfigError(_no_machine(chosen, asked=path is not None)) from error
    except IsADirectoryError as error:
        raise ConfigError(f"--machine: {chosen} is a directory; name a machine.json") from error
    except OSError as error:
        raise ConfigError(f"--machine: cannot read {chosen}: {error.strerror}") from error


def room_of(machine: Machine) -> tuple[int | None, ...]:
    """Return the bytes free on each drive: now, where it is the drive of this machine, else its capacity."""
    room = []
    for drive in machine.drives:
        try:
            here = file_system_id(drive.path) == drive.device
            room.append(shutil.disk_usage(drive.path).free if here else drive.capacity_nbytes)
        except OSError:
            # Not mounted here: the machine is another one.
            room.append(drive.capacity_nbytes)
    return tuple(room)


def what_if(question: Question, text: str) -> Question:
    """Return the question with the changes of `disks=4,host=256GiB`.

    Raises:
        ConfigError: a name or a value is not one.
    """
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in _CHANGES or not equals:
            close = difflib.get_close_matches(name, _CHANGES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_CHANGES)}"
            raise ConfigError(f"--what-if: {part.strip()!r} is not NAME=VALUE with a known name; {hint}")
        try:
            question = _CHANGES[name](question, value)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"--what-if {name}: {error}") from error
    return question


def commands_of(
    suggestions: Sequence[Suggestion], model: str, given: Mapping[str, str | None]
) -> tuple[str, ...]:
    """Return the command line that asks for each suggestion: as given, with its flags changed."""
    lines = []
    for suggestion in suggestions:
        flags = {**{name: value for name, value in given.items() if value is not None}}
        for name, value in suggestion.flags:
            flags[name] = f"{flags[name]},{value}" if name == "what-if" and name in flags else value
        words = ["offload", "plan", model]
        for name, value in flags.items():
            words += [f"--{name}", value]
        lines.append(shlex.join(words))
    return tuple(lines)


def _is_path(name: str) -> bool:
    return os.path.exists(Path(name).expanduser()) or "/" in name or name.startswith((".", "~"))


def _no_machine(path: Path, *, asked: bool) -> str:
    if asked:
        folder = path.absolute().parent
        names = [entry.name for entry in folder.glob("*.json")] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = (
            f"did you mean {folder / close[0]}?" if close else "'offload bench DIR --machine FILE' writes one"
        )
        return f"--machine: {path} does not exist; {hint}"
    return (
        f"this machine was not measured ({path} does not exist): run 'offload bench DIR' with a directory on"
        " each drive, or plan for a machine that you do not have, with --machine"
        " examples/machines/workstation-4090-4-drives.json"
    )


# -- what if -------------------------------------------------------------------------------------


def _positive(value: str, kind: Callable[[str], Any]) -> Any:
    number = kind(value)
    if not number > 0:
        raise ValueError(f"must be positive, got {value}")
    return number


def _disks(question: Question, value: str) -> Question:
    machine, count = question.machine, int(value)
    if count < 0:
        raise ValueError(f"must not be negative, got {value}")
    if count and not machine.drives:
        raise ValueError("the machine has no drive to take as an example")
    drives = tuple(machine.drives[index % len(machine.drives)] for index in range(count))
    room = tuple(question.room_nbytes[index % len(question.room_nbytes)] for index in range(count))
    changed = replace(machine, drives=drives, together=machine.together if drives == machine.drives else None)
    return replace(question, machine=changed, room_nbytes=room)


def _host(question: Question, value: str) -> Question:
    machine = replace(question.machine, memory_nbytes=_positive(value, parse_bytes))
    host, device = default_budgets(machine)
    changed = {"host_memory": host} | ({} if machine.device else {"device_memory": device})
    return replace(question, machine=machine, **changed)  # type: ignore[arg-type]


def _device(question: Question, value: str) -> Question:
    if question.machine.device is None:
        raise ValueError("the machine has no GPU")
    device = replace(question.machine.device, memory_nbytes=_positive(value, parse_bytes))
    machine = replace(question.machine, device=device)
    return replace(question, machine=machine, device_memory=default_budgets(machine)[1])


def _drives(question: Question, **changed: float) -> Question:
    drives = tuple(replace(drive, **changed) for drive in question.machine.drives)  # type: ignore[arg-type]
    return replace(question, machine=replace(question.machine, drives=drives, together=None))


def _link(question: Question, value: str) -> Question:
    if question.machine.device is None:
        raise ValueError("the machine has no GPU")
    rate = float(_positive(value, parse_bytes))
    old = question.machine.device
    both = old.both_ways_bytes_per_s * rate / old.pinned_to_device_bytes_per_s
    device = replace(
        old,
        pinned_to_device_bytes_per_s=rate,
        device_to_pinned_bytes_per_s=rate,
        both_ways_bytes_per_s=both,
    )
    return replace(question, machine=replace(question.machine, device=device))


def _choice(choices: Mapping[str, Any], value: str) -> Any:
    if value not in choices:
        raise ValueError(f"{value!r} is not one of {', '.join(choices)}")
    return choices[value]


_HOMES = {tier.value: tier for tier in Tier}

_CHANGES: Mapping[str, Callable[[Question, str], Question]] = {
    "disks": _disks,
    "host": _host,
    "device": _device,
    "read": lambda question, value: _drives(question, read_bytes_per_s=float(_positive(value, parse_bytes))),
    "write": lambda question, value: _drives(
        question, write_bytes_per_s=float(_positive(value, parse_bytes))
    ),
    "link": _link,
    "tflops": lambda question, value: replace(question, flops_per_s=_positive(value, float) * 1e12),
    "batch": lambda question, value: replace(question, batch=_positive(value, int)),
    "length": lambda question, value: replace(question, length=_positive(value, int)),
    "home": lambda question, value: replace(question, home=_choice(_HOMES, value)),
    "commit": lambda question, value: replace(question, commit=_choice({"on": True, "off": False}, value)),
    "moments": lambda question, value: replace(
        question, moments=_choice({"float32": "float32", "8bit": "8bit"}, value)
    ),
}
