"""The descriptions of snapshots on all drives: publish, find, list, remove, and what a crash left.

A snapshot has two files on each drive: `snapshot-<name>.bin` with the drive's part of the records, and
its description `snapshot-<name>`, the same bytes on every drive. It exists when one drive has its
description: that gets its final name when the data of every drive is durable, and loses it on every
drive before any data goes. So data without a description anywhere was never, or is no longer, a
snapshot.

Thread rule: none of its own; the store calls it from one thread at a time.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ..errors import CorruptionError, DiskFullError, StateError, StorageError
from . import files
from .records import MAX_MANIFEST_NBYTES
from .rundir import RunDirectory
from .snapshot_format import Snapshot, decode_snapshot

__all__ = [
    "Found",
    "SnapshotInfo",
    "data_name",
    "description_name",
    "find",
    "is_there",
    "list_snapshots",
    "look",
    "publish",
    "recover",
    "remove",
    "remove_data",
    "stage",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot as found.

    Attributes:
        name: its name.
        error: why it cannot be restored, None when it looks right; then the other fields are empty.
        generation: the generation it is a copy of; a greater one is a later snapshot.
        nbytes: of its records, on all drives together.
        state: what was committed with the generation.
    """

    name: str
    error: StorageError | None = None
    generation: int = 0
    nbytes: int = 0
    state: Mapping[str, Any] | None = None

    @property
    def problem(self) -> str | None:
        """The message of `error`."""
        return None if self.error is None else str(self.error)

    @property
    def is_lost(self) -> bool:
        """Whether it is damaged, or a part of it is gone. Another error may be gone at the next look."""
        return isinstance(self.error, CorruptionError) or (
            self.error is not None and self.error.errno == errno.ENOENT
        )


def list_snapshots(directories: Sequence[str | os.PathLike[str]], run_id: str) -> tuple[SnapshotInfo, ...]:
    """Return the snapshots of a run, the oldest first, without locking or changing anything.

    Args:
        directories: where the run has folders; those of some of its drives are enough to see the names.
        run_id: the run.

    Raises:
        StorageError: a folder cannot be opened or is not ours.
    """
    folders: list[RunDirectory] = []
    try:
        for directory in directories:
            folders.append(RunDirectory.open(os.path.abspath(directory), UUID(run_id)))
        return look(folders)
    finally:
        for folder in folders:
            folder.close()


def look(folders: Sequence[RunDirectory]) -> tuple[SnapshotInfo, ...]:
    """Return the snapshots that have a description in `folders`, the oldest first, damaged ones before."""
    present = [folder.snapshot_names() for folder in folders]
    infos = []
    for name in sorted(set().union(*(described for described, _ in present))):
        try:
            snapshot = find(folders, name).snapshot
        except StorageError as error:
            infos.append(SnapshotInfo(name, error))
            continue
        except StateError:
            continue  # Its process removed it in this moment.
        lacking = [
            folder.path_of(data_name(name))
            for folder, (_, data) in zip(folders, present, strict=True)
            if name not in data
        ]
        if lacking:
            missing = StorageError(f"{lacking[0]} is missing", errno=errno.ENOENT, path=lacking[0])
            infos.append(SnapshotInfo(name, missing))
        else:
            infos.append(SnapshotInfo(name, None, snapshot.generation, snapshot.nbytes, snapshot.state))
    return tuple(sorted(infos, key=lambda info: (info.generation, info.name)))


def is_there(folders: Sequence[RunDirectory], name: str) -> bool:
    """Return whether any folder has a description of that name."""
    return any(name in folder.snapshot_names()[0] for folder in folders)


@dataclass(frozen=True, slots=True)
class Found:
    """A valid description.

    Attributes:
        snapshot: what it says.
        data: its bytes.
        path: the file.
        holders: positions of the folders that hold it.
    """

    snapshot: Snapshot
    data: bytes
    path: str
    holders: frozenset[int]


