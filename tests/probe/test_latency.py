"""Single operations: one block each, so many at once, each place once, and what was read is compared."""

from __future__ import annotations

import os

import pytest
from engine_doubles import record

from offload.errors import CorruptionError, PlanError
from offload.machine import IoSetting
from offload.probe import latency
from offload.probe.drives import DriveRunner
from offload.probe.latency import can_time_operations, time_operations
from offload.probe.results import LatencySummary, Workload, percentile
from offload.sizes import KIB, MIB


def work(pattern: str, block: int = 4 * KIB, depth: int = 4) -> Workload:
    setting = IoSetting(segment_nbytes=block, queue_depth=depth)
    return Workload(pattern=pattern, setting=setting, drives=(0,), mode="latency")


@pytest.mark.parametrize("pattern", ["read", "write", "mixed"])
@pytest.mark.parametrize("block", [4 * KIB, 1 * MIB])
def test_each_operation_is_timed_and_the_file_stays_whole(engine, make_file, memory, pattern, block):
    file = make_file(engine)
    runner = DriveRunner([file], memory, engine=engine.name, direct=True)
    depth = 4 if block == 4 * KIB else 2
    sample, latencies = time_operations(runner, work(pattern, block, depth), min_s=0, min_operations=40)
    assert len(latencies) >= 40
    assert sample.nbytes == len(latencies) * block
    assert all(0 < one <= sample.elapsed_s for one in latencies)
    file.verify(memory)


def test_operations_are_single_blocks_at_the_depth_asked_for(threads, make_file, memory, monkeypatch):
    log = record(monkeypatch)
    runner = DriveRunner([make_file(threads)], memory, engine="threads", direct=True)
    time_operations(runner, work("read", 64 * KIB, depth=6), min_s=0, min_operations=100)
    operations = log.submitted[1:]
    assert {nbytes for _, _, _, nbytes in operations} == {64 * KIB}
    assert max(log.outstanding) == 6
    # 128 blocks: no place comes twice before all have come once.
    offsets = [offset for _, _, offset, _ in operations][:100]
    assert len(set(offsets)) == 100
    assert offsets != sorted(offsets)


def test_every_place_comes_again_after_all_have_come(threads, make_file, memory):
    file = make_file(threads)
    runner = DriveRunner([file], memory, engine="threads", direct=True)
    _, latencies = time_operations(runner, work("write", 64 * KIB, depth=3), min_s=0, min_operations=300)
    assert len(latencies) >= 300
    file.verify(memory)


def test_other_bytes_are_noticed(threads, make_file, memory):
    file = make_file(threads)
    runner = DriveRunner([file], memory, engine="threads", direct=True)
    fd = os.open(f"/proc/self/fd/{file._cache_fd}", os.O_RDWR)
    os.pwrite(fd, bytes(8 * MIB), 0)
    os.close(fd)
    with pytest.raises(CorruptionError):
        time_operations(runner, work("read"), min_s=0)


def test_too_little_room_is_refused(threads, make_file, memory):
    runner = DriveRunner([make_file(threads)], memory, engine="threads", direct=True)
    assert not can_time_operations(runner, work("read", MIB, depth=8))
    with pytest.raises(PlanError, match=r"8 single operations of 1\.0 MiB"):
        time_operations(runner, work("read", MIB, depth=8), min_s=0)


def test_percentiles_are_by_nearest_rank():
    ordered = [float(number) for number in range(1, 1001)]
    assert percentile(ordered, 0.5) == 500
    assert percentile(ordered, 0.99) == 990
    assert percentile(ordered, 0.999) == 999
    assert percentile([7.0], 0.999) == 7


def test_the_last_percentile_of_few_operations_is_the_slowest():
    summary = LatencySummary.of([0.003, 0.001, 0.002])
    assert (summary.p50_s, summary.p999_s, summary.max_s, summary.num_operations) == (0.002, 0.003, 0.003, 3)


def test_a_place_in_flight_is_passed_over(threads, make_file, memory, monkeypatch):
    places = [
        ("write", 0),
        ("write", 0),
        ("write", 64 * KIB),
        *(("write", n * 64 * KIB) for n in range(2, 99)),
    ]
    monkeypatch.setattr(latency, "_places", lambda workload, file_nbytes, seed: iter(places))
    log = record(monkeypatch)
    runner = DriveRunner([make_file(threads)], memory, engine="threads", direct=True)
    time_operations(runner, work("write", 64 * KIB, depth=2), min_s=0)
    assert [offset for _, _, offset, _ in log.submitted[1:3]] == [0, 64 * KIB]
