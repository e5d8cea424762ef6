"""The store on simulated disks: segments in any order, short, torn, lost by a failed flush, or wrong.

The data files are on a simulated disk, whose operations are counted; the small files are real ones, and
a journal knows what of them was durable. Both lose their power at the same moment.
"""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
from store_content import read_all
from store_doubles import Journal, PowerLoss
from store_generations import CHUNK, LAST, SPECS, check_recovered, expected, train, two_dirs

from offload.aio.sim import Fault, FaultKind, OperationKind, SimCrash, SimDisk, SimEngine
from offload.errors import CorruptionError, OffloadError, RequestTimeoutError, StorageError
from offload.store import Store
from offload.store.ticket import IO_TIMEOUT_S

GENERATIONS = 2
GOES_ON_TO = 3  # after it was opened again


def engine_on(disk: SimDisk) -> SimEngine:
    """Chunks have two segments, and three are in flight."""
    return SimEngine(disk, queue_depth=3, segment_nbytes=CHUNK // 2)


def create(root: Path, disk: SimDisk) -> Store:
    return Store.create(two_dirs(root), SPECS, engine=engine_on(disk), chunk_nbytes=CHUNK)


def reopened(root: Path, disk: SimDisk, run_id: str) -> Store:
    return Store.open([root / "a", root / "b"], engine=engine_on(disk), run_id=run_id)


def power_loss(journal: Journal, disk: SimDisk, seed: int, root: Path, new_root: Path) -> SimDisk:
    """Build what is left of the small files under `new_root`, and return what is left of the data files."""
    PowerLoss(journal.ops, random.Random(seed)).write_to(new_root, root)
    for folder in new_root.glob("*/run-*"):
        (folder / "data.bin").touch(mode=0o600)  # a simulated file's name
    return disk.crash(seed, moved=(str(root), str(new_root)))


def data_operations(tmp_path: Path, journal: Journal) -> range:
    """The operations on data files of a run, from its creation to the return of its last commit."""
    disk = SimDisk()
    with create(tmp_path / "counted", disk) as store:
        created = len(disk.journal)
        train(store, journal, GENERATIONS)
        operations = range(created, len(disk.journal))
    journal.ops.clear()
    return operations


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    journal = Journal()
    journal.attach(monkeypatch)
    return journal


@pytest.mark.parametrize("seed", range(5))
def test_a_run_is_right_whatever_the_order_of_its_segments(
    tmp_path: Path, journal: Journal, seed: int
) -> None:
    disk = SimDisk(seed=seed, short_rate=1 / 2)
    with create(tmp_path, disk) as store:
        train(store, journal)
        check_recovered(store, LAST)
    with reopened(tmp_path, disk, store.run_id) as store:
        assert read_all(store) == expected(LAST)


def test_a_power_loss_at_any_data_operation_leaves_a_whole_generation(
    tmp_path: Path, journal: Journal
) -> None:
    for operation in data_operations(tmp_path, journal):
        root = tmp_path / str(operation)
        disk = SimDisk(faults=[Fault(operation, "crash")])
        with suppress(SimCrash), create(root, disk) as store:
            train(store, journal, GENERATIONS)
        assert disk.is_dead
        for seed in range(2):
            new_root = tmp_path / f"lost-{operation}-{seed}"
            left = power_loss(journal, disk, seed, root, new_root)
            with reopened(new_root, left, store.run_id) as found:
                check_recovered(found, journal.committed(len(journal.ops)))
        journal.ops.clear()


def test_a_process_killed_at_any_data_operation_goes_on_to_the_same_end(
    tmp_path: Path, journal: Journal
) -> None:
    for operation in data_operations(tmp_path, journal):
        root = tmp_path / str(operation)
        disk = SimDisk(faults=[Fault(operation, "crash")])
        with suppress(SimCrash), create(root, disk) as store:
            train(store, journal, GENERATIONS)
        disk.restart()
        with reopened(root, disk, store.run_id) as store:
            check_recovered(store, journal.committed(len(journal.ops)))
            train(store, journal, GOES_ON_TO)
            assert read_all(store) == expected(GOES_ON_TO)
        journal.ops.clear()


def test_sectors_that_a_failed_sync_lost_are_in_no_generation(tmp_path: Path, journal: Journal) -> None:
    """After it a second sync succeeds and proves nothing, so the run must not go on."""
    for number in range(2, 2 + 2 * GENERATIONS):  # two at the creation, then two a commit
        root = tmp_path / str(number)
        disk = SimDisk(faults=[Fault(number, "EIO", of="sync")])
        with create(root, disk) as store:
            with pytest.raises(StorageError, match="sync failed: .*EIO"):
                train(store, journal, GENERATIONS)
            store.rollback()
            with pytest.raises(OffloadError):
                train(store, journal, GENERATIONS)
        new_root = tmp_path / f"lost-{number}"
        left = power_loss(journal, disk, number, root, new_root)
        with reopened(new_root, left, store.run_id) as store:
            check_recovered(store, journal.committed(len(journal.ops)))
            train(store, journal, GOES_ON_TO)
            assert read_all(store) == expected(GOES_ON_TO)
        journal.ops.clear()


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "short"])
def test_a_fault_at_any_data_operation_is_an_error_or_does_no_harm(
    tmp_path: Path, journal: Journal, kind: FaultKind
) -> None:
    for operation in data_operations(tmp_path, journal):
        root = tmp_path / str(operation)
        disk = SimDisk(faults=[Fault(operation, kind)])
        with create(root, disk) as store:
            try:
                train(store, journal, GENERATIONS)
            except StorageError:
                assert kind != "short"
                store.rollback()
            committed = journal.committed(len(journal.ops))
            assert store.generation == committed
            assert read_all(store) == expected(committed)
        with reopened(root, disk, store.run_id) as store:
            check_recovered(store, committed)
            train(store, journal, GOES_ON_TO)
            assert read_all(store) == expected(GOES_ON_TO)
        journal.ops.clear()


def test_a_bit_that_flips_at_any_data_operation_is_found(tmp_path: Path, journal: Journal) -> None:
    outcomes = set()
    for operation in data_operations(tmp_path, journal):
        disk = SimDisk(faults=[Fault(operation, "flip")])
        with create(tmp_path / str(operation), disk) as store:
            train(store, journal, GENERATIONS)
            report = store.verify()
            try:
                assert read_all(store) == expected(GENERATIONS)
                assert report.ok
                outcomes.add("overwritten since, or no bytes moved")
            except CorruptionError:
                assert not report.ok
                outcomes.add("found")
        journal.ops.clear()
    assert len(outcomes) == 2


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_drive_that_does_not_answer_is_an_error_in_time(
    tmp_path: Path, journal: Journal, caplog: pytest.LogCaptureFixture, op: OperationKind
) -> None:
    disk = SimDisk(faults=[Fault(0, "stuck", of=op, forever=True)])
    with create(tmp_path, disk) as store:
        if op == "read":
            train(store, journal, 1)
        ticket = (store.read if op == "read" else store.write)("w", bytearray(SPECS[0].nbytes))
        with pytest.raises(RequestTimeoutError, match=f"{op} of record w, drive 0"):
            ticket.wait()
        assert IO_TIMEOUT_S <= disk.now_s < 2 * IO_TIMEOUT_S
        assert f"{op} of record w, drive 0" in caplog.text
        assert not ticket.done()
        disk.heal()  # nobody could take the buffer back while it hangs: the store's close would wait
        ticket.wait()
