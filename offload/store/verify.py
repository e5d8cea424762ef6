"""Reading a whole run again and checking every checksum: what `offload verify` reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from ..aio.memory import aligned_buffer
from ..errors import StorageError
from .records import RecordSpec
from .ticket import Ticket

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["VerifyReport", "verify_run"]

# Chunks in flight: enough to keep a drive busy while one is being checked.
_WINDOW = 4


class _Read(Protocol):
    def __call__(self, name: str, buffer: Buffer, *, offset: int, nbytes: int) -> Ticket: ...


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        nbytes: bytes read and checked, the damaged ones included.
        num_chunks: chunks read and checked.
        damages: one error for each chunk that could not be read or failed its checksum; each names
            drive, file, offset, record and chunk.
    """

    nbytes: int
    num_chunks: int
    damages: tuple[StorageError, ...]

    @property
    def ok(self) -> bool:
        """Whether everything read is what was written."""
        return not self.damages


def verify_run(
    read: _Read,
    specs: Sequence[RecordSpec],
    chunk_nbytes: int,
    progress: Callable[[int, int], None] | None,
) -> VerifyReport:
    """Read `specs` chunk by chunk through `read`, a few chunks ahead, and collect what fails."""
    total = sum(spec.nbytes for spec in specs)
    chunks = _chunks(specs, chunk_nbytes)
    buffers = [aligned_buffer(chunk_nbytes) for _ in range(_WINDOW)]
    damages: list[StorageError] = []
    nbytes = num_chunks = 0
    in_flight: list[tuple[Ticket, memoryview, int]] = []

    def begin(chunk: tuple[str, int, int], buffer: memoryview) -> None:
        name, offset, length = chunk
        in_flight.append((read(name, buffer, offset=offset, nbytes=length), buffer, length))

    for chunk, buffer in zip(islice(chunks, _WINDOW), buffers, strict=False):
        begin(chunk, buffer)
    while in_flight:
        ticket, buffer, length = in_flight.pop(0)
        try:
            ticket.wait()
        except StorageError as error:
            damages.append(error)
        nbytes += length
        num_chunks += 1
        if progress is not None:
            progress(nbytes, total)
        for chunk in islice(chunks, 1):
            begin(chunk, buffer)
    return VerifyReport(nbytes, num_chunks, tuple(damages))


def _chunks(specs: Sequence[RecordSpec], chunk_nbytes: int) -> Iterator[tuple[str, int, int]]:
    for spec in specs:
        for offset in range(0, spec.nbytes, chunk_nbytes):
            yield spec.name, offset, min(chunk_nbytes, spec.nbytes - offset)
