"""The runs that lie in a directory: list them without touching anything, remove one that is ours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ..errors import StorageError
from .manifests import find_newest
from .rundir import RunDirectory, run_folder_name, runs_in

__all__ = ["RunInfo", "list_runs", "remove_run"]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run folder as found, possibly while a process writes to it.

    Attributes:
        run_id: the run.
        path: its folder here.
        problem: why it cannot be opened, None when it looks right; then the other fields are empty.
        drive: which drive of the run this folder is.
        directories: where its folders were when it was created, one a drive.
        generation: the newest valid one on this drive.
        nbytes: length of its data file here.
        state: what was committed with the generation.
        identity: what the run says it is.
    """

    run_id: str
    path: str
    problem: str | None = None
    drive: int = 0
    directories: tuple[str, ...] = ()
    generation: int = 0
    nbytes: int = 0
    state: Mapping[str, Any] | None = None
    identity: Mapping[str, Any] | None = None


def list_runs(directory: str | os.PathLike[str]) -> tuple[RunInfo, ...]:
    """Return the runs that have a folder in `directory`, without locking or changing anything.

    Raises:
        StorageError: `directory` cannot be listed.
    """
    directory = os.path.abspath(directory)
    return tuple(_look(directory, run_id) for run_id in runs_in(directory))


def remove_run(directories: Sequence[str | os.PathLike[str]], run_id: str) -> None:
    """Remove a run's folders from `directories`, each only after proof that it is ours.

    Every folder is checked and locked before anything is removed from the first. Only names that a run
    has are unlinked.

    Raises:
        LockedError: a live process uses the run.
        StorageError: no such run, a folder that is not provably ours, or one with foreign entries;
            nothing was removed.
    """
    with ExitStack() as stack:
        folders = []
        for directory in directories:
            folders.append(RunDirectory.open(os.path.abspath(directory), UUID(run_id)))
            stack.callback(folders[-1].close)
            # A process that ended while it made or removed the run left no proof, and nothing to lose.
            if not folders[-1].is_blank():
                folders[-1].read_owner()
            folders[-1].check_removable()
        for folder in folders:
            folder.acquire()
        for folder in folders:
            folder.remove()


def _look(directory: str, run_id: UUID) -> RunInfo:
    path = os.path.join(directory, run_folder_name(run_id))
    try:
        folder = RunDirectory.open(directory, run_id)
        try:
            owner = folder.read_owner()
            manifest = find_newest([folder]).manifest
        finally:
            folder.close()
        nbytes = manifest.drive_nbytes[owner.drive] if owner.drive < len(manifest.drive_nbytes) else 0
    except StorageError as error:
        return RunInfo(str(run_id), path, problem=str(error))
    return RunInfo(
        str(run_id),
        path,
        None,
        owner.drive,
        owner.directories,
        manifest.generation,
        nbytes,
        manifest.state,
        manifest.identity,
    )
