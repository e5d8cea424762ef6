"""Latency of single operations: one block each, at random places, `queue_depth` of them at once.

The time of an operation runs from just before its submit to its end by the engine's own time of it, so
what Python does between does not count. Python hands on some 100,000 operations a second: on drives
faster than that, small blocks at large depths show latencies of fewer operations at once than asked.

Thread rule: the caller's thread; one run at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..aio.engine import Op, Request
from ..errors import PlanError
from ..sizes import format_bytes
from .content import PERIOD_NBYTES
from .drives import DriveRunner, cpu_time_s
from .results import Sample, Workload
from .shape import regions_of

__all__ = ["can_time_operations", "time_operations"]

# Bounds the list of latencies; a sample with so many has its 99.9th percentile many times over.
_MAX_OPERATIONS = 200_000


class _Operation(NamedTuple):
    """One in flight."""

    request: Request
    began_s: float
    op: Op
    buffer: memoryview
    offset: int
    slot: int


def can_time_operations(runner: DriveRunner, workload: Workload) -> bool:
    """Return whether memory and file have room for a workload of one drive."""
    (drive,) = workload.drives
    block, depth = workload.setting.segment_nbytes, workload.setting.queue_depth
    regions = regions_of(workload.pattern, runner.files[drive].nbytes)
    # As many blocks again as are in flight, so that there is always another one to go to.
    return depth * max(block, PERIOD_NBYTES) <= runner.memory.nbytes and all(
        region.nbytes // block >= 2 * depth for region in regions
    )


def time_operations(
    runner: DriveRunner, workload: Workload, *, min_s: float, min_operations: int = 1, seed: int = 0
) -> tuple[Sample, list[float]]:
    """Time single operations on one drive.

    Args:
        runner: has the files and the memory.
        workload: of a single drive; its block size is the size of each operation.
        min_s: go on for so long.
        min_operations: and at least for so many; never for more than 200,000.
        seed: of the order of places; another one for each run.

    Returns:
        The sample, and the latency of each operation in seconds.

    Raises:
        PlanError: memory or file are too small.
        StorageError: a transfer failed.
        CorruptionError: what was read is not what was written.
    """
    if not can_time_operations(runner, workload):
        raise PlanError(
            f"{workload.setting.queue_depth} single operations of "
            f"{format_bytes(workload.setting.segment_nbytes)} need a larger file, or more buffers than "
            f"{format_bytes(runner.memory.nbytes)}"
        )
    with runner.open(workload) as engine:
        file = runner.files[workload.drives[0]]
        block, depth = workload.setting.segment_nbytes, workload.setting.queue_depth
        stride = max(block, PERIOD_NBYTES)
        file.content.fill(runner.memory[: depth * stride])
        places = _places(workload, file.nbytes, seed)
        pending: deque[_Operation] = deque()
        busy: set[int] = set()
        latencies: list[float] = []
        last_reads: deque[_Operation] = deque(maxlen=depth)

        def submit(slot: int) -> None:
            op, offset = next(places)
            while offset in busy:  # two at one place would have no defined result
                op, offset = next(places)
            busy.add(offset)
            # The place in the content's period decides which bytes of the slot belong there.
            start = slot * stride + offset % stride
            buffer = runner.memory[start : start + block]
            if op == "write":
                file.stamp(buffer, offset)
            began_s = time.perf_counter()
            request = engine.submit(op, file.file, buffer, offset)
            pending.append(_Operation(request, began_s, op, buffer, offset, slot))

        def finish(one: _Operation) -> float:
            one.request.wait()
            ended_s = one.request.finished_s
            assert ended_s is not None
            latencies.append(ended_s - one.began_s)
            busy.discard(one.offset)
            if one.op == "read":
                file.read_nbytes += block
                file.drop_cache(one.offset, block)
            return ended_s

        cpu_s = cpu_time_s()
        start_s = end_s = time.perf_counter()
        for slot in range(depth):
            submit(slot)
        while pending:
            end_s = max(end_s, finish(first := pending.popleft()))
            finished = [first, *(one for one in pending if one.request.done())]
            for one in finished[1:]:
                pending.remove(one)
                end_s = max(end_s, finish(one))
            enough = end_s - start_s >= min_s and len(latencies) >= min_operations
            if enough or len(latencies) + len(pending) >= _MAX_OPERATIONS:
                last_reads.extend(one for one in finished if one.op == "read")
                continue
            for one in finished:
                submit(one.slot)
        if workload.pattern != "read":
            began_s = time.perf_counter()
            engine.sync(file.file)
            flush_s = time.perf_counter() - began_s
        else:
            flush_s = 0.0
        cpu_s = cpu_time_s() - cpu_s
    file.drop_cache()
    for one in last_reads:
        file.check(one.buffer, one.offset)
    sample = Sample(nbytes=len(latencies) * block, elapsed_s=end_s - start_s, flush_s=flush_s, cpu_s=cpu_s)
    return sample, latencies


def _places(workload: Workload, file_nbytes: int, seed: int) -> Iterator[tuple[Op, int]]:
    """Yield operations at random places for ever, each place once before any comes again."""
    block = workload.setting.segment_nbytes
    random = np.random.default_rng(seed)
    regions = regions_of(workload.pattern, file_nbytes)
    while True:
        orders = [random.permutation(region.nbytes // block) for region in regions]
        for row in zip(*orders, strict=True):
            for region, index in zip(regions, row, strict=True):
                yield region.op, region.start + int(index) * block
