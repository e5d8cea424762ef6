"""Timed runs on drives: large requests that keep the queue full, on one drive or several at once.

What a run does, and what its figures hold:

- Each drive has a thread of its own (a single one is driven by the caller's), so that none waits for
  another. All begin together, and go on until each has moved enough for long enough.
- Time runs from the first submit to the last completion, by the engine's own time of it. The flush
  that follows writes is timed apart. Opening the engine, filling buffers and comparing what was read
  are outside; putting stamps on what is written (two stores for each 4 KiB) is inside.
- Reads and writes of a mixed run alternate request by request, so half of the bytes are of each.
- Of each read run the bytes that are still in the buffers at its end are compared.
- Files go on where the last run left off, and around: what the cache of a drive holds is met last.
- Where the page cache cannot be bypassed, what was read or written is dropped from it.

Thread rule: one run at a time; it ends its threads before it returns or raises.
"""

from __future__ import annotations

import mmap
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from ..aio import EngineName, open_engine
from ..aio.engine import Engine, Op, Request
from ..aio.memory import aligned_buffer
from ..errors import PlanError
from ..sizes import align_down, format_bytes
from .content import BLOCK_NBYTES, PERIOD_NBYTES
from .results import Sample, Workload
from .scratch import ScratchFile
from .shape import Requests, plan_requests, regions_of

__all__ = ["DriveRunner", "cpu_time_s", "transfer_memory"]


def transfer_memory(nbytes: int) -> memoryview:
    """Return page-aligned memory of `nbytes`, every page touched. It lives as long as the view."""
    # As the arenas of a training run have it: in huge pages, which spare much of what a transfer costs.
    view = aligned_buffer(nbytes)
    for start in range(0, nbytes, mmap.PAGESIZE):
        view[start] = 0
    return view


