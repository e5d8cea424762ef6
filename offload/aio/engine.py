"""What an I/O engine is: the Protocols that the three engines and the simulated disk implement.

An engine moves bytes between buffers and files, asynchronously and in full: a request is done when
every byte asked for has been transferred, or it has failed with an error that says how far it came.

Invariants, held by the conformance suite in `tests/aio`:

- A completion is compared with what was asked; a short transfer is resubmitted, and a read that
  meets the end of the file is an error (`StorageError`, errno 0), never a short success.
- The request owns its buffer (holds the buffer-protocol export) until its transfer has ended, also
  when the caller drops the request; dropping a request detaches it, it does not cancel it.
- How a file is accessed is decided when it is opened, once for each drive, by a trial transfer: direct
  (O_DIRECT) where the file system takes it, else through the page cache, whose pages are then dropped
  again (`posix_fadvise`) after reads and at `sync`. `File.direct` tells, and the log once a drive.
- Any file offset, size and buffer address is accepted; aligned ones (4 KiB) take the direct path.
- What is in flight is bounded: on each drive (file system) at most the engine's queue depth of
  segments. `submit` never waits for I/O; what exceeds the depth is queued, bounded by the buffers
  that callers have. Drives do not wait for each other.
- Segments begin in the order of submission, except that a request somebody waits for overtakes those
  nobody waits for yet: a fetch that is needed now passes prefetches and write-backs. What has begun
  is not overtaken, so the queue depth bounds how long that takes.
- Requests of one engine may complete in any order. Two requests in flight that overlap in one file,
  one of them a write, have an undefined result: wait for the first.

Thread rule: every method may be called from any thread; the GIL is released while waiting, and
Ctrl-C ends a wait (the request goes on). Engines and files belong to the process that opened them.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ALIGNMENT_NBYTES", "Engine", "EngineName", "File", "Op", "OpenMode", "Request"]

# 4 KiB: the O_DIRECT alignment that every drive and file system measured accepts.
ALIGNMENT_NBYTES = 4096

Op = Literal["read", "write"]
OpenMode = Literal["r", "r+", "x+"]
EngineName = Literal["uring", "threads", "portable"]


class File(Protocol):
    """An open file of one engine. A context manager; closing twice is harmless."""

    @property
    def path(self) -> str:
        """The path as it was given, for messages."""

    @property
    def direct(self) -> bool:
        """Whether aligned transfers bypass the page cache (O_DIRECT)."""

    @property
    def size_nbytes(self) -> int:
        """The file's size now (fstat)."""

    def allocate(self, nbytes: int) -> None:
        """Reserve space for the first `nbytes` of the file, growing it (posix_fallocate).

        Raises:
            DiskFullError: the file system has no room (ENOSPC, EDQUOT).
        """

    def close(self) -> None:
        """Close the descriptors; requests in flight on this file are finished first."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Request(Protocol):
    """One read or write in flight."""

    def wait(self, timeout_s: float | None = None) -> int:
        """Block until every byte has been transferred and return how many that are.

        From the first wait on, however short, the request goes before those that nobody waited for.

        Raises:
            StorageError: the transfer failed; it carries errno, path, offset, asked and got. Every
                later wait raises it again. `DiskFullError` for ENOSPC and EDQUOT.
            RequestTimeoutError: not done after `timeout_s`; the request goes on and may be waited
                for again.
        """

    def done(self) -> bool:
        """Return whether the transfer has ended, in success or failure, without blocking."""

    def cancel(self) -> bool:
        """Give up what has not begun; return whether there was any.

        The request then ends when its segments in flight have, and every wait raises `StorageError`
        with the bytes transferred before the first gap: with errno ECANCELED, unless a segment that had
        begun fails as well. Of a cancelled write any part may have reached the file.
        """

    @property
    def finished_s(self) -> float | None:
        """When the transfer ended, in `time.perf_counter()` seconds; None while it is in flight."""


class Engine(Protocol):
    """Submits reads and writes; see the module for what it promises."""

    @property
    def name(self) -> str:
        """`uring`, `threads`, `portable` or `sim`."""

    @property
    def queue_depth(self) -> int:
        """The largest number of segments in flight at once."""

    def open(self, path: str, mode: OpenMode = "r", *, dir_fd: int | None = None) -> File:
        """Open `path`: `r` to read, `r+` to read and write, `x+` to create (0600, must not exist).

        Symbolic links are not followed (O_NOFOLLOW) and only regular files are accepted. With
        `dir_fd` the path is relative to that directory. A failing `x+` leaves no file behind.

        Raises:
            StorageError: with the errno of the failing call.
        """

    def submit(
        self, op: Op, file: File, buffer: Buffer, file_offset: int, nbytes: int | None = None
    ) -> Request:
        """Begin one transfer between `buffer` (from its start) and `file` at `file_offset`.

        Args:
            op: `read` fills the buffer, `write` stores it.
            file: a file this engine opened.
            buffer: contiguous; writable for `read`. It must hold at least `nbytes`.
            file_offset: bytes from the start of the file, >= 0.
            nbytes: bytes to transfer; the whole buffer when None. Zero is a request that is done.

        Raises:
            ValueError: a negative offset, or a buffer smaller than `nbytes`.
            BufferError: the buffer is not contiguous, or is read-only and `op` is `read`. (numpy raises
                ValueError for its own arrays.)
            TypeError: `file` was opened by another kind of engine.
            StateError: the engine or the file is closed, the file is open for reading only and `op` is
                `write`, or this process is a fork of the opener.
        """

    def sync(self, file: File) -> None:
        """Make every completed write to `file` durable (fdatasync); blocks.

        Only writes whose requests were waited for are covered.

        Raises:
            StorageError: the flush failed. The file's unsynced writes must be counted as lost.
        """

    def close(self) -> None:
        """Refuse new requests, finish those in flight, then free the engine. Closing twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