def find(folders: Sequence[RunDirectory], name: str) -> Found:
    """Return the description of a snapshot that is valid on at least one of `folders`.

    Raises:
        StateError: there is no snapshot of that name.
        CorruptionError: all its descriptions are damaged, or two valid ones differ.
        StorageError: written by a newer major version of the format.
    """
    found: Found | None = None
    problems: list[CorruptionError] = []
    for position, folder in enumerate(folders):
        path = folder.path_of(description_name(name))
        try:
            data = files.read_file(folder.fd, description_name(name), path, MAX_MANIFEST_NBYTES)
            snapshot = decode_snapshot(data, path, folder.run_id, name)
        except CorruptionError as error:
            problems.append(error)
            continue
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            continue
        if found is None:
            found = Found(snapshot, data, path, frozenset({position}))
        elif found.data == data:
            found = Found(snapshot, data, found.path, found.holders | {position})
        else:
            raise CorruptionError(
                f"{path} and {found.path} are both valid and differ: the folders do not belong together",
                path=path,
            )
    if found is not None:
        return found
    if problems:
        raise problems[0]
    run_id = folders[0].run_id if folders else None
    raise StateError(f"run {run_id} has no snapshot {name!r}; 'offload runs' lists what there is")


def stage(folders: Sequence[RunDirectory], name: str, data: bytes) -> None:
    """Write a description durably on every drive, under a temporary name.

    Raises:
        StorageError: a drive has no room or fails. What was staged is removed.
    """
    try:
        for folder in folders:
            folder.stage(description_name(name), data)
    except StorageError:
        for folder in folders:
            folder.discard(description_name(name) + ".tmp")
        raise


def publish(folders: Sequence[RunDirectory], name: str) -> None:
    """Give a staged description its final name on every drive, durably: the snapshot exists."""
    for folder in folders:
        folder.publish(description_name(name))


def remove(folders: Sequence[RunDirectory], name: str) -> None:
    """Remove a snapshot from every drive: first all descriptions, durably, then the data.

    Raises:
        StorageError: an entry cannot be removed; the next opening ends or undoes what was begun.
    """
    for folder in folders:
        folder.discard(description_name(name))
        folder.sync()
    remove_data(folders, name)


def remove_data(folders: Sequence[RunDirectory], name: str) -> None:
    """Remove the data of what is no snapshot."""
    for folder in folders:
        folder.discard(data_name(name))


def recover(folders: Sequence[RunDirectory]) -> None:
    """End what a crash interrupted: complete what was published, remove what was not.

    The run does not need it, so a failure is only logged. Called with every drive's folder, locked,
    after each was proved to be ours.
    """
    present = [folder.snapshot_names() for folder in folders]
    described = set().union(*(names for names, _ in present))
    for name in sorted(described):
        try:
            _complete(folders, name)
        except (StorageError, StateError) as error:
            _log.warning("snapshot %s: %s", name, error)
    for folder, (_, data) in zip(folders, present, strict=True):
        parts = [data_name(name) for name in data - described]
        parts += [name for name in folder.staged_names() if name.startswith(description_name(""))]
        for name in sorted(parts):
            try:
                os.close(files.open_file(folder.fd, name, folder.path_of(name)))
                folder.discard(name)
            except StorageError as error:
                _log.warning("a part of an unfinished snapshot stays: %s", error)
            else:
                _log.info("removed %s, of a snapshot that was not finished", folder.path_of(name))


def description_name(name: str) -> str:
    """Return the name of a snapshot's description."""
    return f"snapshot-{name}"


def data_name(name: str) -> str:
    """Return the name of the file with a drive's part of a snapshot's records."""
    return f"snapshot-{name}.bin"


def _complete(folders: Sequence[RunDirectory], name: str) -> None:
    found = find(folders, name)
    for position, folder in enumerate(folders):
        if position not in found.holders:
            try:
                folder.stage(description_name(name), found.data)
            except DiskFullError:
                folder.discard(description_name(name) + ".tmp")
                raise
            folder.publish(description_name(name))
