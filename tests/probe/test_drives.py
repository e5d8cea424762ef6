"""Timed runs: what is moved, where, how full the queue is kept, and the arithmetic of the figures."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_doubles import keep_time, record

from offload.aio import open_engine
from offload.errors import CorruptionError, PlanError, StorageError
from offload.machine import IoSetting
from offload.probe import drives, scratch
from offload.probe.drives import DriveRunner, transfer_memory
from offload.probe.host import mount_of
from offload.probe.results import Sample, Workload
from offload.sizes import KIB, MIB


def work(pattern: str, *drives: int, block: int = 64 * KIB, depth: int = 4) -> Workload:
    setting = IoSetting(segment_nbytes=block, queue_depth=depth)
    return Workload(pattern=pattern, setting=setting, drives=drives or (0,))


@pytest.mark.parametrize("pattern", ["read", "write", "mixed"])
def test_a_run_moves_what_it_must_around_the_file_and_leaves_it_whole(engine, make_file, memory, pattern):
    file = make_file(engine)
    runner = DriveRunner([file], memory, engine=engine.name, direct=True)
    sample = runner.run(work(pattern), min_s=0, min_nbytes=3 * file.nbytes)
    assert sample.nbytes >= 3 * file.nbytes
    assert sample.elapsed_s > 0
    assert (sample.flush_s == 0) == (pattern == "read")
    file.verify(memory)


def test_a_run_goes_on_for_as_long_as_it_must(threads, make_file, memory, monkeypatch):
    file = make_file(threads)
    keep_time(monkeypatch, rate=1e9, flush_s=0)
    runner = DriveRunner([file], memory, engine="threads", direct=True)
    sample = runner.run(work("read"), min_s=0.1)
    assert 0.1 <= sample.elapsed_s <= 0.1 + 2 * memory.nbytes / 1e9


def test_bandwidth_is_bytes_by_the_time_from_first_submit_to_last_completion(
    threads, make_file, memory, monkeypatch
):
    file = make_file(threads)
    keep_time(monkeypatch, rate=2e9, flush_s=0.5)
    runner = DriveRunner([file], memory, engine="threads", direct=True)
    read = runner.run(work("read"), min_s=0, min_nbytes=32 * MIB)
    assert read.elapsed_s == pytest.approx(read.nbytes / 2e9)
    assert read.bytes_per_s == pytest.approx(2e9)
    write = runner.run(work("write"), min_s=0, min_nbytes=32 * MIB)
    assert write.elapsed_s == pytest.approx(write.nbytes / 2e9)
    assert write.flush_s == pytest.approx(0.5)
    assert write.bytes_per_s == pytest.approx(write.nbytes / (write.nbytes / 2e9 + 0.5))


def test_rates_of_a_sample_include_the_flush():
    sample = Sample(nbytes=3_000_000_000, elapsed_s=2.0, flush_s=1.0, cpu_s=0.6)
    assert sample.bytes_per_s == 1e9
    assert sample.cpu_s_per_gb == pytest.approx(0.2)


@pytest.mark.parametrize("min_mib", [10, 12])  # an odd and an even number of requests
def test_mixed_moves_half_and_half_in_different_halves(threads, make_file, memory, monkeypatch, min_mib):
    file = make_file(threads)
    log = record(monkeypatch)
    runner = DriveRunner([file], memory, engine="threads", direct=True)
    sample = runner.run(work("mixed"), min_s=0, min_nbytes=min_mib * MIB)
    del log.submitted[0]  # the read that sets up the engine
    assert log.nbytes("read") == log.nbytes("write") == sample.nbytes // 2
    half = file.nbytes // 2
    assert all(offset + nbytes <= half for op, _, offset, nbytes in log.submitted if op == "read")
    assert all(offset >= half for op, _, offset, _ in log.submitted if op == "write")


@pytest.mark.parametrize("pattern", ["read", "write", "mixed"])
def test_the_queue_stays_full_across_requests(threads, make_file, memory, monkeypatch, pattern):
    file = make_file(threads)
    log = record(monkeypatch)
    runner = DriveRunner([file], memory, engine="threads", direct=True)
    workload = work(pattern, block=256 * KIB, depth=8)
    runner.run(workload, min_s=0, min_nbytes=24 * MIB)
    requests = runner.plan(workload)
    assert requests is not None
    # After the first few: as many as planned, each time another one is submitted.
    assert set(log.outstanding[requests.num_outstanding :]) == {requests.num_outstanding}
    assert (requests.num_outstanding - 1) * requests.nbytes >= 8 * 256 * KIB


@pytest.mark.parametrize(("pattern", "syncs"), [("read", 0), ("write", 1), ("mixed", 1)])
def test_writes_are_flushed_once_for_each_drive(threads, make_file, memory, monkeypatch, pattern, syncs):
    files = [make_file(threads, "a"), make_file(threads, "b", seed=2)]
    log = record(monkeypatch)
    runner = DriveRunner(files, transfer_memory(16 * MIB), engine="threads", direct=True)
    runner.run(work(pattern, 0, 1), min_s=0)
    assert log.syncs == 2 * syncs


@pytest.mark.parametrize("pattern", ["read", "write", "mixed"])
def test_several_drives_move_at_once_and_stay_apart(engine, make_file, memory, pattern):
    files = [make_file(engine, "a"), make_file(engine, "b", seed=2)]
    runner = DriveRunner(files, transfer_memory(16 * MIB), engine=engine.name, direct=True)
    before = [file.read_nbytes + file.written_nbytes for file in files]
    sample = runner.run(work(pattern, 0, 1), min_s=0, min_nbytes=16 * MIB)
    moved = [file.read_nbytes + file.written_nbytes - then for file, then in zip(files, before, strict=True)]
    assert min(moved) >= 16 * MIB
    assert sum(moved) - sample.nbytes == 2 * 4096  # the reads that set up the engine
    for file in files:
        file.verify(memory)


class FastLane:
    """Has enough from the start, and counts how often it is told to go on."""

    def __init__(self) -> None:
        self.turns = 0
        self.turned = threading.Event()

    def is_content(self, min_s: float) -> bool:
        return True

    def transfer(self, go_on: Callable[[], bool]) -> None:
        while go_on():
            self.turns += 1
            self.turned.set()


class SlowLane:
    """Has enough only after the fast one was told to go on."""

    def __init__(self, fast: FastLane) -> None:
        self.fast = fast
        self.content = False

    def is_content(self, min_s: float) -> bool:
        return self.content

    def transfer(self, go_on: Callable[[], bool]) -> None:
        assert self.fast.turned.wait(timeout=20), "the fast drive did not go on for the slow one"
        self.content = True


def test_a_fast_drive_goes_on_until_the_slowest_has_enough():
    fast = FastLane()
    drives._drive([fast, SlowLane(fast)], min_s=0)
    assert fast.turns >= 1


def test_one_drive_of_several_can_be_measured(threads, make_file, memory):
    files = [make_file(threads, "a"), make_file(threads, "b", seed=2)]
    runner = DriveRunner(files, memory, engine="threads", direct=True)
    before = files[0].written_nbytes
    runner.run(work("write", 1), min_s=0)
    assert files[0].written_nbytes == before
    files[1].verify(memory)


def test_a_run_begins_where_the_last_one_ended(threads, make_file, memory, monkeypatch):
    file = make_file(threads, nbytes=32 * MIB)
    log = record(monkeypatch)
    runner = DriveRunner([file], memory, engine="threads", direct=True)
    runner.run(work("read"), min_s=0)
    last = log.submitted[-1]
    log.submitted.clear()
    runner.run(work("read"), min_s=0)
    assert log.submitted[1][2] == last[2] + last[3]


@pytest.mark.parametrize("which", [(0,), (0, 1)])
def test_a_read_run_notices_other_bytes(threads, make_file, which):
    files = [make_file(threads, "a"), make_file(threads, "b", seed=2)]
    runner = DriveRunner(files, transfer_memory(16 * MIB), engine="threads", direct=True)
    fd = os.open(f"/proc/self/fd/{files[0]._cache_fd}", os.O_RDWR)
    os.pwrite(fd, bytes(8 * MIB), 0)
    os.close(fd)
    with pytest.raises(CorruptionError, match="other bytes than were written"):
        runner.run(work("read", *which), min_s=0)


def test_reads_that_bring_nothing_are_not_taken_for_good_ones(threads, make_file, memory, monkeypatch):
    file = make_file(threads)
    runner = DriveRunner([file], memory, engine="threads", direct=True)
    # The memory now holds what the file does, as it would after a run before.
    runner.run(work("read"), min_s=0, min_nbytes=file.nbytes)
    file.next_offsets.clear()
    keep_time(monkeypatch, rate=1e9, flush_s=0)
    monkeypatch.setattr("engine_doubles.TimedEngine.submit", lazy_submit)
    with pytest.raises(CorruptionError):
        runner.run(work("read"), min_s=0)


def lazy_submit(self, op, file, buffer, file_offset, nbytes=None):
    """Report success and do nothing."""
    done = type("Done", (), {"finished_s": 1001.0, "wait": lambda self: memoryview(buffer).nbytes})
    return done()


def test_the_first_error_of_several_drives_ends_the_run(threads, make_file, memory):
    files = [make_file(threads, "a"), make_file(threads, "b", seed=2)]
    runner = DriveRunner(files, transfer_memory(16 * MIB), engine="threads", direct=True)
    # Cut short: reads past the end fail.
    fd = os.open(f"/proc/self/fd/{files[1]._cache_fd}", os.O_RDWR)
    os.ftruncate(fd, 4 * MIB)
    os.close(fd)
    with pytest.raises(StorageError, match="short read"):
        # Without the error it would go on for an hour.
        runner.run(work("read", 0, 1), min_s=3600)


def test_a_setting_without_room_is_refused(threads, make_file, memory):
    runner = DriveRunner([make_file(threads)], memory, engine="threads", direct=True)
    assert runner.plan(work("read", block=8 * MIB, depth=32)) is None
    with pytest.raises(PlanError, match=r"32 operations of 8.0 MiB on 1 drive"):
        runner.run(work("read", block=8 * MIB, depth=32), min_s=0)


def test_transfer_memory_is_private_as_that_of_a_run():
    memory = transfer_memory(4 * MIB)
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, access, *_, last = line.split()
        start, end = (int(number, 16) for number in extent.split("-"))
        if start <= address < end:
            # Shared memory would be a deleted /dev/zero, and gets no huge pages.
            assert (access, last) == ("rw-p", "0")
            return
    raise AssertionError("the memory is not mapped")


def test_transfer_memory_is_page_aligned():
    memory = transfer_memory(4 * MIB)
    assert memory.nbytes == 4 * MIB
    assert np.frombuffer(memory, dtype=np.uint8).ctypes.data % 4096 == 0


@pytest.mark.parametrize("name", ["threads", "portable"])
def test_buffered_reads_are_dropped_from_the_cache_as_they_arrive(make_file, memory, monkeypatch, name):
    with open_engine(name, direct=False) as engine:
        file = make_file(engine)
        assert not file.file.direct
        dropped = []
        monkeypatch.setattr(
            scratch.os, "posix_fadvise", lambda fd, offset, nbytes, advice: dropped.append((offset, nbytes))
        )
        log = record(monkeypatch)
        runner = DriveRunner([file], memory, engine=name, direct=False)
        runner.run(work("read"), min_s=0, min_nbytes=2 * file.nbytes)
    reads = [(offset, nbytes) for _, _, offset, nbytes in log.submitted[1:]]
    assert dropped == [*reads, (0, 0)]


def test_buffered_runs_leave_nothing_in_the_cache(make_file, memory, tmp_path):
    if mount_of(str(tmp_path)).file_system == "tmpfs":
        pytest.skip("tmpfs is the cache")
    with open_engine("portable") as engine:
        file = make_file(engine)
        runner = DriveRunner([file], memory, engine="portable", direct=True)
        for pattern in ("read", "write", "mixed"):
            runner.run(work(pattern), min_s=0)
            with pytest.raises(BlockingIOError):
                # Without waiting: what is in the cache would come at once.
                os.preadv(file._cache_fd, [bytearray(4096)], 6 * MIB, os.RWF_NOWAIT)
