"""An engine on a simulated disk: the Protocols of `offload.aio.engine`, without threads or real time.

Segments begin when a request is submitted or another segment completes, and complete when somebody
lets simulated time pass: a wait runs until its request is done, `done` runs one step at most (a coin
says), `sync` runs what falls into its own duration, and `close` runs until nothing is in flight.

Thread rule: any thread may call any method; the disk's lock is held for each call, so nothing goes on
while a thread waits, and a wait without a timeout for what hangs is `SimStuckError` and no deadlock.
"""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from offload.aio.engine import File, Op, OpenMode
from offload.aio.failures import timeout_error
from offload.aio.segments import Segment, SegmentQueue, Transfer, checked_memory
from offload.aio.sim.disk import SimDisk
from offload.aio.sim.faults import SimStuckError
from offload.errors import StateError, StorageError
from offload.sizes import KIB

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["SimEngine", "SimFile", "SimRequest"]


class SimFile:
    """An open file on a simulated disk; see `offload.aio.engine.File`."""

    direct = False

    def __init__(self, disk: SimDisk, path: str, mode: OpenMode, dir_fd: int | None) -> None:
        self.path = path
        self.writable = mode != "r"
        self.content = disk.open(path, mode, dir_fd)
        self.num_in_flight = 0
        self._disk = disk
        self._closed = False

    @property
    def size_nbytes(self) -> int:
        with self._disk.lock:
            self.check_open()
            return self.content.size_nbytes

    def allocate(self, nbytes: int) -> None:
        if nbytes < 0:
            raise ValueError(f"nbytes must be >= 0, not {nbytes}")
        with self._disk.lock:
            self.check_open()
            self._disk.allocate(self.content, self.path, nbytes)

    def close(self) -> None:
        with self._disk.lock:
            self._closed = True
            while self.num_in_flight and not self._disk.is_dead:
                if not self._disk.step():
                    raise SimStuckError(f"closing {self.path} waits for requests that are stuck")

    def check_open(self) -> None:
        """Raise unless the file can be used."""
        if self._closed:
            raise StateError(f"{self.path} is closed; open it again to use it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SimRequest(Transfer):
    """One transfer on a simulated disk."""

    def __init__(
        self, engine: SimEngine, op: Op, file: SimFile, memory: memoryview, file_offset: int
    ) -> None:
        super().__init__(op, file.path, file_offset, memory.nbytes)
        self.memory = memory
        self.file = file
        file.num_in_flight += 1
        self._engine = engine
        self._disk = engine.disk
        self._result: int | StorageError | None = None
        self._finished_s: float | None = None

    def wait(self, timeout_s: float | None = None) -> int:
        if timeout_s is not None and math.isnan(timeout_s):
            raise ValueError("timeout_s is not a number")
        with self._disk.lock:
            self._engine.expedite(self)
            until_s = math.inf if timeout_s is None else self._disk.now_s + max(timeout_s, 0.0)
            while self._result is None:
                if not self._disk.step(until_s):
                    self._give_up(timeout_s)
            # Made anew: one that is raised again and again would grow by a traceback each time.
            outcome = self.outcome()
            if isinstance(outcome, StorageError):
                raise outcome
            return outcome

    def done(self) -> bool:
        with self._disk.lock:
            if self._result is None and not self._disk.is_dead and self._disk.coin():
                self._disk.step()
            return self._result is not None

    def cancel(self) -> bool:
        with self._disk.lock:
            return self._engine.cancel(self)

    @property
    def finished_s(self) -> float | None:
        return self._finished_s

    def finish(self) -> None:
        """Give back buffer and file and note the outcome; the engine calls this once."""
        self.memory.release()
        self.file.num_in_flight -= 1
        # The real clock, as the Protocol says: what measures must be able to compare. No decision
        # of the simulation depends on it.
        self._finished_s = time.perf_counter()
        self._result = self.outcome()

    def _give_up(self, timeout_s: float | None) -> None:
        if timeout_s is None or math.isinf(timeout_s):
            raise SimStuckError(
                f"{self.op} of {self.nbytes:,} bytes at offset {self.file_offset:,} of {self.path} hangs for "
                "ever; a real engine would wait here without end: give a timeout, or unstick the disk"
            )
        raise timeout_error(
            self.op, self.path, timeout_s, offset_bytes=self.file_offset, asked_nbytes=self.nbytes
        )


class SimEngine:
    """Reads and writes on a simulated disk; see `offload.aio.engine.Engine`.

    Args:
        disk: where; several engines may share one.
        queue_depth: the most segments in flight.
        segment_nbytes: the most bytes of one segment.
    """

    name = "sim"

    def __init__(self, disk: SimDisk, *, queue_depth: int = 8, segment_nbytes: int = 64 * KIB) -> None:
        self.disk = disk
        self.queue_depth = queue_depth
        self._queue: SegmentQueue[SimRequest] = SegmentQueue(queue_depth, segment_nbytes)
        self._closed = False

    def open(self, path: str, mode: OpenMode = "r", *, dir_fd: int | None = None) -> SimFile:
        with self.disk.lock:
            self._check_usable()
            return SimFile(self.disk, path, mode, dir_fd)

    def submit(
        self, op: Op, file: File, buffer: Buffer, file_offset: int, nbytes: int | None = None
    ) -> SimRequest:
        sim_file = self._own(file)
        memory = checked_memory(op, buffer, file_offset, nbytes)
        if op == "write" and not sim_file.writable:
            raise StateError(f"{sim_file.path} is open for reading; open it with mode 'r+' to write")
        with self.disk.lock:
            self._check_usable()
            sim_file.check_open()
            request = SimRequest(self, op, sim_file, memory, file_offset)
            if request.ended:
                request.finish()
            else:
                self._queue.push(request)
                self._begin()
        return request

    def sync(self, file: File) -> None:
        sim_file = self._own(file)
        with self.disk.lock:
            self._check_usable()
            sim_file.check_open()
            self.disk.sync(sim_file.content, sim_file.path)

    def close(self) -> None:
        with self.disk.lock:
            self._closed = True
            while self._queue.num_open and not self.disk.is_dead:
                if not self.disk.step():
                    raise SimStuckError("closing the engine waits for requests that are stuck")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def expedite(self, request: SimRequest) -> None:
        """Let a request that somebody waits for pass those that nobody waits for."""
        self._queue.expedite(request)

    def cancel(self, request: SimRequest) -> bool:
        """Give up what has not begun of a request; return whether there was any."""
        gave_up = self._queue.cancel(request)
        if gave_up and request.ended:
            request.finish()
        return gave_up

    def _own(self, file: File) -> SimFile:
        if not isinstance(file, SimFile):
            raise TypeError(f"the sim engine takes the files it opened, not {type(file).__name__}")
        return file

    def _check_usable(self) -> None:
        if self._closed:
            raise StateError("the I/O engine is closed; open another")

    def _begin(self) -> None:
        """Begin as many segments as the depth allows."""
        while (segment := self._queue.take()) is not None:
            self._start(segment)

    def _start(self, segment: Segment[SimRequest]) -> None:
        request = segment.transfer
        memory = request.memory[segment.start : segment.start + segment.nbytes]

        def on_end(result: int) -> None:
            memory.release()
            if self._queue.settle(segment, result):
                self._start(segment)
                return
            if request.ended:
                request.finish()
            self._begin()

        self.disk.begin(
            request.op,
            request.file.content,
            request.path,
            request.file_offset + segment.start,
            memory,
            on_end,
        )
