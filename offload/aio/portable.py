"""The portable engine: buffered positional reads and writes over aiofiles, in plain Python.

For machines where the extension cannot be built. It owns an asyncio loop on a thread of its own and
a pool of threads that aiofiles runs the system calls on; it keeps every promise of
`offload.aio.engine` but speed: transfers go through the page cache and each segment costs Python time.

Thread rule: any thread may call any method. State of the loop (slots, tasks) is touched on the loop's
thread only. The system calls run without the GIL.

It does not use O_DIRECT. Python's thread pools end before anything could wait for them, so requests
still in flight when the interpreter ends may fail (ECANCELED); close the engine first. It needs
`os.preadv` (Linux, macOS, BSD).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import math
import os
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from offload.aio.engine import File, Op, OpenMode
from offload.aio.failures import io_error, timeout_error
from offload.aio.portable_file import PortableFile
from offload.errors import StateError, StorageError
from offload.sizes import MIB

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Empty when aiofiles is installed. The portable engine is the last resort; a machine where the
# extension was built works without it.
missing_reason: str = ""
try:
    from aiofiles.os import wrap
except ImportError as error:
    missing_reason = f"aiofiles is not installed ({error})"

__all__ = ["PortableEngine", "PortableRequest"]

_MAX_RETRIES = 64


class PortableRequest:
    """One transfer of the portable engine, or one of zero bytes that is done."""

    def __init__(self, op: Op, file: PortableFile, file_offset: int, nbytes: int) -> None:
        self._op = op
        self._path = file.path
        self._offset = file_offset
        self._nbytes = nbytes
        self._pid = os.getpid()
        self._finished_s: float | None = None
        self._future: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._future.add_done_callback(self._note_the_end)

    def wait(self, timeout_s: float | None = None) -> int:
        if timeout_s is not None and math.isnan(timeout_s):
            raise ValueError("timeout_s is not a number")
        if os.getpid() != self._pid and not self._future.done():
            raise StateError("this request was submitted by the parent of this process; wait for it there")
        try:
            return self._future.result(
                None if timeout_s is None else min(max(timeout_s, 0.0), threading.TIMEOUT_MAX)
            )
        except TimeoutError:
            raise timeout_error(
                self._op,
                self._path,
                timeout_s or 0.0,
                offset_bytes=self._offset,
                asked_nbytes=self._nbytes,
            ) from None

    def done(self) -> bool:
        return self._future.done()

    @property
    def finished_s(self) -> float | None:
        return self._finished_s

    def _note_the_end(self, _: concurrent.futures.Future[int]) -> None:
        self._finished_s = time.perf_counter()

    def finish(self, outcome: int | Exception) -> None:
        """Set the outcome; the engine calls this once."""
        if isinstance(outcome, Exception):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)


class PortableEngine:
    """Reads and writes with aiofiles on a private loop; see `offload.aio.engine.Engine`.

    Args:
        queue_depth: the most segments in flight.
        segment_nbytes: the most bytes of one system call.
        threads: threads the system calls run on; more than `queue_depth` of them would idle.
    """

    name = "portable"

    def __init__(self, *, queue_depth: int = 32, segment_nbytes: int = MIB, threads: int = 8) -> None:
        if queue_depth < 1 or threads < 1 or segment_nbytes < 1:
            raise ValueError(
                "queue_depth, segment_nbytes and threads must be positive, not "
                f"{queue_depth}, {segment_nbytes}, {threads}"
            )
        self.queue_depth = queue_depth
        self._segment_nbytes = segment_nbytes
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._pool = concurrent.futures.ThreadPoolExecutor(
            min(threads, queue_depth), thread_name_prefix="offload-portable"
        )
        self._calls = {"read": wrap(os.preadv), "write": wrap(os.pwritev)}
        self._slots = asyncio.Semaphore(queue_depth)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        # A daemon: an engine that nobody closed must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, name="offload-portable", daemon=True)
        self._thread.start()

    def open(self, path: str, mode: OpenMode = "r", *, dir_fd: int | None = None) -> PortableFile:
        self._check_usable()
        return PortableFile(path, mode, dir_fd)

    def submit(
        self, op: Op, file: File, buffer: Buffer, file_offset: int, nbytes: int | None = None
    ) -> PortableRequest:
        if not isinstance(file, PortableFile):
            raise TypeError(f"the portable engine takes the files it opened, not {type(file).__name__}")
        if op not in ("read", "write"):
            raise ValueError(f"op must be 'read' or 'write', not {op!r}")
        if file_offset < 0:
            raise ValueError(f"file_offset must be >= 0, not {file_offset}")
        whole = memoryview(buffer)
        if not whole.c_contiguous:
            raise BufferError("the buffer must be contiguous")
        if op == "read" and whole.readonly:
            raise BufferError("a read needs a writable buffer")
        asked = whole.nbytes if nbytes is None else nbytes
        if not 0 <= asked <= whole.nbytes:
            raise ValueError(
                f"nbytes must be 0 to {whole.nbytes}, the buffer's size, not {asked}",
            )
        if file_offset + asked >= 1 << 63:
            raise ValueError("file_offset + nbytes must be below 2^63")
        if op == "write" and not file.writable:
            raise StateError(f"{file.path} is open for reading; open it with mode 'r+' to write")
        request = PortableRequest(op, file, file_offset, asked)
        with self._lock:
            self._check_usable()
            fd = file.acquire()
            if asked == 0:
                file.release()
                request.finish(0)
            else:
                memory = whole.cast("B")[:asked]
                self._loop.call_soon_threadsafe(self._begin, request, op, file, fd, memory, file_offset)
        return request

    def sync(self, file: File) -> None:
        if not isinstance(file, PortableFile):
            raise TypeError(f"the portable engine takes the files it opened, not {type(file).__name__}")
        self._check_usable()
        file.sync()

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise StateError("the I/O engine belongs to the parent of this process; open one after the fork")
        if self._closed:
            raise StateError("the I/O engine is closed; open another")

    # From here on: on the loop's thread.

    def _begin(
        self, request: PortableRequest, op: Op, file: PortableFile, fd: int, memory: memoryview, offset: int
    ) -> None:
        task = self._loop.create_task(self._transfer(request, op, file, fd, memory, offset))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        current = set(self._tasks)
        if current:
            await asyncio.wait(current)

    async def _transfer(
        self, request: PortableRequest, op: Op, file: PortableFile, fd: int, memory: memoryview, offset: int
    ) -> None:
        failures: dict[int, int] = {}  # bytes of the request before it -> errno
        segments: list[asyncio.Task[None]] = []
        for start in range(0, memory.nbytes, self._segment_nbytes):
            await self._slots.acquire()
            if failures:
                self._slots.release()
                break
            stop = min(start + self._segment_nbytes, memory.nbytes)
            segments.append(
                self._loop.create_task(self._segment(op, fd, memory[start:stop], offset, start, failures))
            )
        await asyncio.wait(segments)
        asked = memory.nbytes
        # Given back before anybody can see that the request is done.
        memory.release()
        file.release()
        outcome: int | StorageError = asked
        if failures:
            got = min(failures)
            outcome = io_error(
                op, file.path, failures[got], offset_bytes=offset, asked_nbytes=asked, got_nbytes=got
            )
        request.finish(outcome)

    async def _segment(
        self, op: Op, fd: int, segment: memoryview, offset: int, start: int, failures: dict[int, int]
    ) -> None:
        call = self._calls[op]
        position = 0
        num_retries = 0
        with segment:
            while position < segment.nbytes:
                with segment[position:] as rest:
                    try:
                        moved = await call(fd, [rest], offset + start + position, executor=self._pool)
                    except (InterruptedError, BlockingIOError) as error:
                        num_retries += 1
                        if num_retries <= _MAX_RETRIES:
                            continue
                        failures[start + position] = error.errno or errno.EAGAIN
                        break
                    except OSError as error:
                        failures[start + position] = error.errno or errno.EIO
                        break
                    except RuntimeError:
                        # The pool takes no more work: the interpreter is ending.
                        failures[start + position] = errno.ECANCELED
                        break
                if moved == 0:
                    failures[start + position] = 0
                    break
                position += moved
        self._slots.release()
