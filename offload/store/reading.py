"""A run opened for reading alone: any of its generations, verified as it is read, nothing ever written.

Other readers may have the run open at the same time, a writer may not. It works where the store cannot
be opened to write: on a read-only file system, or with a newest generation that is damaged.

Thread rule: `Generation.read` and its tickets may be used from any threads; `close` is for one thread,
after every ticket was waited for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from ..aio.engine import Engine
from ..errors import CorruptionError, StateError
from . import manifests
from .drives import Drive, close_drives, open_drives
from .records import RecordEntry, RecordSpec, stripes_of
from .snapshots import Snapshots
from .span import Span
from .submit import submit, submitting
from .table import Record
from .ticket import Piece, Ticket

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Generation", "RunReader"]


class Generation:
    """One committed generation of an open run.

    Args:
        drives: the run's, in order.
        recovered: the manifest.
        engine: does the I/O.
    """

    def __init__(self, drives: Sequence[Drive], recovered: manifests.Recovered, *, engine: Engine) -> None:
        self._drives = tuple(drives)
        self._engine = engine
        self.recovered = recovered
        manifest = recovered.manifest
        stripes = stripes_of([entry.spec for entry in manifest.records], manifest.chunk_nbytes, manifest.deal)
        self._records = {
            entry.spec.name: Record.from_entry(manifest.run_id, index, entry, stripe)
            for index, (entry, stripe) in enumerate(zip(manifest.records, stripes, strict=True))
        }

    @property
    def number(self) -> int:
        """The generation's number; 0 when nothing was committed."""
        return self.recovered.manifest.generation

    @property
    def state(self) -> Mapping[str, Any]:
        """What was committed with it."""
        return MappingProxyType(dict(self.recovered.manifest.state))

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the run says it is."""
        return MappingProxyType(dict(self.recovered.manifest.identity))

    @property
    def chunk_nbytes(self) -> int:
        """Length of a chunk: what offsets and lengths of reads must be multiples of."""
        return self.recovered.manifest.chunk_nbytes

    @property
    def written(self) -> list[RecordSpec]:
        """The records that can be read, in table order."""
        return [entry.spec for entry in self.recovered.manifest.records if entry.generation]

    def snapshots(self) -> Snapshots:
        """Return the snapshots of the generation's run; they have the same table of records."""
        run_id = self.recovered.manifest.run_id
        return Snapshots(self._drives, self._records, engine=self._engine, run_id=run_id)

    def entry(self, name: str) -> RecordEntry:
        """Return what the manifest says about a record."""
        return self.recovered.manifest.records[self._record(name).index]

    def place(self, name: str, chunk: int) -> tuple[int, str, int]:
        """Return drive, data file and offset in bytes of a record's chunk."""
        record, extent = self._record(name), self.entry(name).extent
        drive, offset_bytes = record.stripe.place(chunk)
        return drive, self._drives[drive].path, record.offsets[extent][drive] + offset_bytes

    def read(self, name: str, buffer: Buffer, *, offset: int = 0, nbytes: int | None = None) -> Ticket:
        """Begin to read bytes of a record, as `Store.read` does.

        Args:
            name: the record.
            buffer: writable and contiguous; filled from its start. It belongs to the ticket until that
                was waited for.
            offset: bytes from the record's start, a multiple of `chunk_nbytes`.
            nbytes: a multiple of `chunk_nbytes`, or up to the record's end; None is up to the end.

        Raises:
            StateError: there is no such record, or it was never written.
            ValueError: a range or buffer that does not fit.
        """
        span = Span.of(self._record(name), buffer, offset, nbytes)
        sources = span.record.newest(span.first, span.end)
        ticket = Ticket(name, [Piece(at.extent, first, end) for at, first, end in sources], is_write=False)
        with submitting(ticket, ()) as parts:
            for version, first, end in sources:
                transfers = span.transfers(version, first, end, verify=True)
                submit(self._engine, self._drives, "read", parts, transfers)
        return ticket

    def _record(self, name: str) -> Record:
        record = self._records.get(name)
        if record is None:
            raise StateError(f"generation {self.number} has no record {name!r}")
        return record


class RunReader:
    """An open run; a context manager. Made by `open`.

    Attributes:
        newest: the newest generation with a valid manifest.
        older: the one before it that has a valid manifest, None when there is none.
        notes: damaged manifests that were passed over or have a sound copy, one line each.
    """

    def __init__(self, drives: Sequence[Drive], recovered: manifests.Recovered, *, engine: Engine) -> None:
        self._drives = tuple(drives)
        folders = [drive.folder for drive in self._drives]
        self.newest = Generation(self._drives, recovered, engine=engine)
        self.older: Generation | None = None
        notes = list(recovered.notes)
        # Of a run that is written in place there is one: what came before was written over.
        if self.newest.number and not recovered.manifest.in_place:
            # None of an earlier generation is readable: there is only one then.
            with suppress(CorruptionError):
                older = manifests.find_newest(folders, below=self.newest.number)
                self.older = Generation(self._drives, older, engine=engine)
                notes += older.notes
        self.notes = tuple(notes)

    @classmethod
    def open(cls, directories: Sequence[str | os.PathLike[str]], *, engine: Engine, run_id: str) -> Self:
        """Lock a run against writers and open it; nothing but the lock file is written.

        Args:
            directories: the ones it was created in, or where those drives are mounted now, in any order.
            engine: does the I/O; outlives the reader.
            run_id: which run.

        Raises:
            LockedError: a live process writes to it; names its pid.
            StorageError: a drive is missing (named), a folder is not ours, or the format is too new.
            CorruptionError: no valid manifest, a data file cut short, or a run that was written in place
                (`Store.create`) by a process that did not end in order.
        """
        paths = [os.path.abspath(directory) for directory in directories]
        if not paths:
            raise ValueError("name the directories of the run; got none")
        drives, recovered = open_drives(paths, UUID(run_id), engine=engine, read_only=True)
        try:
            return cls(drives, recovered, engine=engine)
        except BaseException:
            close_drives(drives)
            raise

    @property
    def run_id(self) -> str:
        """The run's UUID."""
        return str(self.newest.recovered.manifest.run_id)

    @property
    def paths(self) -> tuple[str, ...]:
        """The run's folders, one a drive."""
        return tuple(drive.folder.path for drive in self._drives)

    def snapshots(self) -> Snapshots:
        """Return the run's snapshots, to be listed and opened while the reader is open."""
        return self.newest.snapshots()

    def close(self) -> None:
        """Release the run. Closing twice is harmless."""
        close_drives(self._drives)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
