"""`offload clean`: remove runs and what interrupted creations and exports left, after showing and asking."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, OffloadError, StorageError

if TYPE_CHECKING:
    from ._runs import Target

__all__ = ["clean_command"]

HELP = """Remove runs and leftovers from directories: shows what would go, then asks.

DIR is a directory that runs lie in (name all drives of a run together), an output directory of
offload finetune, or one run's folder. Removed is only what is provably ours: run folders with a valid
ownership file, or what an interrupted creation or export left, and in each only the names that
offload gives its files. No symbolic link is followed. Kept, and named with the reason: a run in use, a folder
with a foreign file in it, the run of an output directory that DIR is a copy of, a run one of whose
drives is not among the directories (--run ID removes what is here of it all the same; where no drive of it
is there, nothing). Of an output directory its exported model, metrics and configuration stay.

Examples:

  offload clean /mnt/nvme0 /mnt/nvme1

  offload clean /mnt/nvme0 --leftovers --yes

  offload clean runs/first
"""


@dataclass(frozen=True, slots=True)
class _Item:
    """Something that can be removed."""

    what: str
    nbytes: int
    remove: Callable[[], None]


def clean_command() -> Callable[..., None]:
    """Return the command."""

    def clean(
        directories: Annotated[
            list[str], typer.Argument(metavar="DIR...", help="Where; all drives of a run together.")
        ],
        run: Annotated[
            str | None, typer.Option("--run", metavar="ID", help="Only this run; its id's beginning will do.")
        ] = None,
        leftovers: Annotated[
            bool, typer.Option("--leftovers", help="Only what was interrupted; no run with a commit.")
        ] = False,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    ) -> None:
        # Imported here, so that --help is quick.
        from ..report.terminal import printable
        from ..sizes import format_bytes
        from ._runs import choose, find_targets

        if run is not None and leftovers:
            raise ConfigError("--run and --leftovers exclude each other")
        targets: Sequence[Target] = find_targets(directories)
        if run is not None:
            targets = (choose(targets, run, directories),)
        items, kept = _plan(targets, directories, alone=run is not None, leftovers=leftovers)
        for line in kept:
            typer.echo(printable(f"kept: {line}"))
        if not items:
            typer.echo("nothing to remove")
            return
        for item in items:
            typer.echo(printable(f"{format_bytes(item.nbytes):>10}  {item.what}"))
        total = format_bytes(sum(item.nbytes for item in items))
        if not yes and not _confirmed(f"Remove these {len(items)}, {total}?"):
            typer.echo("nothing was removed")
            raise typer.Exit(1)
        errors = _remove(items)
        for error in errors:
            typer.echo(printable(f"kept: {error}"), err=True)
        typer.echo(f"removed {len(items) - len(errors)} of {len(items)}")
        if errors:
            raise typer.Exit(errors[0].exit_code)

    clean.__doc__ = HELP
    return clean


def _plan(
    targets: Sequence[Target], directories: Sequence[str], *, alone: bool, leftovers: bool
) -> tuple[list[_Item], list[str]]:
    """Return what can be removed, and what is kept and why."""
    items: list[_Item] = []
    kept: list[str] = []
    for target in targets:
        reason = _why_kept(target, alone=alone, leftovers=leftovers)
        if reason is None:
            items.append(_run_item(target))
        elif reason:
            kept.append(f"{target.label}: {reason}")
    for folder in [] if alone else _export_leftovers(targets, directories):
        try:
            _remove_leftover(folder, dry_run=True)
        except OffloadError as error:
            kept.append(str(error))
        else:
            what = f"{folder}: left by an interrupted export"
            items.append(_Item(what, _nbytes(folder), lambda folder=folder: _remove_leftover(folder)))  # type: ignore[misc]
    return items, kept


def _why_kept(target: Target, *, alone: bool, leftovers: bool) -> str | None:
    """Return why a run is kept; None when it can go, and nothing when it is not meant."""
    from ..store import RunState, check_removable

    run = target.run
    if leftovers and run.state is not RunState.UNFINISHED:
        return ""
    if run.state is RunState.IN_USE:
        return run.reason
    if original := _copied_from(target):
        return (
            f"{target.output} is a copy of {original}, whose run this is; name {original} to remove the"
            " run, or remove the copy by hand"
        )
    if not _directories(target) and (elsewhere := _outside(target)):
        return (
            f"nothing of it is in {', '.join(elsewhere)}, and {target.output} alone says that it is theirs:"
            f" mount its drives and name it again, or remove {target.output}/run.json where they are gone for"
            " good"
        )
    if run.state is RunState.DRIVE_MISSING and not alone:
        return f"{run.reason}; --run {run.run_id} removes what is here"
    try:
        check_removable(_directories(target), run.run_id)
    except StorageError as error:
        return str(error)
    return None


def _copied_from(target: Target) -> str | None:
    """Return the output directory that has the run if the one named is a copy of it, else None."""
    from ..training.pointer import find_original, is_same_directory

    if target.output is None or target.pointer is None:
        return None
    original = find_original(target.output, target.pointer)
    if original is None:
        return None
    shared = any(is_same_directory(mine, theirs) for mine in _directories(target) for theirs in original.disk)
    return target.pointer.directory if shared else None


def _outside(target: Target) -> list[str]:
    """Return the directories of a run that lie outside of its output directory: drives that may come back."""
    from ..training.pointer import run_directories

    if target.output is None or target.pointer is None:
        return []
    return [
        directory
        for directory in run_directories(target.output, target.pointer)
        if not Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(target.output))
    ]


def _run_item(target: Target) -> _Item:
    from ._runs import age, model_of, step_of

    run = target.run
    step = step_of(run.newest)
    said = f"step {step}, {age(run.newest.committed_s)}" if step is not None else run.state.value
    folders = ", ".join(folder.path for folder in run.folders)
    nbytes = sum(_nbytes(Path(folder.path)) for folder in run.folders)
    return _Item(f"{target.label} ({model_of(target)}, {said}): {folders}", nbytes, lambda: _drop(target))


def _drop(target: Target) -> None:
    """Remove a run, then what names it: so a kill in between leaves no drive that nothing names."""
    from ..store import remove_run
    from ..training.pointer import POINTER_NAME

    directories = _directories(target)
    if directories:
        remove_run(directories, target.run.run_id)
    if target.output is None:
        return
    (target.output / POINTER_NAME).unlink(missing_ok=True)
    state = target.output / "state"
    # The folder that finetune makes for a run without drives; anything else in it keeps it.
    if str(state) in directories and not any(state.iterdir()):
        state.rmdir()


def _directories(target: Target) -> list[str]:
    """Return where the run has folders; an output directory may name one that is not there."""
    return [folder.directory for folder in target.run.folders if os.path.lexists(folder.path)]


def _export_leftovers(targets: Sequence[Target], directories: Sequence[str]) -> list[Path]:
    from ..export.folder import find_leftovers

    places = [Path(os.path.abspath(directory)) for directory in directories]
    places += [target.output for target in targets if target.output is not None]
    return [folder for place in dict.fromkeys(places) for folder in find_leftovers(place)]


def _remove_leftover(folder: Path, *, dry_run: bool = False) -> None:
    from ..export.folder import remove_export

    remove_export(folder, dry_run=dry_run)


def _remove(items: Sequence[_Item]) -> list[OffloadError]:
    """Remove each; one that fails does not keep the others."""
    errors: list[OffloadError] = []
    for item in items:
        try:
            item.remove()
        except OffloadError as error:
            errors.append(error)
        except OSError as error:
            errors.append(StorageError(f"{item.what}: {error}", errno=error.errno or 0))
    return errors


def _confirmed(question: str) -> bool:
    """Ask; a script, which cannot answer, is told of --yes."""
    if not sys.stdin.isatty():
        raise ConfigError("there is nobody to ask, since standard input is no terminal; add --yes to remove")
    return typer.confirm(question, default=False)


def _nbytes(folder: Path) -> int:
    """Return what a folder takes on its drive; links are not followed."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
    except OSError:
        return 0
