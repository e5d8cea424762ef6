"""The runs that lie in directories: list them without touching anything, remove one that is ours.

`list_runs` looks at one directory and tells what each run folder there says for itself; `find_runs` puts
the folders of a run on several drives together and says in which state the run is.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ..errors import LockedError, StorageError
from .manifests import find_newest
from .rundir import RunDirectory, run_folder_name, runs_in

__all__ = ["FoundRun", "RunInfo", "RunState", "check_removable", "find_runs", "list_runs", "remove_run"]


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
        holder: pid of the process that writes to it, 0 where it is not known; None for nobody.
        committed_s: when the manifest was written, in seconds since 1970.
        notes: damaged manifests that were passed over, one line each.
        is_lost: whether it is written in place and was not closed in order; then `state` is None. So is a run
            that is in use at this moment.
        is_unfinished: whether a process ended while it made or removed the folder; it proves nothing,
            and nothing is lost with it.
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
    holder: int | None = None
    committed_s: float | None = None
    notes: tuple[str, ...] = ()
    is_lost: bool = False
    is_unfinished: bool = False

    @property
    def directory(self) -> str:
        """The directory that the folder lies in."""
        return os.path.dirname(self.path)


class RunState(enum.Enum):
    """What can be done with a run."""

    COMPLETE = "complete"  # it can be opened and goes on from its newest generation
    IN_USE = "in use"  # a process has it open
    LOST = "lost"  # it was written in place, without commits, and did not end in order
    UNFINISHED = "unfinished"  # its creation or first import was interrupted: nothing was committed
    DAMAGED = "damaged"  # a manifest or a folder is not what was written
    DRIVE_MISSING = "drive missing"  # a part of it was not found


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run with all its folders that were found.

    Attributes:
        run_id: the run.
        folders: what was found, by drive.
        state: what can be done with it.
        reason: one sentence for a state that needs one, empty otherwise.
    """

    run_id: str
    folders: tuple[RunInfo, ...]
    state: RunState
    reason: str

    @property
    def directories(self) -> tuple[str, ...]:
        """The directories its folders lie in: what opens it."""
        return tuple(folder.directory for folder in self.folders)

    @property
    def newest(self) -> RunInfo:
        """The folder that holds the newest generation."""
        return max(self.folders, key=lambda folder: (folder.problem is None, folder.generation))

    @property
    def nbytes(self) -> int:
        """Length of the data files that were found."""
        return sum(folder.nbytes for folder in self.folders)

    @property
    def holder(self) -> int | None:
        """Pid of the process that has it open, 0 where it is not known; None for nobody."""
        return next((folder.holder for folder in self.folders if folder.holder is not None), None)


def list_runs(directory: str | os.PathLike[str]) -> tuple[RunInfo, ...]:
    """Return the runs that have a folder in `directory`, without changing anything.

    Raises:
        StorageError: `directory` cannot be listed.
    """
    directory = os.path.abspath(directory)
    return tuple(_look(directory, run_id) for run_id in runs_in(directory))


def find_runs(directories: Sequence[str | os.PathLike[str]]) -> tuple[FoundRun, ...]:
    """Return the runs that have a folder in any of `directories`, the newest commit first.

    Nothing is changed, and no run is kept from its user.

    Raises:
        StorageError: a directory cannot be listed.
    """
    folders: dict[str, list[RunInfo]] = {}
    for directory in dict.fromkeys(os.path.abspath(path) for path in directories):
        for info in list_runs(directory):
            folders.setdefault(info.run_id, []).append(info)
    runs = [_judge(run_id, infos) for run_id, infos in folders.items()]
    return tuple(sorted(runs, key=lambda run: (-(run.newest.committed_s or 0), run.run_id)))


def check_removable(directories: Sequence[str | os.PathLike[str]], run_id: str) -> None:
    """Raise what `remove_run` would, and change nothing."""
    with ExitStack() as stack:
        for folder in _open_removable(stack, directories, run_id):
            holder = folder.find_holder()
            if holder is not None:
                raise LockedError(
                    f"{folder.path} is being used by process {holder or 'unknown'}", path=folder.path
                )


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
        folders = _open_removable(stack, directories, run_id)
        for folder in folders:
            folder.acquire()
        for folder in folders:
            folder.remove()


