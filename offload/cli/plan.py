"""`offload plan`: parse the options, ask the planner, print its answer."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ..errors import CapacityError, ConfigError
from ..sizes import format_bytes, parse_bytes
from ..specs import MomentDType, RecordDType, Tier

if TYPE_CHECKING:
    from ..planner import Answer, ModelFacts, Question

__all__ = ["plan_command"]

HELP = """Say how a model would train on a machine: where its state lives, how fast, what it wears.

MODEL is a directory with a config.json (weights are not needed), or the name of a published shape, such as
llama-65b, qwen2.5-7b or gpt-175b. The machine is what offload bench measured of this one, or --machine FILE:
examples/machines holds some that you may not have.

MODEL may also be the YAML file of a run of offload finetune: then the plan is the one that this run obeys,
and the machine is measured for some seconds, as that command does it.

The table has a row for each link; the slowest one sets the pace. Every figure is bytes over bytes a second
(--explain shows them). What does not fit is refused with the bytes that are lacking and the nearest plan
that does fit (exit code 3). Nothing is written.

Examples:

  offload plan llama-65b --machine examples/machines/workstation-4090-4-drives.json

  offload plan models/my-model --batch 32 --length 2048 --moments 8bit --tbw 600TB

  offload plan run.yaml --explain

  offload plan llama-13b --what-if disks=4,host=256GiB

  offload plan qwen2.5-32b --explain
