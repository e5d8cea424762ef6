"""The copies of the manifests on all drives: publish a new one, find the newest, prune the old.

Every drive holds the same bytes, so one drive's copy is enough to know the generation. A manifest is
durable on every drive under a temporary name before it gets its final name on the first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import CorruptionError, DiskFullError, StorageError
from .format import Manifest, decode_manifest
from .room import no_room
from .rundir import RunDirectory

__all__ = ["Recovered", "find_newest", "heal", "prune", "publish", "stage"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """The newest valid manifest of a run.

    Attributes:
        manifest: what it says.
        checksum: its own checksum, which the next manifest names as its parent.
        data: its bytes.
        holders: positions of the folders that hold it.
        notes: one line for each newer or damaged copy that was passed over, and why.
    """

    manifest: Manifest
    checksum: str
    data: bytes
    holders: frozenset[int]
    notes: tuple[str, ...]


def find_newest(folders: Sequence[RunDirectory], *, below: int | None = None) -> Recovered:
    """Return the newest manifest that is valid on at least one of `folders`; change nothing.

    Args:
        folders: the run's, one a drive or fewer.
        below: only generations before this one count; all when None.

    Raises:
        CorruptionError: no valid manifest, or two that differ for one generation.
        StorageError: the newest is of a newer major version of the format.
    """
    generations = [
        {number for number in folder.manifest_generations() if below is None or number < below}
        for folder in folders
    ]
    notes: list[str] = []
    for generation in sorted(set().union(*generations), reverse=True):
        found: Recovered | None = None
        for position, folder in enumerate(folders):
            if generation not in generations[position]:
                continue
            path = folder.path_of(folder.manifest_name(generation))
            try:
                data = folder.read_manifest(generation)
                manifest, checksum = decode_manifest(data, path)
                _check_names(manifest, folder, generation, path)
            except CorruptionError as error:
                notes.append(str(error))
                continue
            if found is None:
                found = Recovered(manifest, checksum, data, frozenset({position}), ())
            elif found.data != data:
                raise CorruptionError(
                    f"{path} and its copy on another drive are both valid and differ: the folders do not "
                    "belong together; restore them from one backup",
                    path=path,
                )
            else:
                found = Recovered(manifest, checksum, data, found.holders | {position}, ())
        if found is not None:
            return Recovered(found.manifest, found.checksum, found.data, found.holders, tuple(notes))
    where = ", ".join(folder.path for folder in folders)
    raise CorruptionError(
        f"no valid manifest in {where}: {'; '.join(notes) or 'the run was never completely created'}",
        path=folders[0].path if folders else "",
    )


def stage(folders: Sequence[RunDirectory], generation: int, data: bytes) -> None:
    """Write a manifest durably beside the old ones on every drive, under a temporary name.

    Raises:
        DiskFullError: a drive has no room; says the bytes needed and free. What was staged is removed, and
            it may be tried again.
    """
    try:
        for folder in folders:
            folder.stage(folder.manifest_name(generation), data)
    except DiskFullError as error:
        full = folder.path
        for folder in folders:
            folder.discard(folder.manifest_name(generation) + ".tmp")
        raise no_room(
            full,
            len(data),
            what=f"the manifest of generation {generation}",
            cure=f"generation {generation - 1} stands: free space, then commit again or resume the run",
        ) from error


def publish(folders: Sequence[RunDirectory], generation: int) -> None:
    """Give a staged manifest its final name on every drive, durably."""
    for folder in folders:
        folder.publish(folder.manifest_name(generation))


def heal(folders: Sequence[RunDirectory], recovered: Recovered) -> None:
    """Make the recovered manifest durable on every drive.

    A crash may have come between two drives, or between a rename and the sync of its directory. The
    next writes go over the generation before this one, so nothing may fall back to that any more.
    """
    for position, folder in enumerate(folders):
        if position in recovered.holders:
            folder.sync()
        else:
            name = folder.manifest_name(recovered.manifest.generation)
            folder.stage(name, recovered.data)
            folder.publish(name)


def prune(folders: Sequence[RunDirectory], generation: int) -> None:
    """Remove manifests older than the one before `generation`, and staged leftovers.

    The commit they follow stands, so a failure is only logged.
    """
    for folder in folders:
        try:
            for old in folder.manifest_generations():
                if old < generation - 1:
                    folder.discard(folder.manifest_name(old))
            for name in folder.staged_names():
                folder.discard(name)
        except StorageError as error:
            _log.warning("an old manifest stays: %s", error)


def _check_names(manifest: Manifest, folder: RunDirectory, generation: int, path: str) -> None:
    if manifest.run_id != folder.run_id or manifest.generation != generation:
        raise CorruptionError(
            f"{path} describes generation {manifest.generation} of run {manifest.run_id}, which is not what "
            "its name says",
            path=path,
        )
