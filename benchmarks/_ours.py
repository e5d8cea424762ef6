"""Moves bytes with an engine of ours, the way the runtime does, and takes the time.

Requests are larger than a block; the engine cuts them. The buffers are an `Arena`, as in a run: huge
pages where the machine has them, touched before the clock starts. `OUTSTANDING` requests are asked for
at any time, over a ring of buffers that is used again and again.

The time runs from the first submission to the end of the last wait; CPU seconds are those of this
process meanwhile (RUSAGE_SELF), in which nothing else runs: Python, the engine's threads, and any that
the kernel starts for io_uring.

Thread rule: the caller's thread only.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from _cells import OUTSTANDING, Cell, Transfer

from offload.aio import Engine, EngineName, File, Op, Request, open_engine
from offload.buffers import Arena, Budget
from offload.errors import StorageError
from offload.sizes import format_bytes

__all__ = ["fill_file", "run_blocks", "run_ours"]


def run_ours(
    name: EngineName,
    cell: Cell,
    files: Sequence[Path],
    file_nbytes: int,
    nbytes: int,
    *,
    footprint_nbytes: int = 0,
) -> Transfer:
    """Move `nbytes` to or from each file, wrapping around it, and return what that took.

    Args:
        name: the engine.
        cell: direction, size of a segment, and segments in flight on each drive.
        files: existing files, one on each drive.
        file_nbytes: their size, at least `cell.file_nbytes`.
        nbytes: a multiple of the request size is moved, at most so many.
        footprint_nbytes: cycle through so much memory for each file; 0 is the least that
            `OUTSTANDING` requests need.
    """
    num_buffers = max(OUTSTANDING, footprint_nbytes // cell.request_nbytes)
    return _run(name, cell, files, file_nbytes, nbytes, cell.request_nbytes, num_buffers, OUTSTANDING)


def run_blocks(
    name: EngineName, cell: Cell, files: Sequence[Path], file_nbytes: int, nbytes: int
) -> Transfer:
    """Do as `run_ours`, with one request from Python for each block, `depth` of them outstanding."""
    return _run(name, cell, files, file_nbytes, nbytes, cell.block_nbytes, cell.depth, cell.depth)


def fill_file(path: Path, nbytes: int) -> None:
    """Create a file with pseudo-random bytes, every block of it written, and flush it."""
    block = b"".join((number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") for number in range(1 << 17))
    with open_engine() as engine, engine.open(str(path), "x+") as file:
        file.allocate(nbytes)
        for offset in range(0, nbytes, len(block)):
            engine.submit("write", file, block, offset, min(len(block), nbytes - offset)).wait()
        engine.sync(file)


def _run(
    name: EngineName,
    cell: Cell,
    files: Sequence[Path],
    file_nbytes: int,
    nbytes: int,
    request_nbytes: int,
    num_buffers: int,
    outstanding: int,
) -> Transfer:
    mode = "r" if cell.op == "read" else "r+"
    with (
        open_engine(
            name, queue_depth=cell.depth, segment_nbytes=cell.block_nbytes, threads=cell.depth
        ) as engine,
        _rings(len(files), num_buffers, request_nbytes) as rings,
        ExitStack() as opened,  # an open file would keep the quiet disk from being taken down
    ):
        streams = []
        for path, ring in zip(files, rings, strict=True):
            file = opened.enter_context(engine.open(str(path), mode))
            if not file.direct:
                raise StorageError(f"{path} is not read and written directly (O_DIRECT); name another --disk")
            streams.append(_Stream(engine, file, cell.op, ring, file_nbytes, outstanding))
        count = nbytes // request_nbytes
        before, began_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(count):
            for stream in streams:
                stream.step()
        for stream in streams:
            stream.finish()
        elapsed_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Transfer(count * request_nbytes * len(files), elapsed_s, cpu_s, cpu_s)


class _Stream:
    """Sequential requests on one file, so many outstanding, over a ring of buffers."""

    def __init__(
        self,
        engine: Engine,
        file: File,
        op: Op,
        ring: Sequence[memoryview],
        file_nbytes: int,
        outstanding: int,
    ) -> None:
        self._engine, self._file, self._op = engine, file, op
        self._ring = ring
        self._outstanding = outstanding
        self._request_nbytes = len(ring[0])
        # Wrapping at whole requests: a file that is not a multiple keeps a tail that is never used.
        self._requests_in_file = file_nbytes // self._request_nbytes
        self._in_flight: deque[Request] = deque()
        self._count = 0

    def step(self) -> None:
        """Submit the next request, after the oldest when enough are outstanding."""
        if len(self._in_flight) == self._outstanding:
            self._in_flight.popleft().wait()
        buffer = self._ring[self._count % len(self._ring)]
        offset = self._count % self._requests_in_file * self._request_nbytes
        self._in_flight.append(self._engine.submit(self._op, self._file, buffer, offset))
        self._count += 1

    def finish(self) -> None:
        """Wait for the rest."""
        while self._in_flight:
            self._in_flight.popleft().wait()


@contextmanager
def _rings(num_rings: int, num_buffers: int, buffer_nbytes: int) -> Iterator[list[list[memoryview]]]:
    """Give rings of buffers in one arena, every page touched."""
    total_nbytes = num_rings * num_buffers * buffer_nbytes
    with Arena(
        Budget("host", total_nbytes), total_nbytes, f"rings of {format_bytes(buffer_nbytes)}"
    ) as arena:
        memory = arena.memory
        for offset in range(0, total_nbytes, 4096):
            memory[offset] = 1
        buffers = [memory[start : start + buffer_nbytes] for start in range(0, total_nbytes, buffer_nbytes)]
        yield [buffers[first : first + num_buffers] for first in range(0, len(buffers), num_buffers)]