def cpu_time_s() -> float:
    """Return the user and system time of this process so far, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class DriveRunner:
    """Runs workloads on a set of files, one at a time.

    Args:
        files: one a drive; `Workload.drives` counts them.
        memory: from `transfer_memory`, shared by all runs; its size bounds what is in flight.
        engine: name of the engine that opened the files.
        direct: as the files were opened.
    """

    def __init__(
        self, files: Sequence[ScratchFile], memory: memoryview, *, engine: EngineName, direct: bool
    ) -> None:
        self.files = tuple(files)
        self.memory = memory
        self._engine: EngineName = engine
        self._direct = direct

    def open(self, workload: Workload) -> Engine:
        """Return an engine with the workload's setting, ready to run; the caller closes it."""
        engine = open_engine(
            self._engine,
            queue_depth=workload.setting.queue_depth,
            segment_nbytes=workload.setting.segment_nbytes,
            direct=self._direct,
        )
        try:
            for drive in workload.drives:
                # What an engine sets up at the first request to a drive is not part of a run.
                engine.submit("read", self.files[drive].file, self.memory[:BLOCK_NBYTES], 0).wait()
                self.files[drive].read_nbytes += BLOCK_NBYTES
        except BaseException:
            engine.close()
            raise
        return engine

    def plan(self, workload: Workload) -> Requests | None:
        """Return the requests of each drive; None when files or memory are too small for the setting."""
        share = align_down(self.memory.nbytes // len(workload.drives), PERIOD_NBYTES)
        return plan_requests(
            workload.setting,
            workload.pattern,
            file_nbytes=min(self.files[drive].nbytes for drive in workload.drives),
            buffer_nbytes=share,
        )

    def run(self, workload: Workload, *, min_s: float, min_nbytes: int = 0) -> Sample:
        """Time one run.

        Args:
            workload: what to do on which drives.
            min_s: go on for at least so long.
            min_nbytes: and until each drive has moved so much.

        Raises:
            PlanError: the setting needs more memory or larger files.
            StorageError: a transfer failed.
            CorruptionError: what was read is not what was written.
        """
        requests = self.plan(workload)
        if requests is None:
            setting = workload.setting
            raise PlanError(
                f"{setting.queue_depth} operations of {format_bytes(setting.segment_nbytes)} on "
                f"{len(workload.drives)} drive(s) need larger files, or more buffers than "
                f"{format_bytes(self.memory.nbytes)}"
            )
        with self.open(workload) as engine:
            lanes = [
                self._lane(engine, workload, index, requests, min_nbytes)
                for index in range(len(workload.drives))
            ]
            cpu_s = cpu_time_s()
            _drive(lanes, min_s)
            cpu_s = cpu_time_s() - cpu_s
        for lane in lanes:
            lane.file.drop_cache()
            for op, part, offset in lane.last:
                if op == "read":
                    lane.file.check(part, offset)
        start_s = min(lane.start_s for lane in lanes)
        return Sample(
            nbytes=sum(lane.nbytes for lane in lanes),
            elapsed_s=max(lane.end_s for lane in lanes) - start_s,
            flush_s=max(lane.flush_s for lane in lanes),
            cpu_s=cpu_s,
        )

    def _lane(
        self, engine: Engine, workload: Workload, index: int, requests: Requests, min_nbytes: int
    ) -> _Lane:
        start = index * requests.buffer_nbytes
        memory = self.memory[start : start + requests.buffer_nbytes]
        file = self.files[workload.drives[index]]
        # Earlier reads left bytes of other places in it: those must neither be written, nor be taken for
        # what a read that did nothing should have brought.
        file.content.fill(memory)
        return _Lane(
            engine,
            file,
            workload,
            slots=[
                memory[slot * requests.nbytes : (slot + 1) * requests.nbytes]
                for slot in range(requests.num_outstanding)
            ],
            min_nbytes=max(min_nbytes, requests.buffer_nbytes),
        )


def _drive(lanes: Sequence[_Lane], min_s: float) -> None:
    """Run all lanes at once until each has done enough; the first error ends all."""
    if len(lanes) == 1:
        # On the caller's thread: an interrupt ends its wait at once.
        lane = lanes[0]
        lane.transfer(lambda: not lane.is_content(min_s))
        return
    together = threading.Barrier(len(lanes))
    stopped = threading.Event()

    def go_on() -> bool:
        # A fast drive goes on until the slowest has enough, so that all are busy all the time.
        return not stopped.is_set() and not all(lane.is_content(min_s) for lane in lanes)

    def work(lane: _Lane) -> None:
        together.wait()
        lane.transfer(go_on)

    with ThreadPoolExecutor(len(lanes), thread_name_prefix="offload-bench") as pool:
        try:
            futures = [pool.submit(work, lane) for lane in lanes]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
            together.abort()
        for future in futures:
            future.result()


@dataclass(slots=True)
class _Lane:
    """One drive's part of a run."""

    engine: Engine
    file: ScratchFile
    workload: Workload
    slots: list[memoryview]
    min_nbytes: int
    nbytes: int = 0
    start_s: float = 0.0
    end_s: float = 0.0
    flush_s: float = 0.0
    last: list[tuple[Op, memoryview, int]] = field(default_factory=list)

    def is_content(self, min_s: float) -> bool:
        """Whether this drive has moved enough for long enough."""
        return self.nbytes >= self.min_nbytes and self.end_s - self.start_s >= min_s

    def transfer(self, go_on: Callable[[], bool]) -> None:
        """Move bytes while `go_on` says so, finish what is in flight, and flush what was written."""
        step = self.slots[0].nbytes
        regions = regions_of(self.workload.pattern, self.file.nbytes)
        places = [
            region.offsets(step, self.file.next_offsets.get((region.op, region.start), 0))
            for region in regions
        ]
        pending: deque[tuple[Request, Op, memoryview, int]] = deque()
        index = 0
        self.start_s = self.end_s = time.perf_counter()
        # A mixed run ends after a write, so that it moved half and half.
        while index < len(self.slots) or index % len(regions) or go_on():
            if len(pending) == len(self.slots):
                self._finish(*pending.popleft())
            which = index % len(regions)
            op, offset, slot = regions[which].op, next(places[which]), self.slots[index % len(self.slots)]
            if op == "write":
                self.file.stamp(slot, offset)
            pending.append((self.engine.submit(op, self.file.file, slot, offset), op, slot, offset))
            self.file.next_offsets[op, regions[which].start] = offset + step
            index += 1
        self.last = [(op, slot, offset) for _, op, slot, offset in pending]
        while pending:
            self._finish(*pending.popleft())
        if self.workload.pattern != "read":
            began_s = time.perf_counter()
            self.engine.sync(self.file.file)
            self.flush_s = time.perf_counter() - began_s

    def _finish(self, request: Request, op: Op, slot: memoryview, offset: int) -> None:
        self.nbytes += request.wait()
        assert request.finished_s is not None
        self.end_s = max(self.end_s, request.finished_s)
        if op == "read":
            self.file.read_nbytes += slot.nbytes
            # As soon as it has arrived: the next time around it must come from the drive.
            self.file.drop_cache(offset, slot.nbytes)
