"""The portable engine: buffered positional reads and writes over aiofiles, in plain Python.

For machines where the extension cannot be built. It owns an asyncio loop on a thread of its own and
a pool of threads that aiofiles runs the system calls on; it keeps every promise of
`offload.aio.engine` but speed: transfers go through the page cache and each segment costs Python time.

Thread rule: any thread may call any method. The queue of segments is under a lock; tasks are made and
ended on the loop's thread only. The system calls run without the GIL.

It does not use O_DIRECT. Python's thread pools end before anything could wait for them, so requests
still in flight when the interpreter ends may fail (ECANCELED); close the engine first. It needs
`os.preadv` (Linux, macOS, BSD).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import math
import operator
import os
import threading
import time
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Self

from offload.aio.engine import File, Op, OpenMode
from offload.aio.failures import timeout_error
from offload.aio.portable_file import PortableFile
from offload.aio.segments import Segment, SegmentQueue, Transfer, checked_memory
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


class PortableRequest(Transfer):
    """One transfer of the portable engine, or one of zero bytes that is done."""

    def __init__(
        self, engine: PortableEngine, op: Op, file: PortableFile, memory: memoryview, file_offset: int
    ) -> None:
        super().__init__(op, file.path, file_offset, memory.nbytes)
        self._engine = engine
        self._file = file
        self._pid = os.getpid()
        self._finished_s: float | None = None
        # Of nothing: an exception raised from it again and again would grow by a traceback each time.
        self._future: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.memory = memory
        self.fd = file.acquire()

    def wait(self, timeout_s: float | None = None) -> int:
        if timeout_s is not None and math.isnan(timeout_s):
            raise ValueError("timeout_s is not a number")
        if not self.done():
            self._check_process()
            self._engine.expedite(self)
        if self._is_forked():
            return self._result()
        try:
            self._future.result(
                None if timeout_s is None else min(max(timeout_s, 0.0), threading.TIMEOUT_MAX)
            )
        except TimeoutError:
            raise timeout_error(
                self.op,
                self.path,
                timeout_s or 0.0,
                offset_bytes=self.file_offset,
                asked_nbytes=self.nbytes,
            ) from None
        return self._result()

    def done(self) -> bool:
        return self._finished_s is not None if self._is_forked() else self._future.done()

    def cancel(self) -> bool:
        if self.done():
            return False
        self._check_process()
        return self._engine.cancel(self)

    @property
    def finished_s(self) -> float | None:
        return self._finished_s

    def finish(self) -> None:
        """Give back buffer and file, then set the outcome; the engine calls this once."""
        self.memory.release()
        self._file.release()
        self._finished_s = time.perf_counter()
        self._future.set_result(None)

    def _is_forked(self) -> bool:
        """Whether this is a child, where a thread of the parent may hold the future's lock for ever."""
        return os.getpid() != self._pid

    def _result(self) -> int:
        outcome = self.outcome()
        if isinstance(outcome, StorageError):
            raise outcome
        return outcome

    def _check_process(self) -> None:
        if self._is_forked():
            raise StateError("this request was submitted by the parent of this process; wait for it there")


class PortableEngine:
    """Reads and writes with aiofiles on a private loop; see `offload.aio.engine.Engine`.

    Args:
        queue_depth: the most segments in flight.
        segment_nbytes: the most bytes of one system call.
        threads: threads the system calls run on; more than `queue_depth` of them would idle.
    """

    name = "portable"

    def __init__(self, *, queue_depth: int = 32, segment_nbytes: int = MIB, threads: int = 8) -> None:
        if threads < 1:
            raise ValueError(f"threads must be positive, not {threads}")
        self._queue: SegmentQueue[PortableRequest] = SegmentQueue(queue_depth, segment_nbytes)
        self.queue_depth = queue_depth
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._ending = threading.Lock()  # held by the one of several closers that takes it all down
        self._closed = False
        self._pool = concurrent.futures.ThreadPoolExecutor(
            min(threads, queue_depth), thread_name_prefix="offload-portable"
        )
        self._calls = {"read": wrap(os.preadv), "write": wrap(os.pwritev)}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        # A daemon: an engine that nobody closed must not keep the interpreter from ending.
        self._thread = threading.Thread(
            target=_serve, args=(self._loop,), name="offload-portable", daemon=True
        )
        self._thread.start()
        # Work in flight holds the engine, so one that is dropped is idle. A child has no such thread.
        self._drop = weakref.finalize(self, _end, self._loop, self._pool, self._pid)
        self._drop.atexit = False

    def open(self, path: str, mode: OpenMode = "r", *, dir_fd: int | None = None) -> PortableFile:
        self._check_usable()
        return PortableFile(path, mode, dir_fd)

    def submit(
        self, op: Op, file: File, buffer: Buffer, file_offset: int, nbytes: int | None = None
    ) -> PortableRequest:
        if not isinstance(file, PortableFile):
            raise TypeError(f"the portable engine takes the files it opened, not {type(file).__name__}")
        self._check_usable()  # before the lock too, which a fork may have left taken
        memory = checked_memory(op, buffer, file_offset, nbytes)
        if op == "write" and not file.writable:
            raise StateError(f"{file.path} is open for reading; open it with mode 'r+' to write")
        with self._lock:
            self._check_usable()
            request = PortableRequest(self, op, file, memory, operator.index(file_offset))
            if request.ended:
                request.finish()
            else:
                self._queue.push(request)
                self._loop.call_soon_threadsafe(self._begin)
        return request

    def expedite(self, request: PortableRequest) -> None:
        """Let a request that somebody waits for pass those that nobody waits for."""
        with self._lock:
            self._queue.expedite(request)

    def cancel(self, request: PortableRequest) -> bool:
        """Give up what has not begun of a request; return whether there was any."""
        with self._lock:
            gave_up = self._queue.cancel(request)
            if gave_up:
                self._finish_if_ended(request)
            return gave_up

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
            self._idle.wait_for(lambda: self._queue.num_open == 0)
        with self._ending:
            self._drop()
            self._thread.join()
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

    def _finish_if_ended(self, request: PortableRequest) -> None:
        """Called under the lock, so that who sees the queue empty sees its requests done."""
        if request.ended:
            request.finish()
            self._idle.notify_all()

    # From here on: on the loop's thread.

    def _begin(self) -> None:
        """Begin as many segments as the depth allows."""
        while True:
            with self._lock:
                segment = self._queue.take()
            if segment is None:
                return
            task = self._loop.create_task(self._run(segment))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, segment: Segment[PortableRequest]) -> None:
        again = True
        while again:
            result = await self._call(segment)
            with self._lock:
                again = self._queue.settle(segment, result)
                if not again:
                    self._finish_if_ended(segment.transfer)
        self._begin()

    async def _call(self, segment: Segment[PortableRequest]) -> int:
        """Make one system call; return the bytes moved or the negative errno."""
        request = segment.transfer
        with request.memory[segment.start : segment.start + segment.nbytes] as memory:
            try:
                moved: int = await self._calls[request.op](
                    request.fd, [memory], request.file_offset + segment.start, executor=self._pool
                )
            except OSError as error:
                return -(error.errno or errno.EIO)
            except RuntimeError:
                # The pool takes no more work: the interpreter is ending.
                return -errno.ECANCELED
        return moved


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop until it is stopped; on a thread of its own."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, pool: concurrent.futures.ThreadPoolExecutor, pid: int) -> None:
    """Let an idle engine's threads go, on whatever thread that is; waits for none of them."""
    if os.getpid() == pid:
        loop.call_soon_threadsafe(loop.stop)
        pool.shutdown(wait=False)
