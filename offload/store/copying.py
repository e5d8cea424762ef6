"""Copies records through a bounded buffer: some pieces are being read while others are being written.

Owns nothing; the buffer is the caller's and his again when it returns or raises. Thread rule: one
thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .records import RecordSpec
from .ticket import Ticket

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Begin", "copy_records", "min_buffer_nbytes"]

# Two being read and two being written keep a drive busy in both directions; more only shares it out.
_MAX_SLOTS = 4


class Begin(Protocol):
    """Begins to read or write a range of a record; `Store.read` and `Store.write` are such."""

    def __call__(self, name: str, buffer: Buffer, *, offset: int, nbytes: int) -> Ticket: ...


@dataclass(frozen=True, slots=True)
class _Piece:
    name: str
    offset: int
    nbytes: int


def min_buffer_nbytes(specs: Sequence[RecordSpec], chunk_nbytes: int) -> int:
    """Return the smallest buffer that `copy_records` can use: a chunk, or the largest record."""
    return min(chunk_nbytes, max((spec.nbytes for spec in specs), default=chunk_nbytes))


def copy_records(
    specs: Sequence[RecordSpec],
    chunk_nbytes: int,
    read: Begin,
    write: Begin,
    buffer: memoryview,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Read each of `specs` with `read` and write it with `write`; both end before this returns.

    Args:
        specs: the records, in the order they are copied.
        chunk_nbytes: length of a chunk; pieces are whole chunks.
        read: fills a part of the buffer.
        write: takes it from there.
        buffer: at least `min_buffer_nbytes`; four times a few MiB are enough for full speed.
        progress: called with bytes written so far and in all.

    Raises:
        ValueError: the buffer is too small.
        OffloadError: a read or write failed; nothing is in flight any more.
    """
    slots = _slots(specs, chunk_nbytes, buffer)
    total = sum(spec.nbytes for spec in specs)
    done = 0
    free = deque(slots)
    reading: deque[tuple[Ticket, _Piece, memoryview]] = deque()
    writing: deque[tuple[Ticket, _Piece, memoryview]] = deque()

    def advance() -> None:
        nonlocal done
        if reading and len(reading) >= len(writing):
            ticket, piece, slot = reading[0]
            ticket.wait()
            reading.popleft()
            begun = write(piece.name, slot, offset=piece.offset, nbytes=piece.nbytes)
            writing.append((begun, piece, slot))
            return
        ticket, piece, slot = writing[0]
        ticket.wait()
        writing.popleft()
        free.append(slot)
        done += piece.nbytes
        if progress is not None:
            progress(done, total)

    try:
        for piece in _pieces(specs, chunk_nbytes, len(slots[0]) if slots else 0):
            while not free:
                advance()
            slot = free.popleft()
            begun = read(piece.name, slot, offset=piece.offset, nbytes=piece.nbytes)
            reading.append((begun, piece, slot))
        while reading or writing:
            advance()
    finally:
        for ticket, _, _ in (*reading, *writing):
            ticket.settle()


def _slots(specs: Sequence[RecordSpec], chunk_nbytes: int, buffer: memoryview) -> list[memoryview]:
    least = min_buffer_nbytes(specs, chunk_nbytes)
    if len(buffer) < least:
        raise ValueError(f"a buffer of {len(buffer):,} bytes to copy records; it needs {least:,}")
    count = min(_MAX_SLOTS, len(buffer) // least)
    # Whole chunks; a buffer shorter than one holds the largest record.
    nbytes = len(buffer) // count // chunk_nbytes * chunk_nbytes or least
    return [buffer[index * nbytes : (index + 1) * nbytes] for index in range(count)]


def _pieces(specs: Sequence[RecordSpec], chunk_nbytes: int, slot_nbytes: int) -> Iterator[_Piece]:
    for spec in specs:
        step = max(slot_nbytes, chunk_nbytes)
        for offset in range(0, spec.nbytes, step):
            yield _Piece(spec.name, offset, min(step, spec.nbytes - offset))
