"""The store: records on drives, written to shadow extents, committed as a whole, verified when read.

Invariants:
- A committed generation is never overwritten: the first write of a record after a commit goes to its
  other extent, and the old one is free only when the next manifest is durable on every drive. Of a run in
  place it is, and no opening takes it for one: see [Note: in place] in committing.py.
- A manifest gets its final name only after every byte it describes was synced.
- Every chunk is checksummed in the caller's buffer before it is written and verified when it is read.
- All space is reserved before `create` returns.
- A failed write poisons the generation being built until it is rolled back; a failed sync, or a commit
  that stopped between its first rename and its last, poisons it until the run is opened again.

Thread rule: `read`, `write` and their tickets may be used from any threads; transfers of the same bytes
take place in the order they were asked for. `commit`, `rollback`, `close` and those of snapshots are for
one thread; a write during a commit or a snapshot is refused. No lock is held while waiting for a drive.

The store does not own the engine, does not know what its records mean, and keeps no bytes in memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID, uuid4

from ..aio.engine import Engine
from ..errors import StateError
from ..sizes import MIB
from . import manifests
from .committing import made_durable, mark_in_use, next_manifest
from .drives import Drive, close_drives, create_drives, open_drives, snapshot_nbytes
from .framing import json_copy
from .meter import DriveMeter
from .poison import Poison
from .records import RecordSpec, first_manifest, stripes_of
from .scratch import Scratch
from .snapshot_files import SnapshotInfo
from .snapshot_files import recover as recover_snapshots
from .snapshots import Progress, Snapshots
from .table import Record
from .ticket import Ticket
from .transfers import Source, Transfers
from .verify import VerifyReport, verify_run

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["PathLike", "Store"]

PathLike = str | os.PathLike[str]


class Store:
    """An open run; a context manager. Made by `create` or `open`.

    >>> with Store.create([a, b], [RecordSpec("layer.0/weights", 8 << 20)], engine=engine) as store:
    ...     store.write("layer.0/weights", buffer).wait()
    ...     store.commit({"step": 1})
    """

    def __init__(self, drives: Sequence[Drive], recovered: manifests.Recovered, *, engine: Engine) -> None:
        self._drives = tuple(drives)
        self._engine = engine
        base = self._base = recovered.manifest
        self._parent = recovered.checksum
        self._notes = recovered.notes
        stripes = stripes_of([entry.spec for entry in base.records], base.chunk_nbytes, base.deal)
        self._records = {
            entry.spec.name: Record.from_entry(base.run_id, index, entry, stripe)
            for index, (entry, stripe) in enumerate(zip(base.records, stripes, strict=True))
        }
        self._transfers = Transfers(f"run {self.run_id}", self._drives, self._records, engine=engine)
        self._snapshots = Snapshots(self._drives, self._records, engine=engine, run_id=base.run_id)
        self._lock = self._transfers.lock
        self._marking = threading.Lock()  # held while a run in place is marked as in use
        self._committing = False
        self._closed = False
        self._poison: Poison | None = None

    @classmethod
    def create(
        cls,
        directories: Sequence[PathLike],
        records: Sequence[RecordSpec],
        *,
        engine: Engine,
        run_id: str | None = None,
        chunk_nbytes: int = 4 * MIB,
        weights: Sequence[float] | None = None,
        identity: Mapping[str, Any] = MappingProxyType({}),
        room_for_snapshot: bool = False,
        in_place: bool = False,
    ) -> Self:
        """Create a run, reserve all its space, and open it; generation 0, no record written.

        Args:
            directories: one a drive; each gets a folder `run-<uuid>`.
            records: what to make room for.
            engine: does the I/O; outlives the store.
            run_id: a UUID; a random one when None.
            chunk_nbytes: what one checksum covers and one drive gets at a time, a multiple of 4096.
            weights: each drive's bandwidth in any unit; equal when None.
            identity: JSON that says what the run is; kept in every manifest.
            room_for_snapshot: refuse when there is no room for a snapshot beside the run; none is reserved.
            in_place: one extent for a record in place of two: half the room, and a crash loses the run.

        Raises:
            ValueError: arguments that no run can have; nothing was made.
            DiskFullError: no room, with the bytes needed and free; nothing is left behind.
            StorageError: a directory is missing, unwritable, not safe, or has the run already.
        """
        manifest = first_manifest(
            UUID(run_id) if run_id is not None else uuid4(),
            records,
            num_drives=len(directories),
            chunk_nbytes=chunk_nbytes,
            weights=weights,
            identity=json_copy(identity, "the identity"),
            in_place=in_place,
        )
        paths = [os.path.abspath(directory) for directory in directories]
        drives, first = create_drives(paths, manifest, room_for_snapshot=room_for_snapshot, engine=engine)
        return cls(drives, first, engine=engine)

    @classmethod
    def open(cls, directories: Sequence[PathLike], *, engine: Engine, run_id: str) -> Self:
        """Lock a run, recover its newest valid generation, and open it.

        Args:
            directories: the ones it was created in, or where those drives are mounted now, in any order.
            engine: does the I/O; outlives the store.
            run_id: which run.

        Raises:
            LockedError: a live process uses it; names its pid.
            StorageError: a drive is missing (named), a folder is not ours, or the format is too new.
            CorruptionError: no valid manifest, a data file cut short, or a run that was written in place by
                a process that did not end in order.
        """
        paths = [os.path.abspath(directory) for directory in directories]
        if not paths:
            raise ValueError("name the directories of the run; got none")
        drives, recovered = open_drives(paths, UUID(run_id), engine=engine)
        recover_snapshots([drive.folder for drive in drives])
        return cls(drives, recovered, engine=engine)

    @property
    def run_id(self) -> str:
        """The run's UUID."""
        return str(self._base.run_id)

    @property
    def generation(self) -> int:
        """The committed generation; 0 when nothing was committed yet."""
        return self._base.generation

    @property
    def state(self) -> Mapping[str, Any]:
        """What was given to the last commit, as JSON reads it back."""
        return MappingProxyType(dict(self._base.state))

    @property
    def identity(self) -> Mapping[str, Any]:
        """What was given to `create`, as JSON reads it back."""
        return MappingProxyType(dict(self._base.identity))

    @property
    def records(self) -> Mapping[str, RecordSpec]:
        """The records by name, in table order."""
        return {name: record.spec for name, record in self._records.items()}

    @property
    def chunk_nbytes(self) -> int:
        """Length of a chunk: what offsets and lengths of reads and writes must be multiples of."""
        return self._base.chunk_nbytes

    @property
    def nbytes_reserved(self) -> int:
        """Space taken on all drives together."""
        return sum(self._base.drive_nbytes)

    @property
    def in_place(self) -> bool:
        """Whether records are written over, and a crash loses the run."""
        return self._base.in_place

    @property
    def in_use(self) -> bool:
        """Whether the committed generation is being written over, so that only a commit saves the run."""
        return self._base.in_use

    @property
    def meters(self) -> tuple[DriveMeter, ...]:
        """What counts each drive's transfers, those of scratch areas included, in the order of the run."""
        return tuple(drive.meter for drive in self._drives)

    @property
    def recovery_notes(self) -> tuple[str, ...]:
        """What was passed over to find the newest valid generation, one line each."""
        return self._notes

    def is_written(self, name: str) -> bool:
        """Return whether every byte of a record can be read: committed, or written since."""
        record = self._transfers.record(name)
        with self._lock:
            return record.committed is not None or (record.is_dirty and not record.missing())

    def read(self, name: str, buffer: Buffer, *, offset: int = 0, nbytes: int | None = None) -> Ticket:
        """Begin to read the newest bytes of a record: this generation's where written, else the committed.

        Args:
            name: the record.
            buffer: writable and contiguous; filled from its start. It belongs to the ticket until that
                was waited for.
            offset: bytes from the record's start, a multiple of `chunk_nbytes`.
            nbytes: a multiple of `chunk_nbytes`, or up to the record's end; None is up to the end.

        Raises:
            StateError: never written, or the store is closed.
            StorageError: a write or commit failed before, and this would read what was written since the
                last commit; its kind and place.
            ValueError: a range or buffer that does not fit.
        """
        return self._transfers.read(name, buffer, offset, nbytes, allow=self._allow_read)

    def write(self, name: str, buffer: Buffer, *, offset: int = 0, nbytes: int | None = None) -> Ticket:
        """Begin to write bytes of a record, and checksum them; the committed ones stay as they are.

        A generation that writes any chunk of a record must write all of it before the commit.

        Args:
            name: the record.
            buffer: contiguous; taken from its start. It must not change until the ticket was waited for.
            offset: bytes from the record's start, a multiple of `chunk_nbytes`.
            nbytes: a multiple of `chunk_nbytes`, or up to the record's end; None is up to the end.

        Raises:
            StateError: immutable and committed, a commit is in progress, or closed.
            StorageError: a write or commit failed before; its kind and place, with its error as the cause.
            ValueError: a range or buffer that does not fit.
        """
        self._mark_if_clean()
        return self._transfers.write(
            name, buffer, offset, nbytes, allow=self._allow_write, on_failure=self._write_failed
        )

    def commit(self, state: Mapping[str, Any]) -> int:
        """Make everything written since the last commit durable, as one new generation.

        Waits for the writes, syncs the data files, publishes a manifest on every drive.

        Args:
            state: JSON to keep with the generation (step, random state, position in the data).

        Returns:
            The new generation's number.

        Raises:
            StateError: a record is partly written; names it and the chunks.
            DiskFullError: no room for the manifest. Nothing is lost: make room and commit again.
            StorageError: a write or commit failed before; or a sync or rename did: the last generation
                stands, open the run again.
            ValueError: `state` is not JSON, or too long.
        """
        state = json_copy(state, "the state")
        with self._marking, self._lock:
            self._check_writable()
            self._committing = True
            writes = [ticket for ticket in self._transfers.in_flight() if ticket.is_write]
        try:
            for ticket in writes:
                ticket.settle()
            with self._lock:
                self._check_poison("be committed")
                manifest = next_manifest(self._base, self._parent, self._records, state)
            durable = made_durable(self._engine, self._drives, manifest, self._commit_failed)
            with durable as checksum, self._lock:
                self._base, self._parent = manifest, checksum
                for record in self._records.values():
                    record.commit()
        finally:
            self._committing = False
        manifests.prune([drive.folder for drive in self._drives], manifest.generation)
        return manifest.generation

    def rollback(self) -> None:
        """Forget everything written since the last commit; reads see the committed bytes again.

        Waits for the writes in flight. It lifts the poison of a failed write, not that of a failed sync.

        Raises:
            StateError: a commit is in progress, closed, or committed bytes were written over in place.
        """
        with self._lock:
            self._check_open()
            if self.in_use:
                raise StateError(f"run {self.run_id} is in place (commit: off): nothing to go back to")
            if self._committing:
                raise StateError("a commit is in progress; roll back from the thread that commits")
            tickets = self._transfers.in_flight()
        for ticket in tickets:
            ticket.settle()
        with self._lock:
            for record in self._records.values():
                record.pending = None
            if self._poison is not None and not self._poison.permanent:
                self._poison = None

    def scratch(
        self,
        records: Sequence[RecordSpec],
        *,
        chunk_nbytes: int,
        room_for_snapshot: bool = False,
        knob: str = "raise host_memory",
    ) -> Scratch:
        """Reserve room on the run's drives for records of this process alone; see `Scratch.create`.

        Close it before the store.
        """
        with self._lock:
            self._check_open()
        base, specs = self._base, list(self.records.values()) if room_for_snapshot else []
        return Scratch.create(
            self._drives,
            records,
            engine=self._engine,
            deal=base.deal,
            chunk_nbytes=chunk_nbytes,
            snapshot_nbytes=snapshot_nbytes(specs, base.chunk_nbytes, base.deal) if specs else (),
            knob=knob,
        )

    def snapshot(
        self, name: str, *, buffer: Buffer | None = None, progress: Progress | None = None
    ) -> SnapshotInfo:
        """Copy the committed generation beside the run, to go back to; writes meanwhile are refused.

        Args:
            name: 1 to 64 letters, digits, `_` and `-`; no snapshot of the run has it.
            buffer: what to copy through, a chunk or more; 32 MiB of its own when None.
            progress: called with bytes copied so far and in all, unless extents are shared.

        Raises:
            DiskFullError: no room, with the bytes needed and free; nothing is left behind.
            StateError: the name is taken, a mutable record was never committed, in place, or closed.
            CorruptionError: a committed chunk does not verify; nothing is left behind.
        """
        with self._lock:
            self._check_writable()
            self._committing = True
        try:
            return self._snapshots.make(name, self._base, buffer, progress)
        finally:
            self._committing = False

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """Return the snapshots of the run, the oldest first; one that is damaged says why.

        Raises:
            StateError: the store is closed.
        """
        with self._lock:
            self._check_open()
        return self._snapshots.list()

    def restore(
        self,
        name: str,
        *,
        state: Mapping[str, Any] | None = None,
        buffer: Buffer | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Commit a snapshot's records as a new generation; until then the last commit stands.

        What was written since the last commit is forgotten; the snapshot `name` stays.

        Args:
            state: what to commit with it; the snapshot's own when None.
            buffer, progress: as in `snapshot`.

        Returns:
            The new generation's number.

        Raises:
            StateError: no such snapshot, or closed.
            CorruptionError: the snapshot is damaged; names the file, drive, offset, record and chunk.
        """
        self.rollback()
        try:
            kept = self._snapshots.copy_out(name, self.write, buffer, progress)
        except BaseException:
            self.rollback()
            raise
        return self.commit(kept if state is None else state)

    def drop_snapshot(self, name: str) -> None:
        """Remove a snapshot, a damaged one as well; it is there whole until it is gone.

        Raises:
            StateError: there is none of that name, or the store is closed.
        """
        with self._lock:
            self._check_open()
        self._snapshots.drop(name)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read everything again and check every checksum.

        Args:
            progress: called with bytes checked so far and in all, after each step.

        Returns:
            What was checked, and each damage found; it does not stop at the first.
        """
        written = [spec for name, spec in self.records.items() if self.is_written(name)]
        return verify_run(self.read, written, self.chunk_nbytes, progress)

    def close(self) -> None:
        """Wait for transfers in flight, then release the run. Closing twice is harmless.

        What was written since the last commit is forgotten.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            tickets = self._transfers.in_flight()
        try:
            for ticket in tickets:
                ticket.settle()
        finally:
            close_drives(self._drives)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _commit_failed(self, error: BaseException) -> None:
        self._poison = Poison(error, permanent=True, in_place=self.in_use)

    def _write_failed(self, error: BaseException) -> None:
        # Without the lock: a ticket may report while the lock is held, and the first report is enough.
        if self._poison is None:
            self._poison = Poison(error, permanent=self.in_use, in_place=self.in_use)

    def _must_mark(self) -> bool:
        """Whether a write may go over what is committed, and the drives do not say so yet."""
        return self.in_place and not self.in_use and self.generation > 0

    def _mark_if_clean(self) -> None:
        """Say on every drive of a run in place, durably, that it is in use; see [Note: in place]."""
        if not self._must_mark():
            return
        with self._marking:
            with self._lock:
                self._check_writable()
                if not self._must_mark():  # another thread did
                    return
                manifest = mark_in_use(self._base, self._parent)
            durable = made_durable(self._engine, self._drives, manifest, self._commit_failed)
            with durable as checksum, self._lock:
                self._base, self._parent = manifest, checksum
        manifests.prune([drive.folder for drive in self._drives], manifest.generation + 1)

    def _allow_read(self, record: Record, sources: Sequence[Source]) -> None:
        self._check_open()
        if any(version is record.pending for version, _, _ in sources):
            self._check_poison(f"be read in record {record.spec.name}")

    def _allow_write(self) -> int:
        self._check_writable()
        if self._must_mark():
            raise StateError(f"run {self.run_id} was committed by another thread during this write")
        return self._base.generation + 1

    def _check_writable(self) -> None:
        self._check_open()
        if self._committing:
            raise StateError(
                f"a commit of run {self.run_id} is in progress, or a snapshot; write when it has returned"
            )
        self._check_poison("be continued")

    def _check_poison(self, what: str) -> None:
        if self._poison is not None:
            raise self._poison.error(self.generation, what)

    def _check_open(self) -> None:
        if self._closed:
            raise StateError(f"run {self.run_id} is closed")
