"""`offload runs`: what runs lie in directories, and what can be done with each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ._runs import Target

__all__ = ["runs_command"]

HELP = """List the runs in directories: model, step, size, age and state. Nothing is changed.

DIR is a directory that runs lie in (name all drives of a run together), an output directory of
offload finetune, a directory of such, or one run's folder. A run that is being trained is listed as well.

States: complete - it goes on from its step; in use - by the process named; unfinished - interrupted before
anything was committed; lost - it ran with commit: off and did not end in order; damaged - a manifest or a
folder is not what was written; drive missing.

Examples:

  offload runs /mnt/nvme0 /mnt/nvme1

  offload runs runs/first --json
"""


def runs_command() -> Callable[..., None]:
    """Return the command."""

    def runs(
        directories: Annotated[
            list[str], typer.Argument(metavar="DIR...", help="Where to look; all drives of a run together.")
        ],
        json: Annotated[bool, typer.Option("--json", help="Everything, for other programs.")] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    ) -> None:
        # Imported here, so that --help is quick.
        from ._runs import find_targets, print_json, to_json

        targets = find_targets(directories)
        if json:
            found = [{**to_json(target), "snapshots": _snapshots(target)} for target in targets]
            sys.stdout.write(print_json({"runs": found}))
        else:
            _show(targets, directories)

    runs.__doc__ = HELP
    return runs


def _show(targets: tuple[Target, ...], directories: list[str]) -> None:
    from ..report.terminal import printable
    from ..sizes import format_bytes
    from ._runs import age, model_of, step_of

    if not targets:
        typer.echo(f"no runs in {printable(' '.join(directories))}")
        return
    rows = [("run", "model", "step", "generation", "size", "committed", "state")]
    for target in targets:
        newest = target.run.newest
        step = step_of(newest)
        rows.append(
            (
                target.run.run_id,
                model_of(target),
                "-" if step is None else f"{step:,}",
                f"{newest.generation:,}",
                format_bytes(target.run.nbytes),
                age(newest.committed_s),
                target.run.state.value,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for line in _details(targets[number - 1]) if number else ():
            typer.echo(f"  {printable(line)}")


def _details(target: Target) -> list[str]:
    """Return what does not fit into the row."""
    lines = []
    if target.output is not None:
        lines.append(f"output directory: {target.output}")
    lines.append(f"folders: {', '.join(folder.path for folder in target.run.folders)}")
    if target.run.reason:
        lines.append(target.run.reason)
    for snapshot in _snapshots(target):
        state = snapshot["problem"] or f"step {snapshot['step']}"
        lines.append(f"snapshot {snapshot['name']}: {state}")
    return lines


def _snapshots(target: Target) -> list[dict[str, object]]:
    from ..store import list_snapshots

    directories = [folder.directory for folder in target.run.folders if folder.problem is None]
    if not directories:
        return []
    return [
        {
            "name": snapshot.name,
            "problem": snapshot.problem,
            "generation": snapshot.generation,
            "step": (snapshot.state or {}).get("step"),
            "nbytes": snapshot.nbytes,
        }
        for snapshot in list_snapshots(directories, target.run.run_id)
    ]
