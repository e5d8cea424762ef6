"""`offload finetune`: every key of `FinetuneConfig` as a flag, over a YAML file."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..training.config import ALIASES, ELSEWHERE, GROUPS, FinetuneConfig, load_config
from ..training.signals import OrderlyEnd

__all__ = ["finetune_command", "run"]

HELP = """Fine-tune every parameter of a local model whose state need not fit in memory.

Write the keys below into a YAML file, give them as flags, or both: a flag wins. Texts are packed into
rows; weights and optimizer state are streamed through the budgets from the drives; every step is
committed (with home: host or device, every save_steps-th; with commit: off, the last alone). Run the same
command again to go on after a stop, a crash or a power cut; budgets, homes and drives' places may change
then. The result is a Hugging Face model directory in output_dir/final.

Ctrl-C or SIGTERM once finishes the step, commits it and stops (exit code 130 or 143); twice leaves at
once, and nothing committed is lost. How long a stop takes is printed after the second step.

Example:

  offload finetune run.yaml --learning_rate 1e-5 --max_steps 100
"""

# The packages of the `hf` extra, which the command needs and the package does not.
EXTRA = {"transformers", "accelerate", "safetensors", "tokenizers"}


def finetune_command() -> Callable[..., None]:
    """Return the command: a function whose signature has one option per key."""

    def finetune(**given: Any) -> None:
        given.pop("debug")
        path = given.pop("config")
        for name in (*ALIASES, *ELSEWHERE):
            if given[name] and len(given[name]) == 1:
                given[name] = given[name][0]
        run(load_config(path, {key: value for key, value in given.items() if value}))

    parameters = [
        _parameter("config", Path | None, typer.Argument(help="YAML file with the keys below.")),
        *_options(),
        _parameter(
            "debug",
            bool,
            typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output"),
            default=False,
        ),
    ]
    finetune.__doc__ = HELP
    finetune.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    finetune.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return finetune


def run(config: FinetuneConfig) -> None:
    """Run a configuration; ends in `typer.Exit` with the run's exit code."""
    try:
        # Imported here: torch and transformers take seconds, which --help and a typo need not.
        from ..training.finetune import finetune
    except ModuleNotFoundError as error:
        if error.name in EXTRA:
            raise ConfigError(
                f"offload finetune needs {error.name}: python3 -m pip install 'offload[hf]'"
            ) from error
        raise
    try:
        with OrderlyEnd():
            result = finetune(config)
    except KeyboardInterrupt:
        typer.echo("interrupted; run the same command again to go on", err=True)
        raise typer.Exit(130) from None
    except SystemExit:
        # SIGTERM outside of the steps: what was begun has been taken back.
        typer.echo("terminated; run the same command again to go on", err=True)
        raise
    raise typer.Exit(result.exit_code)


def _options() -> list[inspect.Parameter]:
    options = []
    group = ""
    for name, field in FinetuneConfig.model_fields.items():
        group = GROUPS.get(name, group)
        default = field.get_default(call_default_factory=True)
        if isinstance(default, bool):
            default = "on" if default else "off"
        # None, [] and a required key have no default to show; their descriptions say what happens.
        shown = "" if field.is_required() or default in (None, []) else f" (default: {default})"
        many = typing.get_origin(field.annotation) is list
        option = typer.Option(
            f"--{name}",
            help=(field.description or "") + shown,
            metavar=_metavar(field.annotation, name),
            rich_help_panel=group,
            show_default=False,
        )
        options.append(_parameter(name, list[str] | None if many else str | None, option))
    # Taken so that `load_config` can map or explain them, as it does in a file.
    for name in (*ALIASES, *ELSEWHERE):
        options.append(_parameter(name, list[str] | None, typer.Option(f"--{name}", hidden=True)))
    return options


def _parameter(name: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _metavar(annotation: Any, name: str) -> str:
    """Return what stands for the value in the help: its kind, or its choices."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kind = typing.get_args(annotation)[0] if is_union else annotation
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        choices = "|".join(typing.get_args(kind))
        return choices if len(choices) <= 24 else "NAME"
    if name.endswith(("_memory", "_nbytes")):
        return "SIZE"
    if typing.get_origin(kind) is list or kind is Path:
        return "PATH"
    return {int: "INT", float: "FLOAT", bool: "on|off"}.get(kind, "TEXT")