def _open_removable(
    stack: ExitStack, directories: Sequence[str | os.PathLike[str]], run_id: str
) -> list[RunDirectory]:
    folders = []
    for directory in directories:
        folders.append(RunDirectory.open(os.path.abspath(directory), UUID(run_id)))
        stack.callback(folders[-1].close)
        # A process that ended while it made or removed the run left no proof, and nothing to lose.
        if not folders[-1].is_blank():
            folders[-1].read_owner()
        folders[-1].check_removable()
    return folders


def _look(directory: str, run_id: UUID) -> RunInfo:
    path = os.path.join(directory, run_folder_name(run_id))
    holder: int | None = None
    blank = False
    try:
        folder = RunDirectory.open(directory, run_id)
        try:
            blank = folder.is_blank()
            holder = folder.find_holder()
            owner = folder.read_owner()
            if not folder.manifest_generations():
                # The first manifest is published last.
                return RunInfo(
                    str(run_id),
                    path,
                    "its creation was interrupted",
                    owner.drive,
                    owner.directories,
                    holder=holder,
                    is_unfinished=True,
                )
            recovered = find_newest([folder])
            manifest = recovered.manifest
            committed_s = folder.written_s(folder.manifest_name(manifest.generation))
        finally:
            folder.close()
        nbytes = manifest.drive_nbytes[owner.drive] if owner.drive < len(manifest.drive_nbytes) else 0
    except StorageError as error:
        problem = "its creation or removal was interrupted" if blank else str(error)
        return RunInfo(str(run_id), path, problem, holder=holder, is_unfinished=blank)
    return RunInfo(
        str(run_id),
        path,
        None,
        owner.drive,
        owner.directories,
        manifest.generation,
        nbytes,
        # What was committed with it is there no more.
        None if manifest.in_use else manifest.state,
        manifest.identity,
        holder,
        committed_s,
        recovered.notes,
        manifest.in_use,
    )


def _judge(run_id: str, infos: Sequence[RunInfo]) -> FoundRun:
    folders = tuple(sorted(infos, key=lambda info: (info.problem is not None, info.drive, info.path)))
    state, reason = _state(folders)
    return FoundRun(run_id, folders, state, reason)


def _state(folders: Sequence[RunInfo]) -> tuple[RunState, str]:
    holder = next((folder.holder for folder in folders if folder.holder is not None), None)
    if holder is not None:
        return RunState.IN_USE, f"being used by process {holder}" if holder else "being used by a process"
    for folder in folders:
        if folder.problem is not None and not folder.is_unfinished:
            return RunState.DAMAGED, folder.problem
    for folder in folders:
        if folder.problem is not None:
            return RunState.UNFINISHED, folder.problem
    # A commit may have come to this drive and not yet to another: the newest counts, as in a recovery.
    if max(folders, key=lambda folder: folder.generation).is_lost:
        return RunState.LOST, "it was written in place (commit: off) and did not end in order"
    drives = [folder.drive for folder in folders]
    for drive, folder in zip(drives[1:], folders[1:], strict=True):
        if drives.count(drive) > 1:
            return RunState.DAMAGED, f"{folder.path} and another folder are both drive {drive}"
    for drive, directory in enumerate(folders[0].directories):
        if drive not in drives:
            return RunState.DRIVE_MISSING, (
                f"drive {drive} of {len(folders[0].directories)} is not here; it was {directory}"
            )
    notes = [note for folder in folders for note in folder.notes]
    if notes:
        return RunState.DAMAGED, f"it goes on from an older manifest, or a copy: {notes[0]}"
    if max(folder.generation for folder in folders) == 0:
        return RunState.UNFINISHED, "its first import did not finish"
    return RunState.COMPLETE, ""
