"""`offload doctor`: look at the machine, show it on one screen, and end with how bad it is.

Owns the options; `offload.doctor` collects, judges and shows.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..errors import ConfigError, PlanError

__all__ = ["doctor_command"]

HELP = """Look at this machine and say what will not work, what slows offload down, and the cure of each.

DIR is a directory on each drive that runs are to lie on. Without any it is those that offload bench
measured, and the working directory. In each a file of 1 MiB is written, read back and gone; nothing else
is written anywhere. It takes about two seconds.

Shown are versions, GPU and driver, memory and limits, the I/O engine and why, and of each directory file
system, mount options, room, O_DIRECT and drive. Then what is wrong, the worst first:

  error    - something will not work          (exit code 2)

  warning  - it works, but slower, or promises less          (exit code 1)

  note     - good to know          (exit code 0)

The screen fits into a bug report: it names neither the host nor its user, but paths and models of drives.

Examples:

  offload doctor

  offload doctor /mnt/nvme0 /mnt/nvme1

  offload doctor /mnt/nvme0 --json | jq '.findings[] | select(.severity == "error")'
"""


def doctor_command() -> Callable[..., None]:
    """Return the command."""

    def doctor(
        directories: Annotated[
            list[str] | None, typer.Argument(metavar="DIR", help="Where runs are to lie, one a drive.")
        ] = None,
        json: Annotated[
            bool, typer.Option("--json", help="All facts and findings, for other programs.")
        ] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    ) -> None:
        if directories and "" in directories:
            raise ConfigError(
                "a DIR is empty, as of a variable that is not set; name a directory on each drive"
            )
        # Imported here, so that --help is quick.
        try:
            from ..doctor.checks import find_problems
            from ..doctor.collect import collect_facts
            from ..doctor.document import to_json
            from ..doctor.finding import exit_code
            from ..doctor.screen import print_screen
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "offload"):
                raise
            raise PlanError(
                f"{package} is not installed: python3 -m pip install {package}, or install offload with"
                " its dependencies (python3 -m pip install .)"
            ) from error
        logger = logging.getLogger("offload.aio")
        level = logger.level
        if not debug:
            # The engine's messages would come before the screen that says the same.
            logger.setLevel(logging.ERROR)
        try:
            facts = collect_facts(directories or [])
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing is left behind", err=True)
            raise typer.Exit(130) from None
        finally:
            logger.setLevel(level)
        findings = find_problems(facts)
        if json:
            sys.stdout.write(to_json(facts, findings))
        else:
            print_screen(facts, findings)
        raise typer.Exit(exit_code(findings))

    doctor.__doc__ = HELP
    return doctor
