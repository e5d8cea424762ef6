"""The drives of a run: made and reserved for a new run, locked and recovered for an existing one.

A failure leaves things as they were: `create_drives` removes what it made, `open_drives` releases what
it locked. Opening never deletes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import UUID

from ..aio.engine import Engine, File, OpenMode
from ..errors import CorruptionError, StorageError
from ..sizes import format_bytes
from . import files, manifests
from .format import encode_manifest, max_manifest_nbytes
from .meter import DriveMeter
from .owner import Owner
from .records import Manifest, RecordSpec, extents_nbytes, stripes_of
from .room import check_room, has_room, reserve
from .rundir import DATA_NAME, RunDirectory
from .snapshot_format import layout
from .stripe import Deal

__all__ = [
    "LOST",
    "SNAPSHOT",
    "Drive",
    "close_drives",
    "create_drives",
    "open_drives",
    "read_owners",
    "snapshot_nbytes",
]

# For the message about too little room.
_WHAT, _CURE = "the run", "free some space, use another directory, or offload less"

# What there is to say of a run that was in use, and no longer is.
LOST = (
    "run {run_id} was written in place (commit: off) and did not end in order: its drives hold parts of"
    " several steps, so it can be neither resumed nor verified nor exported; remove it with 'offload clean'"
    " and begin anew"
)

# Follows what needs the room, where a snapshot must fit beside it.
SNAPSHOT = " and a snapshot of it (snapshot_steps)"


@dataclass(frozen=True, slots=True)
class Drive:
    """One drive of an open run.

    Attributes:
        folder: its run folder, locked.
        file: its data file.
        path: the data file's whole path, for messages.
        meter: counts what goes to and from it.
    """

    folder: RunDirectory
    file: File
    path: str
    meter: DriveMeter


def create_drives(
    directories: Sequence[str],
    manifest: Manifest,
    *,
    room_for_snapshot: bool,
    engine: Engine,
) -> tuple[tuple[Drive, ...], manifests.Recovered]:
    """Make a run's folders and data files, reserve all their space, and publish its first manifest.

    Args:
        directories: one a drive, absolute.
        manifest: generation 0.
        room_for_snapshot: whether there must be room for a snapshot as well, which is not reserved.
        engine: opens the data files.

    Raises:
        DiskFullError: not enough room, with the bytes needed and free; nothing is left behind.
        StorageError: a directory is missing, unwritable, or not safe to use.
    """
    data, checksum = encode_manifest(manifest)
    manifest_nbytes = max_manifest_nbytes(manifest, data)
    # Three manifests: the last two and the one being written.
    needed = [nbytes + 3 * manifest_nbytes for nbytes in manifest.drive_nbytes]
    what, cure = _WHAT, _CURE
    if room_for_snapshot:
        what += SNAPSHOT
        # Beside the records a description, which is like a manifest.
        lengths = snapshot_nbytes(
            [entry.spec for entry in manifest.records], manifest.chunk_nbytes, manifest.deal
        )
        needed = [nbytes + length + manifest_nbytes for nbytes, length in zip(needed, lengths, strict=True)]
    elif not manifest.in_place:
        cure = _cure_of_generations(directories, manifest, 3 * manifest_nbytes)
    check_room(directories, needed, what=what, cure=cure)
    drives: list[Drive] = []
    folders: list[RunDirectory] = []
    try:
        for index, directory in enumerate(directories):
            folder = RunDirectory.create(directory, manifest.run_id)
            folders.append(folder)
            folder.acquire()
            folder.write_owner(Owner(manifest.run_id, index, tuple(directories)))
            path = folder.path_of(DATA_NAME)
            meter = DriveMeter(directory, manifest.deal.share(index))
            drives.append(Drive(folder, engine.open(DATA_NAME, "x+", dir_fd=folder.fd), path, meter))
            if nbytes := manifest.drive_nbytes[index]:
                reserve(drives[-1].file, directory, nbytes, what=_WHAT, cure=_CURE)
            engine.sync(drives[-1].file)
        manifests.stage(folders, 0, data)
        manifests.publish(folders, 0)
    except BaseException:
        for drive in drives:
            drive.file.close()
        for folder in folders:
            folder.remove()
        raise
    holders = frozenset(range(len(drives)))
    return tuple(drives), manifests.Recovered(manifest, checksum, data, holders, ())


def open_drives(
    directories: Sequence[str], run_id: UUID, *, engine: Engine, read_only: bool = False
) -> tuple[tuple[Drive, ...], manifests.Recovered]:
    """Lock a run's folders, find its newest generation, and open its data files.

    Args:
        directories: where its folders lie, in any order.
        run_id: the run.
        engine: opens the data files.
        read_only: the data files cannot be written, nothing is made durable or mended, and others may
            read as well.

    Raises:
        LockedError: a live process uses it.
        StorageError: a drive is missing (named), a folder is not ours, or the format is too new.
        CorruptionError: no valid manifest, a data file that is not as long as it was made, or a run that was
            written in place by a process that did not end in order.
    """
    with ExitStack() as undo:
        found = []
        for directory in directories:
            found.append(RunDirectory.open(directory, run_id))
            undo.callback(found[-1].close)
            found[-1].acquire(shared=read_only)
        folders = _in_order(found, read_owners(found))
        recovered = manifests.find_newest(folders)
        if recovered.manifest.in_use:
            raise CorruptionError(LOST.format(run_id=run_id), path=folders[0].path)
        drives = []
        if len(recovered.manifest.drive_nbytes) != len(folders):
            raise CorruptionError(
                f"the manifest of run {run_id} describes {len(recovered.manifest.drive_nbytes)} drives, its "
                f"folders say {len(folders)}",
                path=folders[0].path,
            )
        for index, (folder, nbytes) in enumerate(zip(folders, recovered.manifest.drive_nbytes, strict=True)):
            path = folder.path_of(DATA_NAME)
            mode: OpenMode = "r" if read_only else "r+"
            try:
                file = engine.open(DATA_NAME, mode, dir_fd=folder.fd)
            except StorageError as error:
                if error.errno != errno.ENOENT:
                    raise
                raise CorruptionError(
                    f"{path} is missing, the manifest says {nbytes:,} bytes: it was removed; restore it",
                    errno=error.errno,
                    path=path,
                ) from error
            meter = DriveMeter(folder.directory, recovered.manifest.deal.share(index))
            drive = Drive(folder, file, path, meter)
            undo.callback(drive.file.close)
            drives.append(drive)
            _check_data_file(drive, nbytes)
        if not read_only:
            manifests.heal(folders, recovered)
        undo.pop_all()
    return tuple(drives), recovered


def snapshot_nbytes(specs: Sequence[RecordSpec], chunk_nbytes: int, deal: Deal) -> tuple[int, ...]:
    """Return how much a snapshot of these records takes on each drive."""
    return layout(specs, stripes_of(specs, chunk_nbytes, deal))[1]


def close_drives(drives: Sequence[Drive]) -> None:
    """Close every data file, then release every folder."""
    with ExitStack() as stack:
        for drive in drives:
            stack.callback(drive.folder.close)
        for drive in drives:
            stack.callback(drive.file.close)


def read_owners(folders: Sequence[RunDirectory]) -> list[Owner]:
    """Return the ownership file of each folder."""
    return [folder.read_owner() for folder in folders]


def _in_order(folders: Sequence[RunDirectory], owners: Sequence[Owner]) -> list[RunDirectory]:
    """Return the folders by drive index, after checking that each drive is there once."""
    by_drive: dict[int, RunDirectory] = {}
    for folder, owner in zip(folders, owners, strict=True):
        if owner.drive in by_drive:
            raise StorageError(
                f"{folder.path} and {by_drive[owner.drive].path} are both drive {owner.drive} of run "
                f"{folder.run_id}; name each drive once, and not a copy",
                path=folder.path,
            )
        by_drive[owner.drive] = folder
    expected = owners[0].directories if owners else ()
    for drive, directory in enumerate(expected):
        if drive not in by_drive:
            raise StorageError(
                f"drive {drive} of the {len(expected)} of run {folders[0].run_id} is missing; when the run "
                f"was created it was {directory}: mount it and name its directory too",
                errno=errno.ENOENT,
                path=directory,
            )
    if len(by_drive) != len(expected):
        raise StorageError(f"the folders given do not belong to one run of {len(expected)} drives")
    return [by_drive[drive] for drive in range(len(expected))]


def _cure_of_generations(directories: Sequence[str], manifest: Manifest, beside_nbytes: int) -> str:
    """Return what helps where two generations find no room: one, if that does."""
    specs = [entry.spec for entry in manifest.records]
    stripes = stripes_of(specs, manifest.chunk_nbytes, manifest.deal)
    lengths = extents_nbytes(specs, stripes, len(directories), in_place=True)
    if not has_room(directories, [nbytes + beside_nbytes for nbytes in lengths]):
        return _CURE
    return (
        f"{_CURE}; or set commit: off, which takes {format_bytes(sum(lengths))} in place of"
        f" {format_bytes(sum(manifest.drive_nbytes))} on all drives, and loses the run in a crash"
    )


def _check_data_file(drive: Drive, nbytes: int) -> None:
    with files.storage_errors("examine", drive.path):
        status = os.stat(DATA_NAME, dir_fd=drive.folder.fd, follow_symlinks=False)
    if status.st_nlink != 1 or status.st_uid != os.geteuid():
        raise StorageError(
            f"{drive.path} has a second name or another owner; it is not ours alone", path=drive.path
        )
    if drive.file.size_nbytes != nbytes:
        raise CorruptionError(
            f"{drive.path} has {drive.file.size_nbytes:,} bytes, the manifest says {nbytes:,}: it was cut or "
            "replaced; restore it",
            path=drive.path,
        )
