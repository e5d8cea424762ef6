"""Reading a whole run again and checking every checksum: what `offload verify` reports.

Thread rule: the caller's thread; it waits for reads and checks them while further ones are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from ..aio.memory import aligned_buffer
from ..errors import StorageError
from .reading import Generation, RunReader
from .records import RecordSpec
from .ticket import Ticket

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["DamagedChunk", "RunReport", "VerifyReport", "verify_reader", "verify_run"]

# Reads in flight, and how long one is: enough to keep several drives busy while one read is checked,
# and long enough that asking for it costs nothing. 64 MiB of memory together.
_WINDOW = 4
_READ_NBYTES = 16 << 20

Progress = Callable[[int, int], None]


class _Read(Protocol):
    def __call__(self, name: str, buffer: Buffer, *, offset: int, nbytes: int) -> Ticket: ...


@dataclass(frozen=True, slots=True)
class DamagedChunk:
    """A chunk that could not be read or fails its checksum.

    Attributes:
        record: its record.
        chunk: which of the record's chunks.
        begin: where it begins, in bytes from the record's start.
        end: one past its last byte.
        error: what happened; names drive, file and offset as well.
    """

    record: str
    chunk: int
    begin: int
    end: int
    error: StorageError


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        nbytes: bytes read and checked, the damaged ones included.
        num_chunks: chunks read and checked.
        damaged: the chunks that are not what was written.
    """

    nbytes: int
    num_chunks: int
    damaged: tuple[DamagedChunk, ...]

    @property
    def damages(self) -> tuple[StorageError, ...]:
        """One error for each damaged chunk; each names drive, file, offset, record and chunk."""
        return tuple(chunk.error for chunk in self.damaged)

    @property
    def ok(self) -> bool:
        """Whether everything read is what was written."""
        return not self.damaged


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a verification of a run found.

    Attributes:
        newest: of the newest generation with a valid manifest.
        older: of the one before, which is checked only when the newest is damaged and which is None
            otherwise, and when there is none.
        problems: damaged manifests, one line each.
        snapshots: name, what its verification found, and what kept it from being verified; one of the
            last two is None.
    """

    newest: VerifyReport
    older: VerifyReport | None
    problems: tuple[str, ...]
    snapshots: tuple[tuple[str, VerifyReport | None, str | None], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every byte that was read is what was written, manifests and snapshots included."""
        sound = all(checked is not None and checked.ok for _, checked, _ in self.snapshots)
        return self.newest.ok and not self.problems and sound


def verify_reader(reader: RunReader, progress: Progress | None = None) -> RunReport:
    """Check every byte of a run's newest generation and snapshots, and of the one before a damaged one.

    Args:
        reader: the open run.
        progress: called with bytes checked so far and in all, after each read; from 0 again for the
            older generation and each snapshot.
    """
    newest = verify_run(reader.newest.read, reader.newest.written, reader.newest.chunk_nbytes, progress)
    older = None
    if not newest.ok and reader.older is not None and reader.older.number:
        older = _verify_older(reader.newest, newest, reader.older, progress)
    return RunReport(newest, older, reader.notes, tuple(_verify_snapshots(reader, progress)))


def verify_run(
    read: _Read, specs: Sequence[RecordSpec], chunk_nbytes: int, progress: Progress | None
) -> VerifyReport:
    """Read `specs` through `read`, some reads ahead, and collect every chunk that fails."""
    total = sum(spec.nbytes for spec in specs)
    read_nbytes = max(chunk_nbytes, _READ_NBYTES // chunk_nbytes * chunk_nbytes)
    longest = min(read_nbytes, max((spec.nbytes for spec in specs), default=0))
    spans = _spans(specs, read_nbytes)
    damaged: list[DamagedChunk] = []
    nbytes = num_chunks = 0
    in_flight: list[tuple[Ticket, memoryview, tuple[str, int, int]]] = []

    def begin(span: tuple[str, int, int], buffer: memoryview) -> None:
        name, start, end = span
        in_flight.append((read(name, buffer, offset=start, nbytes=end - start), buffer, span))

    for span in islice(spans, _WINDOW):
        begin(span, aligned_buffer(longest))
    while in_flight:
        ticket, buffer, (name, start, end) = in_flight.pop(0)
        try:
            ticket.wait()
        except StorageError as error:
            damaged += _name_damages(read, buffer, (name, start, end), chunk_nbytes, error)
        nbytes += end - start
        num_chunks += -(-(end - start) // chunk_nbytes)
        if progress is not None:
            progress(nbytes, total)
        for span in islice(spans, 1):
            begin(span, buffer)
    return VerifyReport(nbytes, num_chunks, tuple(damaged))


def _verify_older(
    newest: Generation, report: VerifyReport, older: Generation, progress: Progress | None
) -> VerifyReport:
    """Check the records in which `older` differs; of the others `report` tells already."""
    same = {
        spec.name
        for spec in older.written
        if (older.entry(spec.name).generation, older.entry(spec.name).extent)
        == (newest.entry(spec.name).generation, newest.entry(spec.name).extent)
    }
    others = [spec for spec in older.written if spec.name not in same]
    found = verify_run(older.read, others, older.chunk_nbytes, progress)
    shared = tuple(chunk for chunk in report.damaged if chunk.record in same)
    return VerifyReport(found.nbytes, found.num_chunks, (*shared, *found.damaged))


def _verify_snapshots(
    reader: RunReader, progress: Progress | None
) -> Iterator[tuple[str, VerifyReport | None, str | None]]:
    snapshots = reader.snapshots()
    for info in snapshots.list():
        if info.problem is not None:
            yield info.name, None, info.problem
            continue
        try:
            with snapshots.open(info.name) as snapshot:
                specs, chunk_nbytes = snapshot.specs, reader.newest.chunk_nbytes
                yield info.name, verify_run(snapshot.read, specs, chunk_nbytes, progress), None
        except StorageError as error:
            yield info.name, None, str(error)


def _name_damages(
    read: _Read, buffer: memoryview, span: tuple[str, int, int], chunk_nbytes: int, error: StorageError
) -> Iterator[DamagedChunk]:
    """Read the chunks of a span that failed one by one: a ticket tells of its first failure only."""
    name, start, end = span
    chunks = [(begin, min(begin + chunk_nbytes, end)) for begin in range(start, end, chunk_nbytes)]
    if len(chunks) == 1:
        yield DamagedChunk(name, start // chunk_nbytes, start, end, error)
        return
    found = False
    for begin, stop in chunks:
        try:
            read(name, buffer, offset=begin, nbytes=stop - begin).wait()
        except StorageError as again:
            found = True
            yield DamagedChunk(name, begin // chunk_nbytes, begin, stop, again)
    if not found:
        # It came right the second time: a drive, a cable or memory that fails now and then.
        yield DamagedChunk(name, start // chunk_nbytes, start, end, error)


def _spans(specs: Sequence[RecordSpec], read_nbytes: int) -> Iterator[tuple[str, int, int]]:
    for spec in specs:
        for start in range(0, spec.nbytes, read_nbytes):
            yield spec.name, start, min(start + read_nbytes, spec.nbytes)
