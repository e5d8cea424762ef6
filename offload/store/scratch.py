"""Room on a run's drives for bytes that only this process needs: nothing of it outlives the process.

A scratch area holds records that are written and read again within a step. They are striped, checksummed
and transferred as the store's are, but never committed: each has one extent, its checksums are kept in
memory, and the files have no names, so the space is free again when the process ends, however it ends. A
file has a name for the instant between its making and the removal of the name, in the run's own folder;
whoever is killed there leaves an empty file, which the next scratch area of the run removes.

Where sizes are known only as the bytes come, one large record is reserved and smaller ones are cut out of
it (`carve`), to be dropped again.

Invariants: all space is reserved before `create` returns; what is read is what was last written there, or
an error, and never what a record that was dropped has left; a write that failed ends the use of the area.

Thread rule: `read`, `write` and their tickets may be used from any threads; transfers of the same bytes
take place in the order they were asked for. `close` is for one thread. No lock is held while waiting for a
drive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self
from uuid import uuid4

from ..aio.engine import Engine
from ..errors import StateError
from .drives import SNAPSHOT, Drive
from .poison import because_of
from .records import RecordSpec, stripes_of
from .room import check_room, reserve
from .stripe import Deal, Stripe, pack_extents
from .table import Record
from .ticket import Ticket
from .transfers import Transfers

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Scratch"]

# Nothing is committed, so there is one generation.
_GENERATION = 1

# For the message about too little room.
_WHAT = "the scratch area of the run"
_CURE = "free some space, use another directory, or {knob}"


class Scratch:
    """An area of temporary records; see the module. A context manager. Made by `create`."""

    def __init__(self, drives: Sequence[Drive], records: Mapping[str, Record], *, engine: Engine) -> None:
        self._drives = tuple(drives)
        self._records = dict(records)
        self._num_made = len(self._records)
        self._transfers = Transfers("the scratch area", self._drives, self._records, engine=engine)
        self._lock = self._transfers.lock
        self._failure: BaseException | None = None
        self._closed = False

    @classmethod
    def create(
        cls,
        run: Sequence[Drive],
        records: Sequence[RecordSpec],
        *,
        engine: Engine,
        deal: Deal,
        chunk_nbytes: int,
        snapshot_nbytes: Sequence[int] = (),
        knob: str = "raise host_memory",
    ) -> Self:
        """Reserve room for `records` on the drives of a run.

        Args:
            run: its drives, locked by us.
            records: what to make room for; each has one extent, mutable or not.
            engine: does the I/O; outlives the area.
            deal: which drive each chunk lies on.
            chunk_nbytes: what one checksum covers and one drive gets at a time, a multiple of 4096.
            snapshot_nbytes: of a snapshot on each drive that must find room as well, which is not reserved.
            knob: what to set when there is no room, for the message.

        Raises:
            DiskFullError: no room, with the bytes needed and free; nothing is left behind.
            StorageError: a file cannot be made.
            ValueError: records that no run can have.
        """
        stripes = stripes_of(records, chunk_nbytes, deal)
        offsets = pack_extents(stripes, [1] * len(stripes))
        drive_nbytes = [sum(stripe.drive_nbytes(drive) for stripe in stripes) for drive in range(len(run))]
        directories = [drive.folder.directory for drive in run]
        cure = _CURE.format(knob=knob)
        check_room(directories, drive_nbytes, what=_WHAT, cure=cure)
        if snapshot_nbytes:
            both = [sum(pair) for pair in zip(drive_nbytes, snapshot_nbytes, strict=True)]
            check_room(directories, both, what=_WHAT + SNAPSHOT, cure=cure)
        with ExitStack() as undo:
            drives = []
            for drive, nbytes in zip(run, drive_nbytes, strict=True):
                drives.append(_make(drive, engine))
                undo.callback(drives[-1].file.close)
                if nbytes:
                    reserve(drives[-1].file, drive.folder.directory, nbytes, what=_WHAT, cure=cure)
            undo.pop_all()
        # Of this process alone, so that bytes of another area never have the right checksum.
        area = uuid4()
        table = {
            spec.name: Record(area, index, spec, stripe, places)
            for index, (spec, stripe, places) in enumerate(
                zip(records, stripes, (tuple(of_record) for of_record in offsets), strict=True)
            )
        }
        return cls(drives, table, engine=engine)

    @property
    def records(self) -> Mapping[str, RecordSpec]:
        """The records by name, in table order."""
        return {name: record.spec for name, record in self._records.items()}

    @property
    def chunk_nbytes(self) -> int:
        """Length of a chunk: what offsets and lengths of reads and writes must be multiples of."""
        return next(iter(self._records.values())).stripe.chunk_nbytes

    @property
    def nbytes_reserved(self) -> int:
        """Space taken on all drives together."""
        return sum(drive.file.size_nbytes for drive in self._drives)

    def carve(self, spec: RecordSpec, *, within: str, offset: int) -> None:
        """Make a record of bytes of another one, which is itself not used any more.

        Args:
            spec: of the new one; its bytes lie within the other, and in no other that was made of it.
            within: the name of the other.
            offset: bytes from its start, a multiple of the chunk length.

        Raises:
            StateError: there is no record `within`.
            ValueError: the name is taken, or the bytes are not within the other record.
        """
        with self._lock:
            whole = self._transfers.record(within)
            chunk_nbytes = whole.stripe.chunk_nbytes
            if spec.name in self._records:
                raise ValueError(f"the scratch area has a record {spec.name!r} already")
            if offset % chunk_nbytes or not 0 <= offset <= whole.spec.nbytes - spec.nbytes:
                raise ValueError(
                    f"record {spec.name} of {spec.nbytes:,} bytes does not fit at {offset:,} of record"
                    f" {within} ({whole.spec.nbytes:,} bytes in chunks of {chunk_nbytes:,})"
                )
            deal, begin = whole.stripe.deal, whole.stripe.first_chunk
            first = begin + offset // chunk_nbytes
            stripe = Stripe(spec.nbytes, chunk_nbytes, first, deal)
            places = tuple(
                place + chunk_nbytes * (deal.count(drive, first) - deal.count(drive, begin))
                for drive, place in enumerate(whole.offsets[0])
            )
            # A number of its own: checksums of what lay there before are not taken for those of its bytes.
            self._records[spec.name] = Record(whole.run_id, self._num_made, spec, stripe, (places,))
            self._num_made += 1

    def drop(self, name: str) -> None:
        """Forget a record that was carved; its bytes may go into others.

        Raises:
            StateError: there is none of that name, or it is being read or written.
        """
        with self._lock:
            if self._transfers.record(name).in_flight():
                raise StateError(f"record {name} of the scratch area is in use; wait for its transfers first")
            del self._records[name]

    def read(self, name: str, buffer: Buffer, *, offset: int = 0, nbytes: int | None = None) -> Ticket:
        """Begin to read what was last written.

        Args:
            name: the record.
            buffer: writable and contiguous; filled from its start. It belongs to the ticket until that
                was waited for.
            offset: bytes from the record's start, a multiple of the chunk length.
            nbytes: a multiple of the chunk length, or up to the record's end; None is up to the end.

        Raises:
            StateError: never written, or the area is closed.
            StorageError: a write failed before; its kind and place, with its error as the cause.
            ValueError: a range or buffer that does not fit.
        """
        return self._transfers.read(
            name, buffer, offset, nbytes, allow=lambda record, sources: self._check_usable()
        )

    def write(self, name: str, buffer: Buffer, *, offset: int = 0, nbytes: int | None = None) -> Ticket:
        """Begin to write bytes of a record over the ones before, and checksum them.

        Args:
            name: the record.
            buffer: contiguous; taken from its start. It must not change until the ticket was waited for.
            offset: bytes from the record's start, a multiple of the chunk length.
            nbytes: a multiple of the chunk length, or up to the record's end; None is up to the end.

        Raises:
            StateError: the area is closed.
            StorageError: a write failed before; its kind and place, with its error as the cause.
            ValueError: a range or buffer that does not fit.
        """
        return self._transfers.write(
            name, buffer, offset, nbytes, allow=self._allow_write, on_failure=self._note_failure
        )

    def close(self) -> None:
        """Wait for transfers in flight, then give the space back. Closing twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            tickets = self._transfers.in_flight()
        with ExitStack() as stack:
            for drive in self._drives:
                stack.callback(drive.file.close)
            for ticket in tickets:
                ticket.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _note_failure(self, error: BaseException) -> None:
        # Without the lock: a ticket may report while it is held, and the first report is enough.
        if self._failure is None:
            self._failure = error

    def _allow_write(self) -> int:
        self._check_usable()
        return _GENERATION

    def _check_usable(self) -> None:
        if self._closed:
            raise StateError("the scratch area is closed: attach the model again")
        if self._failure is not None:
            raise because_of(
                self._failure,
                "the scratch area cannot be used further; what is committed is intact: resume the run",
            )


def _make(drive: Drive, engine: Engine) -> Drive:
    """Make a file in the run's folder on a drive and take its name away again."""
    folder = drive.folder
    # Left by a process that was killed in the instant of which the module tells. The folder is ours, and
    # locked: nobody is making a file there now.
    for left in folder.scratch_names():
        folder.discard(left)
    name = f"scratch-{uuid4()}"
    try:
        file = engine.open(name, "x+", dir_fd=folder.fd)
    finally:
        # Around the open: Ctrl-C in it may be raised when the name is there and nobody has the file.
        folder.discard(name)
    return replace(drive, file=file, path=folder.path_of(name))