"""

MODEL, RUN, OUTPUT = "Machine and budgets", "The run", "Output"


def plan_command() -> Callable[..., None]:
    """Return the command."""

    def plan(
        model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, config.json or shape.")],
        machine: Annotated[
            Path | None,
            typer.Option(
                metavar="FILE", help="A machine.json; else this machine's own.", rich_help_panel=MODEL
            ),
        ] = None,
        host_memory: Annotated[
            str | None,
            typer.Option(
                metavar="SIZE",
                help="Budget of host memory; else 85 % of it (half without a GPU).",
                rich_help_panel=MODEL,
            ),
        ] = None,
        device_memory: Annotated[
            str | None,
            typer.Option(
                metavar="SIZE", help="Budget of the GPU's memory; else 90 % of it.", rich_help_panel=MODEL
            ),
        ] = None,
        tflops: Annotated[
            float | None,
            typer.Option(
                metavar="FLOAT",
                help="10^12 operations a second that training sustains.",
                rich_help_panel=MODEL,
            ),
        ] = None,
        tbw: Annotated[
            str | None,
            typer.Option(
                metavar="SIZE", help="What a drive is rated to have written: 600TB.", rich_help_panel=MODEL
            ),
        ] = None,
        batch: Annotated[
            int, typer.Option(metavar="INT", help="Rows that a step learns from.", rich_help_panel=RUN)
        ] = 16,
        length: Annotated[
            int, typer.Option(metavar="INT", help="Tokens of a row.", rich_help_panel=RUN)
        ] = 1024,
        rows: Annotated[
            int | None,
            typer.Option(metavar="INT", help="Rows computed at once; else as fit.", rich_help_panel=RUN),
        ] = None,
        home: Annotated[
            str | None,
            typer.Option(
                metavar="disk|host|device",
                help="Where the state rests; else the fastest.",
                rich_help_panel=RUN,
            ),
        ] = None,
        host_cache: Annotated[
            str | None,
            typer.Option(
                metavar="SIZE",
                help="Of host memory, for records on disk; else what is left.",
                rich_help_panel=RUN,
            ),
        ] = None,
        moments: Annotated[
            str, typer.Option(metavar="float32|8bit", help="Format of AdamW's moments.", rich_help_panel=RUN)
        ] = "float32",
        dtype: Annotated[
            str,
            typer.Option(
                metavar="bfloat16|float32",
                help="How masters are stored; exact either way.",
                rich_help_panel=RUN,
            ),
        ] = "bfloat16",
        compute_dtype: Annotated[
            str | None,
            typer.Option(
                metavar="bfloat16|float32",
                help="Else bfloat16 on a GPU, float32 without.",
                rich_help_panel=RUN,
            ),
        ] = None,
        max_grad_norm: Annotated[
            float | None,
            typer.Option(
                metavar="FLOAT", help="Clip to this norm: gradients are parked.", rich_help_panel=RUN
            ),
        ] = None,
        gradient_dtype: Annotated[
            str | None,
            typer.Option(
                metavar="bfloat16|float32",
                help="Of parked gradients.",
                rich_help_panel=RUN,
            ),
        ] = None,
        save_steps: Annotated[
            int | None,
            typer.Option(
                metavar="INT", help="Steps between commits; else 1 from disk, 100.", rich_help_panel=RUN
            ),
        ] = None,
        commit: Annotated[
            str,
            typer.Option(
                metavar="on|off", help="off: half the room, and a crash loses the run.", rich_help_panel=RUN
            ),
        ] = "on",
        what_if: Annotated[
            str | None,
            typer.Option(
                metavar="CHANGES",
                help="Also with these changes, side by side: disks=4,host=256GiB.",
                rich_help_panel=OUTPUT,
            ),
        ] = None,
        explain: Annotated[
            bool,
            typer.Option("--explain", help="The formulas, with the numbers put in.", rich_help_panel=OUTPUT),
        ] = False,
        json: Annotated[
            bool, typer.Option("--json", help="Everything, for other programs.", rich_help_panel=OUTPUT)
        ] = False,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)
        ] = False,
    ) -> None:
        given = {
            "machine": None if machine is None else str(machine),
            "host-memory": host_memory,
            "device-memory": device_memory,
            "tflops": None if tflops is None else f"{tflops:g}",
            "tbw": tbw,
            "batch": str(batch),
            "length": str(length),
            "rows": None if rows is None else str(rows),
            "home": home,
            "host-cache": host_cache,
            "moments": moments,
            "dtype": dtype,
            "compute-dtype": compute_dtype,
            "max-grad-norm": None if max_grad_norm is None else f"{max_grad_norm:g}",
            "gradient-dtype": gradient_dtype,
            "save-steps": None if save_steps is None else str(save_steps),
            "commit": commit,
        }
        # Before torch is imported, so that a typo is told at once.
        settings: dict[str, Any] = {
            "batch": batch,
            "length": length,
            "rows": rows,
            "home": None if home is None else Tier(_one_of("--home", home, [tier.value for tier in Tier])),
            "host_cache": None if host_cache is None else _size("--host-cache", host_cache, least=0),
            "moments": _one_of("--moments", moments, get_args(MomentDType)),
            "dtype": _one_of("--dtype", dtype, get_args(RecordDType)),
            "compute_dtype": _dtype("--compute-dtype", compute_dtype),
            "max_grad_norm": max_grad_norm,
            "gradient_dtype": _dtype("--gradient-dtype", gradient_dtype),
            "save_steps": _positive("--save-steps", save_steps),
            "commit": _one_of("--commit", commit, ("on", "off")) == "on",
            "flops_per_s": None if tflops is None else _positive("--tflops", tflops) * 1e12,
            "tbw_nbytes": None if tbw is None else _size("--tbw", tbw),
        }
        budgets = {"host_memory": host_memory, "device_memory": device_memory}
        sizes = {
            name: _size(f"--{name.replace('_', '-')}", text)
            for name, text in budgets.items()
            if text is not None
        }
        try:
            # Imported here: torch and transformers take seconds, which --help and a typo need not.
            from ..planner import Question, default_budgets
            from ._planning import read_machine, read_model, read_run, room_of
        except ModuleNotFoundError as error:
            if error.name == "transformers":
                raise ConfigError(
                    "offload plan needs transformers: python3 -m pip install 'offload[hf]'"
                ) from error
            raise
        if Path(model).suffix in (".yaml", ".yml"):
            if typed := _typed(given):
                raise ConfigError(f"{model} decides --{', --'.join(typed)}: change its keys")
            question, facts, lines = read_run(Path(model))
            for line in lines:
                typer.echo(line, err=True)
            _answer(
                model, facts, question, given, what_if=what_if, explain=explain, as_json=json, is_run=True
            )
            return
        found = read_machine(machine)
        host, device = default_budgets(found)
        settings |= {"host_memory": host, "device_memory": device} | sizes
        question = Question(machine=found, room_nbytes=room_of(found), **settings)
        _answer(model, read_model(model), question, given, what_if=what_if, explain=explain, as_json=json)

    plan.__doc__ = HELP
    return plan


def _answer(
    name: str,
    model: ModelFacts,
    question: Question,
    given: dict[str, str | None],
    *,
    what_if: str | None,
    explain: bool,
    as_json: bool,
    is_run: bool = False,
) -> None:
    from ..planner import plan_training, to_document, to_json
    from ..planner.pages import comparison_section
    from ..report.terminal import print_sections
    from . import _planning

    changed = None if what_if is None else _planning.what_if(question, what_if)
    answer = plan_training(question, model)
    if changed is not None and what_if is not None:
        other = plan_training(changed, model)
        if as_json:
            from ._runs import print_json

            sys.stdout.write(print_json({"as_it_is": to_document(answer), "what_if": to_document(other)}))
        else:
            print_sections([comparison_section(answer, other, what_if), *_sections(other, explain, is_run)])
        return
    if as_json:
        sys.stdout.write(to_json(answer))
    elif sections := _sections(answer, explain, is_run):
        print_sections(sections)
    if answer.plan is None and (is_run or not answer.fits_without):
        raise CapacityError(_refusal(answer, name, given))


def _sections(answer: Answer, explain: bool, is_run: bool) -> list[Any]:
    from ..planner.pages import answer_sections, explain_section
    from ..report.sections import Section

    sections = []
    if answer.fits_without:
        sections.append(Section("It fits without offload", lines=(_fits_words(answer),)))
        # A run takes place all the same.
        if answer.question.home is None and not is_run:
            return sections
    if answer.plan is not None:
        sections += answer_sections(answer)
        if explain:
            sections.append(explain_section(answer))
    return sections


def _fits_words(answer: Answer) -> str:
    where = "the GPU" if answer.question.machine.device is not None else "memory"
    return (
        f"{answer.model.name} with gradients and AdamW's state takes about"
        f" {format_bytes(answer.plain_nbytes)} in ordinary training, one row at a time, and {where} has"
        f" {format_bytes(answer.plain_limit_nbytes)}: train it as usual, which is faster than any offload;"
        " --home disk plans one all the same"
    )


def _refusal(answer: Answer, name: str, given: dict[str, str | None]) -> str:
    from ..planner.pages import refusal_text
    from ._planning import commands_of

    return refusal_text(answer, commands_of(answer.suggestions, name, _typed(given)))


def _typed(given: dict[str, str | None]) -> dict[str, str | None]:
    """Return the options that do not stand at their defaults, which need not be typed."""
    defaults = {"batch": "16", "length": "1024", "moments": "float32", "dtype": "bfloat16", "commit": "on"}
    return {key: value for key, value in given.items() if defaults.get(key) != value}


def _one_of(option: str, value: str, choices: Sequence[str]) -> Any:
    if value in choices:
        return value
    close = difflib.get_close_matches(value, choices, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(choices)}"
    raise ConfigError(f"{option}: {value!r} is not one of them; {hint}")


def _dtype(option: str, value: str | None) -> Any:
    return None if value is None else _one_of(option, value, ("bfloat16", "float32"))


def _size(option: str, text: str, *, least: int = 1) -> int:
    try:
        nbytes = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error
    return nbytes if nbytes >= least else _positive(option, nbytes)


def _positive(option: str, value: Any) -> Any:
    if value is not None and not value > 0:
        raise ConfigError(f"{option} must be positive, got {value}")
    return value
