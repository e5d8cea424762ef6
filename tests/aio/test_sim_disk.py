"""The simulated disk: what is durable, what a power loss or a failed flush leaves, and how much fits."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
from engine_workbench import SEGMENT_NBYTES, pattern

from offload.aio.sim import Fault, SimCrash, SimDisk, SimEngine
from offload.errors import DiskFullError, StorageError

PATH = "/sim/data"
SECTOR_NBYTES = 512
NBYTES = 200 * SECTOR_NBYTES
OLD, NEW = pattern(NBYTES, 1), pattern(NBYTES, 2)
SEEDS = range(8)


def engine_on(disk: SimDisk) -> SimEngine:
    return SimEngine(disk, queue_depth=4, segment_nbytes=SEGMENT_NBYTES)


def sectors(data: bytes) -> list[bytes]:
    return [data[start : start + SECTOR_NBYTES] for start in range(0, len(data), SECTOR_NBYTES)]


def fates(found: bytes, old: bytes = OLD, new: bytes = NEW) -> set[str]:
    """What became of the sectors of a write: old, new, a mixture of the two, or garbage."""
    seen = set()
    for got, before, after in zip(sectors(found), sectors(old), sectors(new), strict=True):
        if got in (before, after):
            seen.add("old" if got == before else "new")
        else:
            mixed = all(byte in pair for byte, *pair in zip(got, before, after, strict=True))
            seen.add("mixed" if mixed else "garbage")
    return seen


def overwritten(disk: SimDisk) -> SimDisk:
    """A disk on which NEW was written over a durable OLD and not synced."""
    disk.write_file(PATH, OLD)
    with engine_on(disk) as engine, engine.open(PATH, "r+") as file:
        engine.submit("write", file, NEW, 0).wait()
    return disk


def test_what_was_synced_survives_a_power_loss() -> None:
    for seed in SEEDS:
        disk = SimDisk(seed=seed)
        with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
            engine.submit("write", file, NEW, 0).wait()
            engine.sync(file)
        assert disk.crash(seed).read_file(PATH) == NEW


def test_sectors_not_synced_are_old_new_torn_or_garbage_after_a_power_loss() -> None:
    disk = overwritten(SimDisk())
    seen = [fates(disk.crash(seed).read_file(PATH)) for seed in SEEDS]
    assert {"old", "new", "mixed", "garbage"} == set().union(*seen)
    assert all({"old", "new"} <= one for one in seen)


def test_a_power_loss_leaves_the_disk_it_was_asked_of_alone_and_is_repeatable() -> None:
    disk = overwritten(SimDisk())
    lost = [disk.crash(seed).read_file(PATH) for seed in (1, 2, 1)]
    assert lost[0] == lost[2] != lost[1]
    assert disk.read_file(PATH) == NEW


def test_a_power_loss_while_writes_are_in_flight_leaves_a_part_of_them() -> None:
    disk = SimDisk()
    disk.write_file(PATH, OLD)
    engine = SimEngine(disk, queue_depth=64, segment_nbytes=SEGMENT_NBYTES)
    file = engine.open(PATH, "r+")
    request = engine.submit("write", file, NEW, 0)
    assert {"old", "new"} <= fates(disk.crash(seed=1).read_file(PATH))
    assert request.wait() == NBYTES


def test_a_power_loss_may_undo_the_growth_of_a_file() -> None:
    disk = SimDisk()
    disk.write_file(PATH, OLD)
    with engine_on(disk) as engine, engine.open(PATH, "r+") as file:
        engine.submit("write", file, NEW, NBYTES - 100).wait()
    sizes = set()
    for seed in SEEDS:
        found = disk.crash(seed).read_file(PATH)
        sizes.add(len(found))
        assert found[: NBYTES - SECTOR_NBYTES] == OLD[: NBYTES - SECTOR_NBYTES]
        assert disk.crash(seed).used_nbytes(PATH) <= len(found) + SECTOR_NBYTES
    assert sizes == {NBYTES, 2 * NBYTES - 100}


def test_a_crash_inside_a_sync_leaves_some_sectors_durable() -> None:
    disk = SimDisk(faults=[Fault(0, "crash", of="sync")])
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        file.allocate(NBYTES)
        engine.submit("write", file, NEW, 0).wait()
        with pytest.raises(SimCrash):
            engine.sync(file)
    kept = [
        {n for n, (got, want) in enumerate(zip(sectors(found), sectors(NEW), strict=True)) if got == want}
        for found in (disk.crash(seed).read_file(PATH) for seed in range(40))
        if len(found) == NBYTES
    ]
    # Durable already, whatever the power loss does: about half of the 200.
    assert 60 < len(set.intersection(*kept)) < 140


def test_a_killed_process_leaves_the_cache_but_a_power_loss_then_takes_it() -> None:
    disk = SimDisk(faults=[Fault(10, "crash", of="write")])
    disk.write_file(PATH, OLD)
    with suppress(SimCrash), engine_on(disk) as engine, engine.open(PATH, "r+") as file:
        for start in range(0, NBYTES, 5 * SECTOR_NBYTES):
            engine.submit("write", file, NEW[start : start + 5 * SECTOR_NBYTES], start).wait()
    assert disk.is_dead
    disk.restart()
    begun = disk.journal[-1].offset_bytes
    assert disk.read_file(PATH) == NEW[:begun] + OLD[begun:]
    assert "old" in fates(disk.crash(seed=1).read_file(PATH)[:begun], OLD[:begun], NEW[:begun])
    with engine_on(disk) as engine, engine.open(PATH, "r+") as file:
        engine.sync(file)
    assert disk.crash(seed=1).read_file(PATH) == NEW[:begun] + OLD[begun:]


def test_what_a_killed_process_had_begun_is_finished_and_what_it_queued_is_not() -> None:
    disk = SimDisk(short_rate=0)
    engine = engine_on(disk)
    engine.submit("write", engine.open(PATH, "x+"), NEW, 0)
    disk.restart()
    assert disk.read_file(PATH) == NEW[: 4 * SEGMENT_NBYTES]


def test_a_failed_sync_loses_sectors_that_a_second_sync_does_not_bring_back() -> None:
    disk = SimDisk(faults=[Fault(0, "EIO", of="sync")])
    disk.write_file(PATH, OLD)
    with engine_on(disk) as engine, engine.open(PATH, "r+") as file:
        engine.submit("write", file, NEW, 0).wait()
        with pytest.raises(StorageError, match=f"sync failed: {PATH}: .*EIO"):
            engine.sync(file)
        seen = disk.read_file(PATH)
        assert fates(seen) == {"old", "new"}
        engine.sync(file)
        left = disk.crash(seed=1).read_file(PATH)
        assert left != seen  # some are read from the cache still, and are not on the disk
        assert fates(left) == {"old", "new"}
        engine.submit("write", file, NEW, 0).wait()
        engine.sync(file)
    assert disk.crash(seed=1).read_file(PATH) == NEW


def test_a_disk_takes_what_fits_and_no_more() -> None:
    disk = SimDisk(capacity_nbytes=100 * SECTOR_NBYTES)
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        with pytest.raises(DiskFullError) as caught:
            engine.submit("write", file, NEW, 0).wait()
        assert caught.value.errno == errno.ENOSPC
        got = caught.value.got_nbytes
        assert got is not None
        assert 0 < got <= 100 * SECTOR_NBYTES
        assert disk.used_nbytes(PATH) == 100 * SECTOR_NBYTES
        assert engine.submit("write", file, OLD, 0, got).wait() == got  # there is room for it already
        with engine.open("/sim/other", "x+") as other, pytest.raises(DiskFullError):
            engine.submit("write", other, b"x", 0).wait()
    disk.remove(PATH)
    with engine_on(disk) as engine, engine.open("/sim/other", "r+") as other:
        assert engine.submit("write", other, b"x", 0).wait() == 1


def test_what_was_allocated_is_there_for_its_file_alone() -> None:
    disk = SimDisk(capacity_nbytes=NBYTES)
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file, engine.open("/sim/b", "x+") as other:
        engine.submit("write", file, b"already there", 5 * SECTOR_NBYTES).wait()
        file.allocate(NBYTES)
        assert disk.used_nbytes(PATH) == NBYTES
        with pytest.raises(DiskFullError, match=f"allocate failed: {SECTOR_NBYTES:,} bytes of /sim/b"):
            other.allocate(SECTOR_NBYTES)
        assert other.size_nbytes == 0
        with pytest.raises(DiskFullError):
            engine.submit("write", other, b"x", 0).wait()
        assert engine.submit("write", file, NEW, 0).wait() == NBYTES


def test_closing_a_file_lets_its_requests_complete_first() -> None:
    engine = engine_on(SimDisk())
    file = engine.open(PATH, "x+")
    requests = [engine.submit("write", file, NEW, n * NBYTES) for n in range(3)]
    file.close()
    assert all(request.finished_s is not None for request in requests)


def test_names_relative_to_a_directory_are_in_that_directory(tmp_path: Path) -> None:
    disk = SimDisk()
    (tmp_path / "link").symlink_to("data")
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with engine_on(disk) as engine:
            with engine.open("data", "x+", dir_fd=folder) as file:
                engine.submit("write", file, NEW, 0).wait()
                engine.sync(file)
            assert (tmp_path / "data").stat().st_size == 0
            assert (tmp_path / "data").stat().st_mode & 0o777 == 0o600
            with engine.open("data", dir_fd=folder) as file:
                assert file.size_nbytes == NBYTES
            for name, mode, number in (
                ("data", "x+", errno.EEXIST),
                ("link", "r", errno.ELOOP),
                ("missing", "r+", errno.ENOENT),
                (".", "r", errno.EISDIR),
            ):
                with pytest.raises(StorageError) as caught:
                    engine.open(name, mode, dir_fd=folder)  # type: ignore[arg-type]
                assert caught.value.errno == number
            os.unlink("data", dir_fd=folder)
            with pytest.raises(StorageError):
                engine.open("data", dir_fd=folder)
            with engine.open("data", "x+", dir_fd=folder) as file:
                assert file.size_nbytes == 0
    finally:
        os.close(folder)


def test_a_crashed_disk_can_be_of_a_directory_that_was_moved(tmp_path: Path) -> None:
    disk = SimDisk()
    disk.write_file(str(tmp_path / "old" / "run" / "data"), NEW)
    left = disk.crash(1, moved=(str(tmp_path / "old"), str(tmp_path / "new")))
    assert left.read_file(str(tmp_path / "new" / "run" / "data")) == NEW


def test_sizes_that_no_disk_has_are_refused() -> None:
    for sizes in ({"sector_nbytes": 1}, {"capacity_nbytes": -1}):
        with pytest.raises(ValueError, match="must be"):
            SimDisk(**sizes)
    for sizes in ({"queue_depth": 0}, {"segment_nbytes": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            SimEngine(SimDisk(), **sizes)
