"""Snapshots: full copies of a committed generation's mutable records, beside the run on the same drives.

A snapshot is whole or it is not there; see `snapshot_files`. Making one neither changes the run nor can
harm it: the copy is read from committed extents, which nothing writes before the next commit, and a
failure leaves nothing behind. Records that never change are not copied.

Where the file system shares extents between files (XFS, btrfs, bcachefs), no byte is copied. Elsewhere
the records go through the engine and a bounded buffer, and every chunk is verified on the way.
`copy_file_range` is not used: without shared extents it copies through the page cache, unverified.

Thread rule: one thread, with no commit meanwhile; the store sees to that.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ..aio.engine import Engine, OpenMode
from ..aio.memory import aligned_buffer
from ..errors import CorruptionError, StateError, StorageError
from ..sizes import MIB
from . import files, snapshot_files
from .copying import Begin, copy_records, min_buffer_nbytes
from .drives import Drive
from .records import Manifest, RecordSpec
from .room import check_room, reserve
from .rundir import DATA_NAME
from .snapshot_files import SnapshotInfo, data_name
from .snapshot_format import Snapshot, SnapshotEntry, check_name, check_table, encode_snapshot, layout
from .span import Span
from .submit import submit, submitting
from .table import Record, Version
from .ticket import Piece, Ticket

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["OpenSnapshot", "Progress", "Snapshots"]

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

# What a copy goes through when the caller lends no memory; four pieces of it are in flight.
_BUFFER_NBYTES = 32 * MIB

_WHAT, _CURE = "the snapshot", "free some space, or drop another snapshot"


@dataclass(frozen=True, slots=True)
class _RecordFiles:
    """Records at rest in a file on each drive: reads what is committed, writes over it."""

    engine: Engine
    drives: Sequence[Drive]
    records: Mapping[str, Record]

    def read(self, name: str, buffer: Buffer, *, offset: int, nbytes: int) -> Ticket:
        span = Span.of(self.records[name], buffer, offset, nbytes)
        return self._begin(span, is_write=False)

    def write(self, name: str, buffer: Buffer, *, offset: int, nbytes: int) -> Ticket:
        span = Span.of(self.records[name], buffer, offset, nbytes)
        return self._begin(span, is_write=True)

    def _begin(self, span: Span, *, is_write: bool) -> Ticket:
        version = span.record.committed
        assert version is not None
        piece = Piece(version.extent, span.first, span.end)
        ticket = Ticket(span.record.spec.name, [piece], is_write=is_write)
        transfers = span.transfers(version, span.first, span.end, verify=not is_write)
        with submitting(ticket, ()) as parts:
            submit(self.engine, self.drives, "write" if is_write else "read", parts, transfers)
        return ticket


@dataclass(frozen=True, slots=True)
class OpenSnapshot:
    """A snapshot whose files are open, to be read.

    Attributes:
        snapshot: what it is.
        specs: its records.
        read: begins to read a range of a record, verified, as `Store.read` does.
    """

    snapshot: Snapshot
    specs: tuple[RecordSpec, ...]
    read: Begin


class Snapshots:
    """The snapshots of an open run.

    Args:
        drives: of the run; its folders are locked.
        records: its table, by name, in order; the versions in it are read, never changed.
        engine: opens and moves the data.
        run_id: the run.
    """

    def __init__(
        self, drives: Sequence[Drive], records: Mapping[str, Record], *, engine: Engine, run_id: UUID
    ) -> None:
        self._drives = drives
        self._folders = [drive.folder for drive in drives]
        self._engine = engine
        self._run_id = run_id
        self._records = records
        table = list(records.values())
        self._offsets, self._lengths = layout(
            [record.spec for record in table], [record.stripe for record in table]
        )
        self._specs = tuple(record.spec for record in table if record.spec.mutable)

    def list(self) -> tuple[SnapshotInfo, ...]:
        """Return what there is, the oldest first."""
        return snapshot_files.look(self._folders)

    def make(
        self, name: str, base: Manifest, buffer: Buffer | None, progress: Progress | None
    ) -> SnapshotInfo:
        """Copy the committed records; see `Store.snapshot`."""
        check_name(name)
        if base.in_place:
            raise StateError(
                f"run {self._run_id} is written in place (commit: off) and has no snapshots: a snapshot is"
                " copied from extents that no write goes over"
            )
        if snapshot_files.is_there(self._folders, name):
            raise StateError(
                f"run {self._run_id} has a snapshot {name!r} already: drop it, or use another name"
            )
        entries = tuple(self._entry(spec.name) for spec in self._specs)
        nbytes = sum(spec.nbytes for spec in self._specs)
        snapshot = Snapshot(self._run_id, name, base.generation, nbytes, entries, base.state)
        data = encode_snapshot(snapshot)
        directories = [folder.directory for folder in self._folders]
        needed = [length + len(data) for length in self._lengths]
        check_room(directories, needed, what=_WHAT, cure=_CURE)
        try:
            self._write(snapshot, buffer, progress)
            snapshot_files.stage(self._folders, name, data)
        except BaseException:
            self._tidy(name)
            raise
        snapshot_files.publish(self._folders, name)
        return _info(snapshot)

    @contextmanager
    def open(self, name: str) -> Iterator[OpenSnapshot]:
        """Open a snapshot inside the block.

        Raises:
            StateError: there is none of that name.
            CorruptionError: its description is damaged, of another table, or a data file was cut.
            StorageError: a data file is missing or not ours alone.
        """
        found = snapshot_files.find(self._folders, check_name(name))
        table = list(self._records.values())
        check_table(
            found.snapshot, [record.spec for record in table], [record.stripe for record in table], found.path
        )
        with ExitStack() as stack:
            drives = [self._open_file(stack, position, name, "r") for position in range(len(self._drives))]
            for drive, length in zip(drives, self._lengths, strict=True):
                _check_length(drive, length)
            records = self._copies(found.snapshot)
            yield OpenSnapshot(found.snapshot, self._specs, _RecordFiles(self._engine, drives, records).read)

    def copy_out(
        self, name: str, write: Begin, buffer: Buffer | None, progress: Progress | None
    ) -> Mapping[str, Any]:
        """Read every record of a snapshot, hand it to `write`, and return its state; see `open`."""
        with self.open(name) as opened:
            memory = self._memory(buffer)
            copy_records(self._specs, self._chunk_nbytes, opened.read, write, memory, progress)
            return opened.snapshot.state

    def drop(self, name: str) -> None:
        """Remove a snapshot, a damaged one as well; see `Store.drop_snapshot`."""
        if not snapshot_files.is_there(self._folders, check_name(name)):
            raise StateError(f"run {self._run_id} has no snapshot {name!r}")
        snapshot_files.remove(self._folders, name)

    @property
    def _chunk_nbytes(self) -> int:
        return next(iter(self._records.values())).stripe.chunk_nbytes if self._records else 0

    def _entry(self, name: str) -> SnapshotEntry:
        version = self._records[name].committed
        if version is None:
            raise StateError(
                f"record {name} of run {self._run_id} was never committed, and a snapshot holds every "
                "record; write it and commit first"
            )
        return SnapshotEntry(name, version.generation, version.checksums)

    def _copies(self, snapshot: Snapshot) -> dict[str, Record]:
        """Return the table of a snapshot's own files, with the seeds of the run's."""
        copies = {}
        for entry in snapshot.records:
            record = self._records[entry.name]
            whole = bytearray(b"\x01") * record.stripe.num_chunks
            version = Version(0, entry.generation, array("I", entry.checksums), whole)
            copies[entry.name] = Record(
                self._run_id, record.index, record.spec, record.stripe, (self._offsets[entry.name],), version
            )
        return copies

    def _write(self, snapshot: Snapshot, buffer: Buffer | None, progress: Progress | None) -> None:
        """Make the data files, whole and durable under their names."""
        with ExitStack() as stack:
            drives = []
            # What an earlier try in this process could not remove.
            snapshot_files.remove_data(self._folders, snapshot.name)
            for position, length in enumerate(self._lengths):
                drives.append(self._open_file(stack, position, snapshot.name, "x+"))
                if length:
                    directory = self._folders[position].directory
                    reserve(drives[-1].file, directory, length, what=_WHAT, cure=_CURE)
            if not self._clone(snapshot.name):
                source = _RecordFiles(self._engine, self._drives, self._records)
                target = _RecordFiles(self._engine, drives, self._copies(snapshot))
                memory = self._memory(buffer)
                copy_records(self._specs, self._chunk_nbytes, source.read, target.write, memory, progress)
            for drive in drives:
                self._engine.sync(drive.file)
            for folder in self._folders:
                folder.sync()

    def _tidy(self, name: str) -> None:
        """Remove the data of a snapshot that failed; what cannot be removed goes at the next opening."""
        try:
            snapshot_files.remove_data(self._folders, name)
        except StorageError as error:
            _log.warning("a part of an unfinished snapshot stays until the run is opened again: %s", error)

    def _clone(self, name: str) -> bool:
        """Let the snapshot's files share the extents of the run's; False when a file system cannot."""
        for position, folder in enumerate(self._folders):
            with ExitStack() as stack:
                path = folder.path_of(data_name(name))
                fd = files.open_file(folder.fd, DATA_NAME, self._drives[position].path)
                stack.callback(os.close, fd)
                target_fd = files.open_file(folder.fd, data_name(name), path, write=True)
                stack.callback(os.close, target_fd)
                for spec in self._specs:
                    record = self._records[spec.name]
                    assert record.committed is not None
                    nbytes = record.stripe.drive_nbytes(position)
                    offset = record.offsets[record.committed.extent][position]
                    target = self._offsets[spec.name][position]
                    if nbytes and not files.clone_range(fd, offset, target_fd, target, nbytes, path):
                        return False
        return True

    def _open_file(self, stack: ExitStack, position: int, name: str, mode: OpenMode) -> Drive:
        folder = self._folders[position]
        path = folder.path_of(data_name(name))
        if mode == "r":
            os.close(files.open_file(folder.fd, data_name(name), path))
        file = self._engine.open(data_name(name), mode, dir_fd=folder.fd)
        stack.callback(file.close)
        return replace(self._drives[position], file=file, path=path)

    def _memory(self, buffer: Buffer | None) -> memoryview:
        if buffer is not None:
            return memoryview(buffer).cast("B")
        least = min_buffer_nbytes(self._specs, self._chunk_nbytes)
        return aligned_buffer(max(_BUFFER_NBYTES, 4 * least))


def _info(snapshot: Snapshot) -> SnapshotInfo:
    return SnapshotInfo(snapshot.name, None, snapshot.generation, snapshot.nbytes, snapshot.state)


def _check_length(drive: Drive, nbytes: int) -> None:
    if drive.file.size_nbytes != nbytes:
        raise CorruptionError(
            f"{drive.path} has {drive.file.size_nbytes:,} bytes, its description says {nbytes:,}: it was cut "
            "or replaced; restore another snapshot",
            path=drive.path,
        )
