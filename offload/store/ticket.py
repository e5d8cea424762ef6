"""A ticket: one read or write of a record in flight, over any number of I/O requests.

A ticket's buffer belongs to the transfer until `wait` has returned or raised anything but a timeout;
by then nothing is in flight into or out of it. A failure stays: every later wait raises it again.

Thread rule: `wait` and `done` may be called from any thread, by several at once. The store creates a
ticket, hands it its requests once (`start` or `abandon`), and asks earlier tickets to `settle` before
it lets a request touch the same bytes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..aio import crc32c
from ..aio.engine import Request
from ..errors import CorruptionError, OffloadError, RequestTimeoutError, StorageError
from .meter import DriveMeter

__all__ = ["IO_TIMEOUT_S", "Check", "Part", "Piece", "Ticket"]

# How long a transfer may take once somebody waits for it, when the waiter does not say. Linux gives an NVMe
# command 30 s and a few retries, so a drive that takes longer is not answered for by anybody. What is waited
# for goes before the rest, so this is for one record: 60 GB at 0.2 GB/s.
IO_TIMEOUT_S = 300.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunks `first` to `end` of one extent of a record: what a ticket touches."""

    extent: int
    first: int
    end: int

    def overlaps(self, other: Piece) -> bool:
        """Whether the two have a chunk in common."""
        return self.extent == other.extent and self.first < other.end and other.first < self.end


@dataclass(frozen=True, slots=True)
class Check:
    """What one chunk must be once it is read: `begin` and `end` are bytes of the part's view."""

    chunk: int
    begin: int
    end: int
    seed: int
    expected: int


@dataclass(frozen=True, slots=True)
class Part:
    """One request of a ticket, where it goes and since when, and what to check when it has ended."""

    request: Request
    view: memoryview
    drive: int
    path: str
    offset_bytes: int
    meter: DriveMeter
    begun_s: float
    checks: tuple[Check, ...] = ()


class Ticket:
    """One read or write of a record; `Store.read` and `Store.write` return it."""

    def __init__(
        self,
        record: str,
        pieces: Sequence[Piece],
        *,
        is_write: bool,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.record = record
        self.pieces = tuple(pieces)
        self.is_write = is_write
        self._on_failure = on_failure
        self._begun = threading.Event()
        self._parts: tuple[Part, ...] = ()
        self._num_ended = 0
        self._settled = False
        self._finished_s: float | None = None
        self._error: BaseException | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until every byte has been transferred, and for a read until all of it is verified.

        Args:
            timeout_s: the longest to wait; `IO_TIMEOUT_S` when None.

        Raises:
            CorruptionError: a chunk that was read fails its checksum; names drive, file, offset, record,
                chunk, the checksum expected and the one found.
            StorageError: a transfer failed; names drive, file and record as well.
            RequestTimeoutError: not done after `timeout_s`; it goes on and may be waited for again.
        """
        limit_s = IO_TIMEOUT_S if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        if not self._begun.wait(limit_s):
            raise RequestTimeoutError(f"the transfer of record {self.record} has not begun after {limit_s} s")
        # To the end also after a failure: when this returns, the buffer is the caller's again.
        parts = self._parts
        for index in range(self._num_ended, len(parts)):
            try:
                self._end(parts[index], deadline)
            except RequestTimeoutError as error:
                if timeout_s is None:
                    # At once: whoever hears of it may close the run first, which waits for the drive.
                    _log.error("%s", error)
                raise
            self._num_ended = max(self._num_ended, index + 1)
        self._settled = True
        self._note_the_end()
        self._parts = ()
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Return whether every transfer has ended, in success or failure, without blocking."""
        return self._begun.is_set() and all(part.request.done() for part in self._parts)

    @property
    def finished_s(self) -> float | None:
        """When the last transfer ended, in `time.perf_counter()` seconds; None before `wait` returned."""
        return self._finished_s

    def _note_the_end(self) -> None:
        for part in self._parts:
            ended_s = part.request.finished_s
            if ended_s is not None:
                part.meter.note_busy(part.begun_s, ended_s)
                self._finished_s = max(ended_s, self._finished_s or ended_s)

    def has_ended(self) -> bool:
        """Return whether nothing of it is in flight, noting a write's failure; never blocks."""
        if not self._settled and self.done():
            self.settle()
        return self._settled

    def settle(self) -> None:
        """Block until nothing of it is in flight; its failure is kept for `wait`."""
        self._begun.wait()
        for part in self._parts:
            if self.is_write:
                self._end(part, None)
            else:
                with suppress(OffloadError):  # The reader's own wait meets it again and raises it.
                    part.request.wait()
        self._settled = True
        if self.is_write:
            self._note_the_end()
            self._parts = ()  # Nothing is left to verify, so the buffer need not be held.

    def start(self, parts: Sequence[Part]) -> None:
        """Take the requests, which are in flight."""
        self._parts = tuple(parts)
        self._begun.set()

    def abandon(self, parts: Sequence[Part], error: BaseException) -> None:
        """Take the requests that were submitted before `error` ended the submission."""
        self._parts = tuple(parts)
        self._fail(error)
        self._begun.set()

    def _end(self, part: Part, deadline: float | None) -> None:
        try:
            part.request.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except RequestTimeoutError as error:
            raise self._located(error, part) from error
        except StorageError as error:
            self._fail(self._located(error, part))
        except OffloadError as error:
            self._fail(error)
        else:
            for check in part.checks:
                self._verify(part, check)

    def _verify(self, part: Part, check: Check) -> None:
        got = crc32c(part.view[check.begin : check.end], check.seed)
        if got != check.expected:
            offset_bytes = part.offset_bytes + check.begin
            self._fail(
                CorruptionError(
                    f"checksum mismatch in {part.path} (drive {part.drive}) at offset {offset_bytes:,}: "
                    f"chunk {check.chunk} of record {self.record} has crc32c {got:08x}, expected "
                    f"{check.expected:08x}; these are not the bytes that were written: check the drive "
                    "and the memory; 'offload verify' tells whether the generation before is whole",
                    path=part.path,
                    offset_bytes=offset_bytes,
                    asked_nbytes=check.end - check.begin,
                    got_nbytes=check.end - check.begin,
                )
            )

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
            if self._on_failure is not None:
                self._on_failure(error)

    def _located(self, error: StorageError, part: Part) -> StorageError:
        located = error.restated(
            f"{error.message} ({'write' if self.is_write else 'read'} of record {self.record}, "
            f"drive {part.drive}: {part.path})"
        )
        located.path = part.path
        return located
