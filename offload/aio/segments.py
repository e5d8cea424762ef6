"""The segments of requests in order: which begins next, what a completion means, what was given up.

The pure part that the engines written in Python share; `csrc/aio/queue.cc` is the same in C++.

Invariants:
- At most `queue_depth` segments have been taken and not settled.
- Segments are taken in the order of `push`, except that transfers somebody waits for come first.
- A transfer that failed or was cancelled begins nothing more, and ends with its last live segment.

Thread rule: none of its own; the engine calls it under its lock. Nothing here does I/O.
"""

from __future__ import annotations

import errno
import operator
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from offload.aio.engine import Op
from offload.aio.failures import io_error
from offload.errors import StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Segment", "SegmentQueue", "Transfer", "checked_memory"]

# EINTR and EAGAIN on a regular file are rare and pass; a device that answers nothing else is broken.
_MAX_RETRIES = 64


class Transfer:
    """How far one request has come; the requests of the engines are its children."""

    def __init__(self, op: Op, path: str, file_offset: int, nbytes: int) -> None:
        self.op = op
        self.path = path
        self.file_offset = file_offset
        self.nbytes = nbytes
        self.cut_nbytes = 0  # of the request, what was begun or will never be
        self.num_live = 0  # segments taken and not settled
        self.is_awaited = False
        self.failed_at: int | None = None  # bytes before the first gap
        self.failed_with = 0  # errno there

    @property
    def ended(self) -> bool:
        """Whether nothing of it is in flight or still to come."""
        return self.num_live == 0 and self.cut_nbytes == self.nbytes

    def outcome(self) -> int | StorageError:
        """Return what a wait returns or raises, once it has ended."""
        if self.failed_at is None:
            return self.nbytes
        return io_error(
            self.op,
            self.path,
            self.failed_with,
            offset_bytes=self.file_offset,
            asked_nbytes=self.nbytes,
            got_nbytes=self.failed_at,
        )

    def fail(self, at: int, number: int) -> None:
        """Note a gap at `at` bytes; the first one counts. Nothing more begins."""
        if self.failed_at is None or at < self.failed_at:
            self.failed_at, self.failed_with = at, number
        self.cut_nbytes = self.nbytes


TransferT = TypeVar("TransferT", bound=Transfer)


@dataclass(slots=True)
class Segment(Generic[TransferT]):
    """The part of a transfer that is one operation; after a short one, what is left of it.

    Attributes:
        transfer: what it belongs to.
        start: bytes of the transfer before it.
        nbytes: its length.
        num_retries: how often in a row it was interrupted.
    """

    transfer: TransferT
    start: int
    nbytes: int
    num_retries: int = 0


class SegmentQueue(Generic[TransferT]):
    """The transfers that are still to begin, wholly or in part.

    Args:
        queue_depth: the most segments that may be live at once.
        segment_nbytes: the most bytes of one segment.
    """

    def __init__(self, queue_depth: int, segment_nbytes: int) -> None:
        if queue_depth < 1 or segment_nbytes < 1:
            raise ValueError(
                f"queue_depth and segment_nbytes must be positive, not {queue_depth}, {segment_nbytes}"
            )
        self.queue_depth = queue_depth
        self.segment_nbytes = segment_nbytes
        self.num_live = 0
        self.num_open = 0  # transfers that have not ended
        self._awaited: deque[TransferT] = deque()
        # What was expedited stays in here too, and is passed over when its turn comes.
        self._others: deque[TransferT] = deque()

    def push(self, transfer: TransferT) -> None:
        """Add a transfer of at least one byte at the end."""
        self._others.append(transfer)
        self.num_open += 1

    def expedite(self, transfer: TransferT) -> None:
        """Let the rest of a transfer pass those that nobody waits for."""
        if not transfer.is_awaited and transfer.cut_nbytes < transfer.nbytes:
            transfer.is_awaited = True
            self._awaited.append(transfer)

    def take(self) -> Segment[TransferT] | None:
        """Return the next segment to begin; None when none is left or the depth is reached."""
        if self.num_live == self.queue_depth:
            return None
        transfer = self._next()
        if transfer is None:
            return None
        nbytes = min(self.segment_nbytes, transfer.nbytes - transfer.cut_nbytes)
        segment = Segment(transfer, transfer.cut_nbytes, nbytes)
        transfer.cut_nbytes += nbytes
        transfer.num_live += 1
        self.num_live += 1
        return segment

    def settle(self, segment: Segment[TransferT], result: int) -> bool:
        """Take note of a completion; return whether the segment, now its rest, goes again.

        Args:
            segment: one that was taken.
            result: bytes moved, 0 at the end of the file, or a negative errno.
        """
        if result in (-errno.EINTR, -errno.EAGAIN):
            segment.num_retries += 1
            if segment.num_retries <= _MAX_RETRIES:
                return True
        if 0 < result < segment.nbytes:
            segment.start += result
            segment.nbytes -= result
            segment.num_retries = 0
            return True
        transfer = segment.transfer
        if result <= 0:
            transfer.fail(segment.start, -result)
        transfer.num_live -= 1
        self.num_live -= 1
        self.num_open -= transfer.ended
        return False

    def cancel(self, transfer: TransferT) -> bool:
        """Give up what has not begun; return whether there was any."""
        if transfer.cut_nbytes == transfer.nbytes:
            return False
        transfer.fail(transfer.cut_nbytes, errno.ECANCELED)
        self.num_open -= transfer.ended
        return True

    def _next(self) -> TransferT | None:
        for waiting in (self._awaited, self._others):
            while waiting:
                transfer = waiting[0]
                passed = waiting is self._others and transfer.is_awaited
                if not passed and transfer.cut_nbytes < transfer.nbytes:
                    return transfer
                waiting.popleft()
        return None


def checked_memory(op: Op, buffer: Buffer, file_offset: int, nbytes: int | None) -> memoryview:
    """Return the bytes of `buffer` to transfer, after checking what `Engine.submit` promises to check."""
    if op not in ("read", "write"):
        raise ValueError(f"op must be 'read' or 'write', not {op!r}")
    # What is no whole number must fail here, not where the system call is made; and those of numpy wrap.
    file_offset = operator.index(file_offset)
    if file_offset < 0:
        raise ValueError(f"file_offset must be >= 0, not {file_offset}")
    whole = memoryview(buffer)
    if not whole.c_contiguous:
        raise BufferError("the buffer must be contiguous")
    if op == "read" and whole.readonly:
        raise BufferError("a read needs a writable buffer")
    asked = whole.nbytes if nbytes is None else operator.index(nbytes)
    if not 0 <= asked <= whole.nbytes:
        raise ValueError(f"nbytes must be 0 to {whole.nbytes}, the buffer's size, not {asked}")
    if file_offset + asked >= 1 << 63:
        raise ValueError("file_offset + nbytes must be below 2^63")
    # A shape with a zero in it cannot be cast.
    return whole.cast("B")[:asked] if asked else memoryview(b"")
