"""The `offload` command: parse, call, print. One file a command; this one turns errors into messages.

A command prints its results to standard output and one message to standard error when it fails; the
exit code is that of the error's class. Tracebacks appear with --debug only. Passwords and tokens are struck
out of everything that is printed; see `offload.redaction`.

Nothing heavy is imported before a command runs, so `offload --help` is quick and the environment is
set before torch reads it.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from ..errors import OffloadError
from ..redaction import print_redacted_traceback, redacted_output
from .bench import bench_command
from .clean import clean_command
from .doctor import doctor_command
from .export import export_command
from .finetune import finetune_command
from .plan import plan_command
from .runs import runs_command
from .verify import verify_command

__all__ = ["main"]

# Read when the Hugging Face libraries are loaded.
ENVIRONMENT = {
    # Models come from local directories only; a mistyped path must not become a download.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always ends in `SystemExit`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.excepthook = print_redacted_traceback
    with redacted_output():
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        try:
            _make_app()(args=given, prog_name="offload")
        except OffloadError as error:
            if "--debug" in given:
                traceback.print_exc()
            sys.stderr.write(f"error: {_printable(str(error))}\n")
            sys.exit(error.exit_code)


def _printable(text: str) -> str:
    """Return text without what would steer a terminal; a name in a file may be anything."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def _make_app() -> typer.Typer:
    app = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
    )
    app.callback()(_root)
    # --learning-rate is --learning_rate: YAML keys, flags and other tools' spellings all work.
    either = {"token_normalize_func": lambda name: name.replace("-", "_")}
    app.command("finetune", context_settings=either)(finetune_command())
    app.command("bench", context_settings=either)(bench_command())
    app.command("doctor", context_settings=either)(doctor_command())
    app.command("plan", context_settings=either)(plan_command())
    app.command("runs", context_settings=either)(runs_command())
    app.command("verify", context_settings=either)(verify_command())
    app.command("export", context_settings=either)(export_command())
    app.command("clean", context_settings=either)(clean_command())
    return app


def _root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Fine-tune models several times larger than memory on one workstation."""


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"offload {version('offload')}")
        except PackageNotFoundError:
            typer.echo("offload, from a source tree that is not installed")
        raise typer.Exit
